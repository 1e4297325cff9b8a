/**
 * The canvas widget: a picture, what is drawn on it, and the hand on mouse, pen, finger or keys.
 *
 * It holds no values. `host` reads and writes those of the node's own widgets: {read(), write(state), commit(), locked(),
 * levels(), picture(), forward(name, event)}; `tool` (tools.js) says what an action makes of them.
 */

import { paintGround } from "./paint.js";
import { frameOf, History } from "./regions.js";
import { say } from "./texts.js";

const STYLE = `
.sda-editor { display: flex; flex-direction: column; gap: 4px; width: 100%; height: 100%; min-height: 300px; min-width: 0;
  contain: inline-size; box-sizing: border-box; font: 11px/1.3 sans-serif; color: var(--input-text, #ddd); }
.sda-editor .sda-bar { display: flex; gap: 4px; }
.sda-editor [hidden] { display: none; }
.sda-editor button { font: inherit; color: inherit; padding: 2px 8px; border-radius: 4px; cursor: pointer;
  border: 1px solid var(--border-color, #666); background: var(--comfy-input-bg, #222); }
.sda-editor button[aria-pressed="true"] { border-color: #56b4e9; box-shadow: inset 0 0 0 1px #56b4e9; }
.sda-editor button:focus-visible { outline: 2px solid #56b4e9; outline-offset: 1px; }
.sda-editor .sda-gap { flex: 1; }
.sda-editor .sda-stage { position: relative; flex: 1 1 0; min-height: 0; border-radius: 6px;
  background: var(--comfy-input-bg, #222); }
.sda-editor .sda-stage:focus-within { outline: 2px solid #56b4e9; outline-offset: -1px; }
.sda-editor canvas { position: absolute; inset: 0; width: 100%; height: 100%; touch-action: none; }
.sda-editor .sda-keys { position: absolute; inset: 0; width: 100%; height: 100%; padding: 0; border: 0; opacity: 0;
  pointer-events: none; }
.sda-editor .sda-line { white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
.sda-editor .sda-hint { opacity: 0.7; }`;
const DRAG_FROM = 3; // pixels; less is a click
const ONE_ACTION = 500; // milliseconds between turns of the wheel that are undone together

const same = (a, b) => JSON.stringify(a) === JSON.stringify(b);

function make(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

function name(button, text, label) {
  button.textContent = text;
  button.title = label;
  button.setAttribute("aria-label", label);
}

export class Editor {
  #history = new History();
  #gesture = null;
  #frame = frameOf(1, 1, 1);
  #queued = false;
  #scrolled = 0;
  #later = 0;

  constructor(tool, host) {
    this.tool = tool;
    this.host = host;
    this.#build();
    this.#listen();
    this.draw();
  }

  /** Draw the present state with the next frame of the page. */
  draw() {
    if (this.#queued) return;
    this.#queued = true;
    requestAnimationFrame(() => {
      this.#queued = false;
      this.#paint();
    });
  }

  #build() {
    if (!document.getElementById("sda-editor-style")) {
      document.head.append(Object.assign(make("style", { id: "sda-editor-style" }), { textContent: STYLE }));
    }
    const { label, hint } = this.tool;
    this.choices = make("div", { class: "sda-bar", role: "group", "aria-label": say("level") });
    const [undo, reset] = [this.#button(() => this.#step("undo")), this.#button(() => this.#change(this.tool.initial))];
    name(undo, say("undo"), say("undoTip"));
    name(reset, say("reset"), say("resetTip"));
    const bar = make("div", { class: "sda-bar" }, this.choices, make("span", { class: "sda-gap" }), undo, reset);
    this.canvas = make("canvas", { "aria-hidden": "true" });
    // The focus lives in an input, because ComfyUI's own keys (its undo, Delete) leave a focused input alone and nothing else.
    this.keys = make("input", { class: "sda-keys", readonly: "", inputmode: "none", "aria-label": `${label}. ${hint}` });
    this.stage = make("div", { class: "sda-stage" }, this.canvas, this.keys);
    this.status = make("div", { class: "sda-line", role: "status" });
    const help = make("div", { class: "sda-line sda-hint", title: hint, "aria-hidden": "true" }, hint);
    // Nodes 2.0 lets a widget of the second class grow with its node.
    this.element = make("div", { class: "sda-editor widget-expands" }, bar, this.stage, this.status, help);
  }

  #button(act) {
    const button = make("button", { type: "button" });
    button.addEventListener("mousedown", (event) => event.preventDefault()); // a click leaves the focus on the picture
    button.addEventListener("click", () => {
      if (!this.host.locked()) act();
      this.draw();
    });
    return button;
  }

  #listen() {
    const { canvas, keys, element } = this;
    const on = (target, type, act, options) => target.addEventListener(type, (event) => act(event), options);
    on(canvas, "pointerdown", (event) => this.#press(event));
    on(canvas, "pointermove", (event) => this.#move(event));
    on(canvas, "pointerup", (event) => this.#release(event));
    on(canvas, "pointercancel", () => this.#cancel());
    on(canvas, "pointerenter", () => this.draw());
    on(canvas, "mousedown", (event) => event.preventDefault()); // or the page takes the focus back, and scrolls by wheel clicks
    on(canvas, "wheel", (event) => this.#wheel(event), { passive: false });
    on(keys, "keydown", (event) => this.#key(event));
    for (const type of ["focus", "blur"]) {
      // In Nodes 2.0 the page keeps the wheel for its zoom unless a widget asks for it.
      on(keys, type, () => (element.dataset.captureWheel = String(this.#focused)));
    }
    // Otherwise Nodes 2.0 drags the node.
    for (const type of ["pointerdown", "pointermove", "pointerup"]) on(element, type, (event) => event.stopPropagation());
    if (typeof ResizeObserver !== "undefined") new ResizeObserver(() => this.draw()).observe(this.stage);
  }

  get #focused() {
    return document.activeElement === this.keys;
  }

  /** Why nothing can be changed now, or "". */
  #locked() {
    return this.host.locked() || this.tool.problem(this.host.read());
  }

  /** How much the page's zoom enlarges the canvas. */
  get #zoom() {
    return this.canvas.getBoundingClientRect().width / this.canvas.clientWidth || 1;
  }

  #pointer(event) {
    const { left, top } = this.canvas.getBoundingClientRect();
    const { x, y, width, height } = this.#frame;
    const zoom = this.#zoom;
    const share = (value) => Math.min(Math.max(value, 0), 1);
    const held = (event.pointerType === "touch" ? 16 : 8) / zoom;
    return {
      point: [share(((event.clientX - left) / zoom - x) / width), share(((event.clientY - top) / zoom - y) / height)],
      reach: [held / width, held / height],
    };
  }

  #press(event) {
    if (event.button === 1) this.host.forward("processMouseDown", event);
    if (event.button !== 0 || !event.isPrimary) return;
    this.keys.focus({ preventScroll: true });
    if (this.#locked()) return;
    const { point, reach } = this.#pointer(event);
    const before = this.host.read();
    this.#gesture = { before, act: this.tool.press(before, point, reach), x: event.clientX, y: event.clientY, moved: false };
    this.canvas.setPointerCapture?.(event.pointerId);
    this.draw();
  }

  #move(event) {
    if (event.buttons & 4) this.host.forward("processMouseMove", event);
    const { point, reach } = this.#pointer(event);
    const gesture = this.#gesture;
    if (!gesture) {
      this.canvas.style.cursor = this.#locked() ? "default" : this.tool.cursor(this.host.read(), point, reach);
      return;
    }
    const [across, rise] = [event.clientX - gesture.x, gesture.y - event.clientY];
    gesture.moved ||= Math.hypot(across, rise) > DRAG_FROM;
    this.host.write(gesture.act({ point, rise, moved: gesture.moved }));
    this.draw();
  }

  #release(event) {
    if (event.button === 1) this.host.forward("processMouseUp", event);
    if (!this.#gesture || event.button !== 0) return;
    const { before } = this.#gesture;
    this.#gesture = null;
    if (!same(before, this.host.read())) {
      this.#history.record(before);
      this.host.commit();
    }
    this.draw();
  }

  #cancel() {
    if (this.#gesture) this.host.write(this.#gesture.before);
    this.#gesture = null;
    this.draw();
  }

  #wheel(event) {
    event.stopPropagation();
    event.preventDefault();
    if (!this.#focused || event.ctrlKey || event.metaKey || this.#locked()) {
      this.host.forward("processMouseWheel", event);
      return;
    }
    const continued = event.timeStamp - this.#scrolled < ONE_ACTION;
    this.#scrolled = event.timeStamp;
    this.#change(this.tool.turn(this.host.read(), -Math.sign(event.deltaY)), continued);
  }

  #key(event) {
    const letter = (event.ctrlKey || event.metaKey) && !event.altKey ? event.key.toLowerCase() : "";
    if (event.key === "Escape") {
      if (this.#gesture) this.#cancel();
      else this.keys.blur();
    } else if (letter === "z" || letter === "y") this.#step(letter === "y" || event.shiftKey ? "redo" : "undo");
    else {
      const state = this.#locked() ? undefined : this.tool.key(this.host.read(), event);
      if (state === undefined) return; // everyone else's: Tab, Ctrl+Enter, ...
      this.#change(state, event.repeat);
    }
    event.preventDefault();
    event.stopPropagation();
  }

  #change(state, continued = false) {
    const before = this.host.read();
    if (!same(before, state)) {
      this.#history.record(before, continued);
      this.#set(state);
    }
    this.draw();
  }

  #step(direction) {
    if (this.host.locked() || this.#gesture) return;
    this.#scrolled = 0;
    const state = this.#history[direction](this.host.read());
    if (state) this.#set(state);
    this.draw();
  }

  #set(state) {
    this.host.write(state);
    clearTimeout(this.#later); // a held key is one change of the workflow
    this.#later = setTimeout(() => this.host.commit(), 300);
  }

  #paint() {
    const { clientWidth: width, clientHeight: height } = this.stage;
    if (!width || !height) return;
    const ratio = Math.min(Math.max((window.devicePixelRatio || 1) * this.#zoom, 1), 4);
    this.canvas.width = Math.round(width * ratio);
    this.canvas.height = Math.round(height * ratio);
    const ctx = this.canvas.getContext("2d");
    ctx.scale(ratio, ratio);

    const [state, picture, locked] = [this.host.read(), this.host.picture(), this.#locked()];
    this.tool.levels = this.host.levels();
    this.#frame = frameOf(width, height, picture ? picture.naturalWidth / picture.naturalHeight : 1);
    paintGround(ctx, this.#frame, picture, getComputedStyle(this.element).color);
    this.tool.paint(ctx, this.#frame, state, !locked);

    const text = locked || this.tool.describe(state);
    if (this.status.textContent !== text) this.status.textContent = this.status.title = this.keys.value = text;
    this.#offer(this.tool.choices);
  }

  #offer(choices) {
    this.choices.hidden = !choices.length;
    if (this.choices.children.length !== choices.length) {
      this.choices.replaceChildren(...choices.map((_, depth) => this.#button(() => this.tool.choose(depth))));
    }
    choices.forEach(({ text, label, chosen }, depth) => {
      const button = this.choices.children[depth];
      if (button.title !== label) name(button, text, label);
      button.setAttribute("aria-pressed", String(chosen));
    });
  }
}
