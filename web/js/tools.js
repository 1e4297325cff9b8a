/**
 * The two things that the canvas widget edits: a box, and the strengths of cells.
 *
 * A tool turns what the hand does into new values of the node's widgets and draws them; it keeps none of those values.
 * `state` is the list of the widgets' values, in the order that the extension names them.
 */

import { paintCells, paintInside, paintLevels, paintRegion } from "./paint.js";
import * as regions from "./regions.js";
import { say } from "./texts.js";

export const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
export const SIZES = { "+": 1, "=": 1, "-": -1, _: -1 };
export const RESETS = ["Delete", "Backspace"];
export const CURSORS = { n: "ns", s: "ns", e: "ew", w: "ew", nw: "nwse", se: "nwse", ne: "nesw", sw: "nesw" };

// AltGr, with which many keyboards write brackets, reports Ctrl and Alt as well.
export const plain = (event) => event.getModifierState("AltGraph") || !(event.ctrlKey || event.metaKey || event.altKey);

/** State [x, y, width, height]. */
export class BoxTool {
  label = say("boxLabel");
  hint = say("boxHint");
  keys = say("boxKeys");
  choices = [];
  levels = [];
  hand = {}; // there is one box, and nothing to choose

  constructor(initial) {
    this.initial = initial;
  }

  describe(box) {
    const [x, y, width, height] = regions.fitBox(box).map((value) => value.toFixed(2));
    return say("box", { x, y, width, height });
  }

  problem() {
    return "";
  }

  cursor(box, point, reach) {
    const held = regions.grabBox(box, point, reach);
    return held === "move" ? "move" : held ? `${CURSORS[held]}-resize` : "crosshair";
  }

  /** What a drag that begins at `start` makes of the box. */
  press(box, start, reach) {
    const held = regions.grabBox(box, start, reach);
    return ({ point, moved }) => {
      const [dx, dy] = [point[0] - start[0], point[1] - start[1]];
      if (!moved) return box;
      if (!held) return regions.spanBox(start, point);
      return held === "move" ? regions.moveBox(box, dx, dy) : regions.resizeBox(box, held, dx, dy);
    };
  }

  /** Whether a key is for the picture. */
  takes(event) {
    return event.key in ARROWS || (plain(event) && (event.key in SIZES || RESETS.includes(event.key)));
  }

  /** What such a key makes of the box. */
  key(box, event) {
    if (event.key in SIZES) return regions.growBox(box, regions.STEP * SIZES[event.key]);
    if (RESETS.includes(event.key)) return this.initial;
    const step = regions.STEP * (event.ctrlKey || event.metaKey ? 10 : 1);
    const [dx, dy] = ARROWS[event.key].map((way) => way * step);
    return event.shiftKey ? regions.resizeBox(box, "se", dx, dy) : regions.moveBox(box, dx, dy);
  }

  /** The region is `view.region` where an input decides, null where nobody knows yet what it will say. */
  paint(ctx, frame, state, view) {
    const [x, y, width, height] = regions.fitBox(state);
    const region = view.region === undefined ? { box: [x, y, x + width, y + height] } : view.region;
    if (region && view.other !== undefined) paintInside(ctx, frame, region, view);
    paintLevels(ctx, frame, this.levels);
    if (region) paintRegion(ctx, frame, region, view.editable);
  }
}

/** State [text of the cells]. Which cell is selected is the hand's, not the workflow's. */
export class CellTool {
  label = say("cellLabel");
  group = say("level"); // what its choices are
  hint = say("cellHint");
  keys = say("cellKeys");
  #levels = regions.levelsOf();
  selected = this.#levels[1][0];

  constructor(initial) {
    this.initial = initial;
  }

  get hand() {
    return { selected: this.selected };
  }

  /** The levels to choose from; the selection stays where it was, as far as there is such a cell. */
  set levels(levels) {
    this.#levels = levels;
    const { selected } = this;
    const same = ({ level, row, column }) => level === selected.level && row === selected.row && column === selected.column;
    this.selected = levels.flat().find(same) ?? levels[0][0];
  }

  /** For the buttons: what each level is called, and whether it is the one worked on. */
  get choices() {
    return this.#levels.map((cells) => {
      const count = (side) => new Set(cells.map((cell) => cell[side])).size;
      const grid = `${count("row")}×${count("column")}`;
      return { text: grid, label: say("cells", { level: cells[0].level, grid }), chosen: cells === this.#cells };
    });
  }

  choose(depth) {
    const cells = this.#levels[Math.min(Math.max(depth, 0), this.#levels.length - 1)];
    const [x0, y0, x1, y1] = this.selected.box;
    if (cells !== this.#cells) this.selected = regions.cellAt(cells, [(x0 + x1) / 2, (y0 + y1) / 2]) ?? cells[0];
  }

  get #cells() {
    return this.#levels.find((cells) => cells.includes(this.selected));
  }

  describe([text]) {
    const { level, row, column } = this.selected;
    const factor = regions.factorOf(regions.parseCells(text), this.selected);
    const strength = factor === 0 ? say("off") : say("strength", { factor: factor.toFixed(2) });
    return say("cell", { level, row, column, strength });
  }

  problem([text]) {
    try {
      regions.parseCells(text);
      return "";
    } catch (error) {
      return error.message;
    }
  }

  cursor() {
    return "ns-resize";
  }

  /** A drag up or down strengthens or weakens a cell; with Shift it gives every cell that it crosses the selected one's factor. */
  press([text], start, reach, { shift }) {
    if (shift) {
      const factor = regions.ownFactor(regions.parseCells(text), this.selected);
      let rules = regions.parseCells(text);
      return ({ point }) => {
        const cell = regions.cellAt(this.#cells, point);
        if (cell) rules = regions.setCell(rules, cell, factor);
        return [regions.formatCells(rules)];
      };
    }
    this.selected = regions.cellAt(this.#cells, start) ?? this.selected;
    return ({ moved, rise }) => (moved ? this.#raised(text, rise / 100) : [text]);
  }

  takes(event) {
    return plain(event) && (event.key in ARROWS || event.key in SIZES || "[]".includes(event.key) || RESETS.includes(event.key));
  }

  key([text], event) {
    if (event.key in ARROWS) this.selected = regions.neighbour(this.#cells, this.selected, ...ARROWS[event.key]);
    else if (event.key === "[") this.choose(this.#levels.indexOf(this.#cells) - 1);
    else if (event.key === "]") this.choose(this.#levels.indexOf(this.#cells) + 1);
    else return this.#raised(text, RESETS.includes(event.key) ? null : 0.05 * SIZES[event.key]);
    return [text];
  }

  #raised(text, amount) {
    return [regions.formatCells(regions.raiseCell(regions.parseCells(text), this.selected, amount))];
  }

  paint(ctx, frame, [text], { editable }) {
    paintLevels(ctx, frame, this.#levels, this.#cells);
    if (!this.problem([text])) paintCells(ctx, frame, this.#cells, regions.parseCells(text), editable ? this.selected : null);
  }
}
