/**
 * What stands under the canvas of the Regions node: the list of regions, and what the selected one says;
 * where there is room it stands beside it.
 *
 * Like the editor it holds no values: `host` is {read(), write(state), commit()}; `tool` (layers.js) knows what is selected.
 */

import { make } from "./dom.js";
import { BRUSH } from "./layers.js";
import * as lists from "./list.js";
import { say } from "./texts.js";

const WIDE = 560; // pixels from which on the panel stands beside the picture
// The numbers of a region.
const NUMBERS = {
  strength: { min: 0, max: 2, step: 0.05 }, balance: { min: -1, max: 1, step: 0.1 }, start: { min: 0, max: 1, step: 0.05 },
  end: { min: 0, max: 1, step: 0.05 }, feather: { min: 0, max: 1, step: 0.01 },
};

export class Panel {
  constructor(tool, host) {
    this.tool = tool;
    this.host = host;
    this.rows = make("div", { class: "sda-rows", role: "list", "aria-label": say("regionsLabel") });
    this.brush = this.#input("range", "brush", { min: BRUSH.least, max: BRUSH.most, step: BRUSH.step }, (value) => tool.setBrush(Number(value)));
    const shapes = () => tool.found.map(({ box, mask }) => (mask ? { mask } : { box }));
    this.take = this.#button("", say("takeFoundTip"), () => this.#set(tool.add(host.read(), ...shapes())));
    this.fields = this.#fields();
    const bar = make("div", { class: "sda-bar" }, make("label", {}, `${say("brush")} `), this.brush, make("span", { class: "sda-gap" }),
      this.take, this.#button("+", say("addRegion"), () => this.#set(tool.addNew(host.read()))));
    this.element = make("div", { class: "sda-panel" }, bar, this.rows, this.fields);
    // What is typed here is not for the page's shortcuts.
    for (const type of ["keydown", "keyup", "paste", "copy"]) this.element.addEventListener(type, (event) => event.stopPropagation());
  }

  /** Where the panel stands in an editor of this width, in pixels: true beside the picture, false under it. */
  beside(width) {
    return width >= WIDE;
  }

  /** Show a state that can be read; `locked`: nothing can be changed. */
  show(state, locked) {
    const list = this.tool.list(state);
    const at = this.tool.at(list);
    if (this.rows.children.length !== list.length) this.rows.replaceChildren(...list.map((_, place) => this.#row(place)));
    list.forEach((region, place) => {
      const row = this.rows.children[place];
      row.setAttribute("aria-current", String(place === at));
      fill(row.querySelector("[type=checkbox]"), region.on);
      fill(row.querySelector("[type=color]"), region.colour);
      fill(row.querySelector("[type=text]"), region.name);
    });
    const region = list[at];
    // What has no use keeps its room: a canvas that grew or shrank would move under the hand.
    this.fields.style.visibility = region ? "visible" : "hidden";
    this.element.inert = locked;
    fill(this.brush, this.tool.brush);
    this.take.hidden = !this.tool.found.length;
    this.take.textContent = say("takeFound", { count: this.tool.found.length });
    if (!region) return;
    for (const name of Object.keys(NUMBERS)) fill(this.inputs[name], region[name]);
    fill(this.inputs.prompt, region.prompt);
    this.#offer(Math.max(1, this.tool.connected, ...list.map(({ speaks }) => speaks)));
    fill(this.inputs.speaks, `${region.speaks}${region.placed && region.speaks ? "s" : ""}`);
    fill(this.inputs.mode, region.mode);
    this.inputs.prompt.style.visibility = region.speaks ? "hidden" : "visible";
  }

  #set(state) {
    this.host.write(state);
    this.host.commit();
  }

  /** Change a region of the present list; `done`: the page may note it as one step. */
  #change(at, change, done) {
    const state = this.tool.state(lists.changed(this.tool.list(this.host.read()), at, change));
    if (done) this.#set(state);
    else this.host.write(state);
  }

  #row(place) {
    const list = () => this.tool.list(this.host.read());
    const select = () => {
      this.tool.selected = place;
      this.host.draw();
    };
    const change = (name) => (value, done) => this.#change(place, { [name]: value }, done);
    const move = (by) => () => {
      const order = lists.moved(list(), place, by);
      this.tool.selected = Math.min(Math.max(place + by, 0), order.length - 1);
      this.#set(this.tool.state(order));
    };
    const row = make("div", { class: "sda-row", role: "listitem" },
      this.#input("checkbox", "on", {}, change("on")), this.#input("color", "colour", {}, change("colour")),
      this.#input("text", "name", { maxlength: 100 }, change("name")), this.#button("↑", say("regionLower"), move(-1)),
      this.#button("↓", say("regionHigher"), move(1)),
      this.#button("×", say("regionDelete"), () => this.#set(this.tool.state(lists.without(list(), place)))));
    row.addEventListener("pointerdown", select);
    row.addEventListener("focusin", select);
    return row;
  }

  #fields() {
    const selected = (change) => (value, done) => {
      const list = this.tool.list(this.host.read());
      const at = this.tool.at(list);
      if (at >= 0) this.#change(at, change(value, list[at]), done);
    };
    const within = (value, { min, max }) => Math.min(Math.max(Number(value) || 0, min), max);
    const number = (name, limits) => {
      const set = (value, region) => {
        const change = { [name]: within(value, limits) };
        if (name === "start") change.end = Math.max(region.end, change.start);
        if (name === "end") change.start = Math.min(region.start, change.end);
        return change;
      };
      return this.#input("number", name, limits, selected(set));
    };
    this.inputs = {
      prompt: this.#input("textarea", "prompt", { placeholder: say("promptHint"), class: "sda-all", maxlength: 10000 }, selected((prompt) => ({ prompt }))),
      speaks: this.#select("speaks", [], selected((value) => ({ speaks: parseInt(value, 10), placed: value.endsWith("s") }))),
      mode: this.#select("mode", [["replace", "replace"], ["join", "join"]], selected((mode) => ({ mode }))),
      ...Object.fromEntries(Object.entries(NUMBERS).map(([name, limits]) => [name, number(name, limits)])),
    };
    const { prompt, ...rest } = this.inputs;
    const titled = Object.entries(rest).map(([name, input]) =>
      make("div", { class: "sda-field" }, make("label", { title: say(`${name}Tip`) }, say(`${name}Label`)), input));
    return make("div", { class: "sda-fields" }, prompt, ...titled);
  }

  /** What a region can show: the prompt, and this many embeddings. */
  #offer(count) {
    if (this.inputs.speaks.length === 1 + 2 * count) return;
    const others = Array.from({ length: count }, (_, index) => index + 1);
    this.inputs.speaks.replaceChildren(option("0", say("speaksPrompt")),
      ...others.map((number) => option(number, `other_${number}`)),
      ...others.map((number) => option(`${number}s`, say("speaksPlaced", { name: `other_${number}` }))));
  }

  #button(text, label, act) {
    const button = make("button", { type: "button", title: label, "aria-label": label }, text);
    button.addEventListener("click", act);
    return button;
  }

  #select(name, options, change) {
    const select = make("select", { "aria-label": say(`${name}Label`), title: say(`${name}Tip`) }, ...options.map((each) => option(...each)));
    select.addEventListener("change", () => change(select.value, true));
    return select;
  }

  /** An input that tells every change, and when it is done. */
  #input(kind, name, attributes, change) {
    const label = { "aria-label": say(`${name}Label`), title: say(`${name}Tip`) };
    const input = make(kind === "textarea" ? kind : "input", { ...(kind === "textarea" ? {} : { type: kind }), ...label, ...attributes });
    const value = () => (kind === "checkbox" ? input.checked : input.value);
    input.addEventListener("input", () => kind !== "number" && change(value(), false));
    input.addEventListener("change", () => change(value(), true));
    return input;
  }
}

const option = (value, text) => make("option", { value }, text);

/** Show a value, unless it is being typed. */
function fill(input, value) {
  if (input.type === "checkbox") input.checked = value;
  else if (String(value) !== input.value && !(document.activeElement === input && input.type !== "range")) input.value = value;
}
