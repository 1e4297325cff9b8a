/**
 * The tool of the Regions node: several regions at once, drawn as boxes or painted.
 *
 * State [text of the list] (list.js). Which region is selected, the brush, and the pen that the keys move are the hand's.
 */

import * as lists from "./list.js";
import { paintPen, paintShapes } from "./shapes.js";
import * as regions from "./regions.js";
import { say } from "./texts.js";
import { ARROWS, CURSORS, plain, RESETS, SIZES } from "./tools.js";

const MODES = { b: "box", p: "paint", e: "erase" };
export const BRUSH = { least: 0.01, most: 0.4, step: 0.01, start: 0.06 }; // radius as a share of the picture's height

export class RegionsTool {
  label = say("regionsLabel");
  group = say("modesLabel"); // what its choices are
  hint = say("regionsHint");
  keys = say("regionsKeys");
  levels = [];
  selected = 0; // the place of a region in the list, null for none
  mode = "box";
  brush = BRUSH.start;
  aspect = 1; // of the picture
  found = []; // shapes that a detector gave to the last run
  connected = 0; // the number of the last embedding that is connected
  #pen = [0.5, 0.5]; // where the keys paint
  #penShown = false;
  #read = { text: "", list: [], problem: "" };

  constructor(initial) {
    this.initial = initial;
  }

  get hand() {
    const { selected, mode, brush } = this;
    return { selected, mode, brush };
  }

  /** {list, problem} of a text, read once: the same regions for the same text, so that what is drawn of them can be kept. */
  #reading([text]) {
    if (text === this.#read.text) return this.#read;
    try {
      const known = new Map(this.#read.list.map((region) => [JSON.stringify(region), region]));
      const list = lists.parseList(text).map((region) => known.get(JSON.stringify(region)) ?? region);
      this.#read = { text, list, problem: "" };
    } catch (error) {
      this.#read = { text, list: [], problem: error.message };
    }
    return this.#read;
  }

  /** The regions of a state, none where it cannot be read. */
  list(state) {
    return this.#reading(state).list;
  }

  /** Why it cannot be read, or "". */
  problem(state) {
    return this.#reading(state).problem;
  }

  /** The state of such regions. */
  state(list) {
    const text = lists.formatList(list);
    this.#read = { text, list, problem: "" };
    return [text];
  }

  /** The selected region's place in the list, or -1 where none is: then a stroke makes a new one. */
  at(list) {
    return this.selected === null ? -1 : Math.min(this.selected, list.length - 1);
  }

  /** Whether a press alone changes something: a dot of the brush. */
  get marks() {
    return this.mode !== "box";
  }

  get choices() {
    return Object.values(MODES).map((mode) => ({
      text: say(`${mode}Mode`), label: say(`${mode}Tip`), chosen: mode === this.mode,
    }));
  }

  choose(index) {
    this.mode = Object.values(MODES)[index];
  }

  describe(state) {
    const list = this.list(state);
    const region = list[this.at(list)];
    if (!region) return say("regionsNone");
    const values = { count: `${this.at(list) + 1}/${list.length}`, name: region.name, ...sides(region.box) };
    return region.mask ? say("regionPainted", values) : say("regionBox", values);
  }

  cursor(state, point, reach) {
    if (this.mode !== "box") return "crosshair";
    const list = this.list(state);
    const held = this.#held(list[this.at(list)], point, reach);
    if (held) return held === "move" ? "move" : `${CURSORS[held]}-resize`;
    return this.#under(list, point) < 0 ? "crosshair" : "pointer";
  }

  press(state, start, reach) {
    this.#penShown = false;
    const list = this.list(state);
    return this.mode === "box" ? this.#drag(list, start, reach) : this.#stroke(list, start);
  }

  /** What a drag makes of the regions: the selected one moved or resized, another one taken up, or a new one drawn. */
  #drag(list, start, reach) {
    let at = this.at(list);
    let held = this.#held(list[at], start, reach);
    if (!held) {
      at = this.#under(list, start);
      held = at < 0 ? null : "move";
    }
    const bytes = held && list[at].mask ? lists.readMask(list[at].mask) : null;
    this.selected = at < 0 ? null : at;
    return ({ point, moved, free }) => {
      if (!moved) return this.state(list);
      const snap = (box) => (free ? box : lists.snapBox(box, reach));
      const by = [point[0] - start[0], point[1] - start[1]];
      if (!held) {
        if (list.length >= lists.MOST) return this.state(list);
        this.selected = list.length;
        return this.state([...list, lists.newRegion(list, { box: snap(regions.spanBox(start, point)) })]);
      }
      if (bytes) return this.state(lists.changed(list, at, { mask: lists.writeMask(lists.shiftMask(bytes, ...by)) }));
      const { box } = list[at];
      const made = held === "move" ? snapMove(regions.moveBox(box, ...by), snap) : snap(regions.resizeBox(box, held, ...by));
      return this.state(lists.changed(list, at, { box: made }));
    };
  }

  /** What a stroke of the brush makes of the selected region's mask, or of a new region's. */
  #stroke(list, start) {
    const value = Number(this.mode === "paint");
    const { list: ready, at, bytes } = this.#canvasOf(list, value);
    let last = start;
    return ({ point, pressure }) => {
      if (at < 0) return this.state(list);
      lists.paintLine(bytes, last, point, this.brush * pressure, this.aspect, value);
      last = point;
      this.selected = at;
      return this.state(lists.changed(ready, at, { mask: lists.writeMask(bytes) }));
    };
  }

  #canvasOf(list, value) {
    const at = this.at(list);
    if (at >= 0) return { list, at, bytes: lists.bytesOf(list[at]) };
    if (!value || list.length >= lists.MOST) return { list, at: -1 };
    const bytes = new Uint8Array(lists.SIDE ** 2);
    return { list: [...list, lists.newRegion(list, { mask: lists.writeMask(bytes) })], at: list.length, bytes };
  }

  #held(region, point, reach) {
    if (!region) return null;
    if (!region.mask) return regions.grabBox(region.box, point, reach);
    return inside(region, point) ? "move" : null;
  }

  /** The place of the uppermost region under a point, or -1. */
  #under(list, point) {
    return list.findLastIndex((region) => region.on && inside(region, point));
  }

  takes(event) {
    if (event.key in ARROWS) return true;
    return plain(event) && (event.key in SIZES || event.key in MODES || "[] n".includes(event.key) || RESETS.includes(event.key));
  }

  key(state, event) {
    const list = this.list(state);
    const at = this.at(list);
    const { key } = event;
    if (key in MODES) this.mode = MODES[key];
    else if (key === "n") return this.addNew(state);
    else if (key === "[") this.selected = Math.max(at - 1, 0);
    else if (key === "]") this.selected = at + 1;
    else if (this.mode !== "box" && (key in ARROWS || key in SIZES || key === " ")) return this.#paintByKeys(list, event);
    else if (at >= 0 && RESETS.includes(key)) return this.state(lists.without(list, at));
    else if (at >= 0 && key in SIZES && !list[at].mask) {
      return this.state(lists.changed(list, at, { box: regions.growBox(list[at].box, regions.STEP * SIZES[key]) }));
    } else if (at >= 0 && key in ARROWS) return this.state(lists.changed(list, at, this.#nudged(list[at], event)));
    return state;
  }

  #nudged({ box, mask }, event) {
    const step = regions.STEP * (event.ctrlKey || event.metaKey ? 10 : 1);
    const by = ARROWS[event.key].map((way) => way * step);
    if (mask) return { mask: lists.writeMask(lists.shiftMask(lists.readMask(mask), ...by)) };
    return { box: event.shiftKey ? regions.resizeBox(box, "se", ...by) : regions.moveBox(box, ...by) };
  }

  #paintByKeys(list, event) {
    this.#penShown = true;
    if (event.key in SIZES) {
      this.setBrush(this.brush + BRUSH.step * SIZES[event.key]);
      return this.state(list);
    }
    if (event.key in ARROWS) {
      const step = 0.02 * (event.ctrlKey || event.metaKey ? 5 : 1);
      this.#pen = this.#pen.map((place, axis) => Math.min(Math.max(place + step * ARROWS[event.key][axis], 0), 1));
      if (!event.shiftKey) return this.state(list);
    }
    return this.#stroke(list, this.#pen)({ point: this.#pen, pressure: 1 });
  }

  setBrush(radius) {
    this.brush = Math.min(Math.max(radius, BRUSH.least), BRUSH.most);
  }

  /** A new box in the middle, or for the brush a new region with its next stroke. */
  addNew(state) {
    if (this.mode === "box") return this.add(state, { box: [0.25, 0.25, 0.5, 0.5] });
    this.selected = null;
    return state;
  }

  /** The state with one more region for each of these shapes, the last of which is then selected. */
  add(state, ...shapes) {
    const list = shapes.reduce(
      (made, shape) => (made.length < lists.MOST ? [...made, lists.newRegion(made, shape)] : made), this.list(state),
    );
    this.selected = list.length - 1;
    return this.state(list);
  }

  paint(ctx, frame, state, view) {
    this.aspect = frame.width / frame.height;
    if (this.problem(state)) return;
    const list = this.list(state);
    paintShapes(ctx, frame, list, this.at(list), { handles: view.editable && this.mode === "box", found: this.found });
    if (this.#penShown && this.mode !== "box") paintPen(ctx, frame, this.#pen, this.brush);
  }
}

function inside(region, [x, y]) {
  if (region.mask) {
    const [column, row] = [x, y].map((share) => Math.min(Math.floor(share * lists.SIDE), lists.SIDE - 1));
    const place = row * lists.SIDE + column;
    let from = 0;
    return region.mask.findIndex((run) => (from += run) > place) % 2 === 1;
  }
  const [left, top, width, height] = regions.fitBox(region.box);
  return x >= left && x <= left + width && y >= top && y <= top + height;
}

/** A moved box keeps its size: it lies on a line with one of its sides. */
function snapMove(box, snap) {
  const [x, y, width, height] = box;
  const [left, top, w, h] = snap(box);
  const shift = (start, end, newStart, newEnd) => (newStart === start ? newEnd - end : newStart - start);
  return regions.moveBox(box, shift(x, x + width, left, left + w), shift(y, y + height, top, top + h));
}

function sides(box) {
  const [x, y, width, height] = (box ?? [0, 0, 0, 0]).map((value) => value.toFixed(2));
  return { x, y, width, height };
}
