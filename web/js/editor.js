/**
 * The canvas widget: a picture, what is drawn on it, and the hand on mouse, pen, finger or keys.
 *
 * It holds no values and no history. `host` reads and writes those of the node's own widgets and of the page: {read(),
 * write(state), commit(), undo(), undoes(), locked(), levels(), view(onResult), forward(name, event)}; `tool` (tools.js) says what
 * an action makes of them, and its `hand` is what outlives the page's undo. A panel (panel.js) may stand beside the canvas.
 */

import { dress, make } from "./dom.js";
import { paintGround } from "./paint.js";
import { frameOf } from "./regions.js";
import { say } from "./texts.js";

const LOW = 320; // pixels: the editor's least height and the page's margins around it
const [BESIDE, TALL] = [390, 620]; // with a panel beside the picture, and under it
const DRAG_FROM = 3; // pixels; less is a click

const same = (a, b) => JSON.stringify(a) === JSON.stringify(b);

function name(button, text, label) {
  button.textContent = text;
  button.title = label;
  button.setAttribute("aria-label", label);
}

export class Editor {
  #gesture = null;
  #frame = frameOf(1, 1, 1);
  #queued = false;
  #unsaved = false; // changed by keys, and the page does not know yet
  #focused = false;
  #wanted = false; // the focus, as soon as the element is in the page
  #home = document.createComment(""); // stands in the node while the element is in the window
  #wasLarge = false; // when its node was taken away
  window = null; // in which the element is, while it is enlarged
  onResult = false; // whether it is drawn on the latest picture that came of this node

  constructor(tool, host, Panel = null) {
    this.tool = tool;
    this.host = host;
    this.#build();
    if (Panel) this.#add(Panel);
    this.#listen();
    this.draw();
  }

  /** The least height in pixels in which everything can be reached, in a node of this width. */
  least(width) {
    if (!this.panel) return LOW;
    return this.panel.beside(this.element.clientWidth || width) ? BESIDE : TALL;
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

  /** Go on where the editor of another node left off, in whose place the page has put this one's. */
  follow(former) {
    this.#wanted = former.#focused;
    this.onResult = former.onResult;
    if (this.tool.constructor === former.tool.constructor) Object.assign(this.tool, former.tool.hand);
    // Nodes 2.0 goes on showing the element of the widget that had this name, on the node that had this id.
    requestAnimationFrame(() => {
      if (former.element.isConnected && !this.element.isConnected) former.element.replaceWith(this.element);
      if (former.#wasLarge) this.#enlargeSoon();
    });
  }

  /** The node was taken away: what were drawn in the window now would be nobody's. */
  leave() {
    this.#wasLarge = Boolean(this.window);
    this.#shrink();
  }

  #build() {
    dress();
    const { label, hint, keys } = this.tool;
    this.choices = make("div", { class: "sda-bar", role: "group", "aria-label": this.tool.group ?? "" });
    this.undo = this.#button(() => this.host.undo());
    this.reset = this.#button(() => {
      this.#change(this.tool.initial);
      this.#commit();
    });
    this.result = this.#button(() => (this.onResult = !this.onResult));
    name(this.result, "▣", say("onResult"));
    this.large = this.#button(() => (this.window ? this.#shrink() : this.#enlarge()));
    name(this.large, "⤢", say("enlarge"));
    name(this.undo, say("undo"), say("undoTip"));
    name(this.reset, say("reset"), say("resetTip"));
    const gap = make("span", { class: "sda-gap" });
    const bar = make("div", { class: "sda-bar" }, this.choices, gap, this.undo, this.reset, this.result, this.large);
    this.canvas = make("canvas", { "aria-hidden": "true" });
    // The focus is in no input: the page leaves those their own undo, and this has none but the page's.
    const named = { role: "application", tabindex: "0", "aria-label": `${label}. ${hint}. ${keys}` };
    this.stage = make("div", { class: "sda-stage", ...named }, this.canvas);
    this.status = make("div", { class: "sda-line", role: "status" });
    this.help = make("div", { class: "sda-line sda-hint", title: keys, "aria-hidden": "true" }, hint);
    // Nodes 2.0 lets a widget of the second class grow with its node.
    this.element = make("div", { class: "sda-editor widget-expands" }, bar, this.stage, this.status, this.help);
  }

  #add(Panel) {
    this.panel = new Panel(this.tool, {
      read: () => this.host.read(),
      write: (state) => this.#change(state),
      commit: () => this.#commit(),
      draw: () => this.draw(),
    });
    this.element.append(this.panel.element);
  }

  /** Into a window nearly as large as the page's. No dialog element: while one is open newer pages know no undo. */
  #enlarge() {
    this.element.replaceWith(this.#home);
    this.window = make("div", { class: "sda-window" }, this.element);
    const leave = (event) => {
      if (event.key === "Escape" && !this.stage.contains(event.target)) this.#shrink();
    };
    this.window.addEventListener("keydown", leave, true); // before the panel, which keeps keys to itself
    document.body.append(this.window);
    this.stage.focus();
  }

  /** As soon as the page has put the element into the new node, which the way back must find. */
  #enlargeSoon(frames = 60) {
    if (this.element.isConnected) this.#enlarge();
    else if (frames) requestAnimationFrame(() => this.#enlargeSoon(frames - 1));
  }

  /** Out of it, back to the node. */
  #shrink() {
    if (!this.window) return;
    this.#home.replaceWith(this.element);
    this.window.remove();
    this.window = null;
    this.draw();
  }

  #button(act) {
    const button = make("button", { type: "button" });
    button.addEventListener("mousedown", (event) => event.preventDefault()); // a click leaves the focus on the picture
    button.addEventListener("click", () => {
      act();
      this.draw();
    });
    return button;
  }

  #listen() {
    const { canvas, stage, element } = this;
    const on = (target, type, act, options) => target.addEventListener(type, (event) => act(event), options);
    on(canvas, "pointerdown", (event) => this.#press(event));
    on(canvas, "pointermove", (event) => this.#move(event));
    on(canvas, "pointerup", (event) => this.#release(event));
    on(canvas, "pointercancel", () => this.#cancel());
    on(canvas, "pointerenter", () => this.draw());
    on(canvas, "mousedown", (event) => event.preventDefault()); // or the page takes the focus back, and scrolls by wheel clicks
    on(element, "wheel", (event) => this.#wheel(event), { passive: false });
    on(stage, "keydown", (event) => this.#key(event));
    on(stage, "keyup", () => this.#commit()); // a held key is one change
    on(stage, "focus", () => (this.#focused = true));
    on(stage, "blur", () => {
      this.#commit();
      requestAnimationFrame(() => (this.#focused &&= !stage.isConnected)); // or the page has taken all of it away, for a moment
    });
    // Otherwise Nodes 2.0 drags the node.
    for (const type of ["pointerdown", "pointermove", "pointerup"]) on(element, type, (event) => event.stopPropagation());
    if (typeof ResizeObserver !== "undefined") new ResizeObserver(() => this.draw()).observe(this.stage);
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
      pressure: event.pointerType === "pen" && event.pressure ? 0.25 + 0.75 * event.pressure : 1,
    };
  }

  #press(event) {
    if (event.button === 1) this.host.forward("processMouseDown", event);
    if (event.button !== 0 || !event.isPrimary) return;
    this.stage.focus({ preventScroll: true });
    if (this.#locked()) return;
    const { point, reach, pressure } = this.#pointer(event);
    const before = this.host.read();
    const act = this.tool.press(before, point, reach, { shift: event.shiftKey });
    this.#gesture = { before, act, x: event.clientX, y: event.clientY, moved: false };
    this.canvas.setPointerCapture?.(event.pointerId);
    if (this.tool.marks || event.shiftKey) this.host.write(act({ point, rise: 0, moved: false, free: event.altKey, pressure }));
    this.draw();
  }

  #move(event) {
    if (event.buttons & 4) this.host.forward("processMouseMove", event);
    const { point, reach, pressure } = this.#pointer(event);
    const gesture = this.#gesture;
    if (!gesture) {
      this.canvas.style.cursor = this.#locked() ? "default" : this.tool.cursor(this.host.read(), point, reach);
      return;
    }
    const [across, rise] = [event.clientX - gesture.x, gesture.y - event.clientY];
    gesture.moved ||= Math.hypot(across, rise) > DRAG_FROM;
    this.host.write(gesture.act({ point, rise, moved: gesture.moved, free: event.altKey, pressure }));
    this.draw();
  }

  #release(event) {
    if (event.button === 1) this.host.forward("processMouseUp", event);
    if (!this.#gesture || event.button !== 0) return;
    const { before } = this.#gesture;
    this.#gesture = null;
    if (!same(before, this.host.read())) {
      this.#unsaved = true;
      this.#commit();
    }
    this.draw();
  }

  #cancel() {
    if (this.#gesture) this.host.write(this.#gesture.before);
    this.#gesture = null;
    this.draw();
  }

  /** The wheel is the graph's, here as everywhere; Nodes 2.0 takes it before it comes here. */
  #wheel(event) {
    event.stopPropagation();
    event.preventDefault();
    if (!this.window) this.host.forward("processMouseWheel", event);
  }

  #key(event) {
    if (event.key === "Escape") {
      if (this.#gesture) this.#cancel();
      else if (this.window) this.#shrink();
      else this.stage.blur();
    } else if (!this.tool.takes(event)) return; // everyone else's: Tab, Ctrl+Enter, undo, ...
    else if (!this.#locked() && !this.#gesture) this.#change(this.tool.key(this.host.read(), event));
    event.preventDefault();
    event.stopPropagation(); // locked or not: the page's Delete takes the node
  }

  #change(state) {
    if (!same(this.host.read(), state)) {
      this.host.write(state);
      this.#unsaved = true;
    }
    this.draw();
  }

  #commit() {
    if (this.#unsaved) this.host.commit();
    this.#unsaved = false;
  }

  #paint() {
    if (this.panel) this.element.classList.toggle("sda-wide", this.panel.beside(this.element.clientWidth));
    const { clientWidth: width, clientHeight: height } = this.stage;
    if (!width || !height) return;
    if (this.#wanted) this.stage.focus({ preventScroll: true });
    this.#wanted = false;
    const ratio = Math.min(Math.max((window.devicePixelRatio || 1) * this.#zoom, 1), 4);
    const size = { width: Math.round(width * ratio), height: Math.round(height * ratio) };
    if (this.canvas.width !== size.width || this.canvas.height !== size.height) Object.assign(this.canvas, size);
    const ctx = this.canvas.getContext("2d");
    ctx.setTransform(ratio, 0, 0, ratio, 0, 0);
    ctx.clearRect(0, 0, width, height);

    const [state, view, locked] = [this.host.read(), this.host.view(this.onResult), this.#locked()];
    const { color: ink, backgroundColor: paper } = getComputedStyle(this.stage);
    const picture = view.ground ?? view.other;
    this.tool.levels = this.host.levels();
    this.#frame = frameOf(width, height, picture ? picture.naturalWidth / picture.naturalHeight : 1);
    paintGround(ctx, this.#frame, view.ground, { ink, paper });
    this.tool.paint(ctx, this.#frame, state, { ...view, ink, paper, editable: !locked });

    const text = locked || this.tool.describe(state);
    if (this.status.textContent !== text) this.status.textContent = text;
    this.help.style.visibility = locked ? "hidden" : "visible";
    this.result.setAttribute("aria-pressed", String(this.onResult));
    this.undo.disabled = !this.host.undoes();
    this.reset.disabled = Boolean(this.host.locked()) || same(state, this.tool.initial);
    this.#offer(this.tool.choices);
    if (this.panel && !this.tool.problem(state)) this.panel.show(state, Boolean(locked));
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
