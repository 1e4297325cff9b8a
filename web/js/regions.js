/**
 * Boxes, grids and the text of the cells: the canvas widget's arithmetic, without a DOM.
 *
 * A box is [x, y, width, height], a cell's box [x0, y0, x1, y1], both as shares of the picture's sides. Every function
 * returns something new; none changes what it was given.
 */

import { say } from "./texts.js";

/** The step of the nodes' box widgets: what is dragged lands on values that can also be typed. */
export const STEP = 0.01;
const SMALLEST = 0.02;
export const STRONGEST = 2;

const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
const snap = (value, step = STEP) => Number((Math.round(value / step) * step).toFixed(2));

/** The part of a box that lies in the picture, as the node takes it; at least 2% wide and high, so that it can be held. */
export function fitBox([x, y, width, height]) {
  const side = (start, size) => {
    const from = clamp(snap(start), 0, 1 - SMALLEST);
    return [from, snap(clamp(snap(start + size), from + SMALLEST, 1) - from)];
  };
  const [[left, w], [top, h]] = [side(x, width), side(y, height)];
  return [left, top, w, h];
}

/** The box moved as far as it fits, its size kept. */
export function moveBox(box, dx, dy) {
  const [x, y, width, height] = fitBox(box);
  return [snap(clamp(x + dx, 0, 1 - width)), snap(clamp(y + dy, 0, 1 - height)), width, height];
}

/** The box with the edges named in `handle` (letters of "nsew") moved; an edge stops before the opposite one. */
export function resizeBox(box, handle, dx, dy) {
  const [x, y, width, height] = fitBox(box);
  const edges = { w: x, e: x + width, n: y, s: y + height };
  if (handle.includes("w")) edges.w = clamp(x + dx, 0, edges.e - SMALLEST);
  if (handle.includes("e")) edges.e = clamp(x + width + dx, edges.w + SMALLEST, 1);
  if (handle.includes("n")) edges.n = clamp(y + dy, 0, edges.s - SMALLEST);
  if (handle.includes("s")) edges.s = clamp(y + height + dy, edges.n + SMALLEST, 1);
  return fitBox([edges.w, edges.n, edges.e - edges.w, edges.s - edges.n]);
}

/** The box grown on every side by `amount`, or shrunk by a negative one. */
export function growBox(box, amount) {
  return resizeBox(resizeBox(box, "nw", -amount, -amount), "se", amount, amount);
}

/** The box between two points. */
export function spanBox([ax, ay], [bx, by]) {
  return fitBox([Math.min(ax, bx), Math.min(ay, by), Math.abs(ax - bx), Math.abs(ay - by)]);
}

/** What a pointer at (x, y) holds: the letters of the edges within (reachX, reachY), "move" inside, null outside. */
export function grabBox(box, [x, y], [reachX, reachY]) {
  const [left, top, width, height] = fitBox(box);
  const [right, bottom] = [left + width, top + height];
  if (x < left - reachX || x > right + reachX || y < top - reachY || y > bottom + reachY) return null;
  // Of two edges within reach, the nearer; and a third of the box is left to move it by, however small it is.
  const near = (from, to, reach) => from < to && from <= Math.min(reach, (from + to) / 3);
  const [west, east, north, south] = [x - left, right - x, y - top, bottom - y];
  const vertical = (near(north, south, reachY) && "n") || (near(south, north, reachY) && "s");
  const horizontal = (near(west, east, reachX) && "w") || (near(east, west, reachX) && "e");
  return `${vertical || ""}${horizontal || ""}` || "move";
}

/** Where a picture of this aspect (width / height) lies in a canvas of this size: {x, y, width, height} in its pixels. */
export function frameOf(width, height, aspect, margin = 6) {
  const [roomX, roomY] = [Math.max(width - 2 * margin, 1), Math.max(height - 2 * margin, 1)];
  const w = Math.min(roomX, roomY * aspect);
  const h = w / aspect;
  return { x: (width - w) / 2, y: (height - h) / 2, width: w, height: h };
}

/**
 * The levels to draw, coarse to fine, each a list of cells {level, row, column, box}.
 *
 * `layout` is [[rows, columns, tokens], ...]; `cells`, where the levels are no plain grids, is
 * [[level, row, column, x0, y0, x1, y1], ...] and then says all. Without either: 1x1, 2x2, 4x4.
 */
export function levelsOf(layout, cells) {
  if (Array.isArray(cells) && cells.length) {
    const levels = Array.from({ length: Math.max(...cells.map(([level]) => level)) + 1 }, () => []);
    for (const [level, row, column, ...box] of cells) levels[level].push({ level, row, column, box });
    return levels.filter((level) => level.length);
  }
  const whole = (count) => Number.isInteger(count) && count > 0 && count <= 64;
  const known = Array.isArray(layout) && layout.length && layout.every((grid) => whole(grid?.[0]) && whole(grid?.[1]));
  return (known ? layout : [[1, 1], [2, 2], [4, 4]]).map(([rows, columns], level) =>
    Array.from({ length: rows * columns }, (_, at) => {
      const [row, column] = [Math.floor(at / columns), at % columns];
      return { level, row, column, box: [column / columns, row / rows, (column + 1) / columns, (row + 1) / rows] };
    }),
  );
}

/** The cell of one level under a point, the smallest where several lie there, or null. */
export function cellAt(cells, [x, y]) {
  const area = ({ box: [x0, y0, x1, y1] }) => (x1 - x0) * (y1 - y0);
  const under = cells.filter(({ box: [x0, y0, x1, y1] }) => x >= x0 && x <= x1 && y >= y0 && y <= y1);
  return under.reduce((best, cell) => (best && area(best) <= area(cell) ? best : cell), null);
}

/** The next cell of the level in a direction, or the cell itself at the edge. */
export function neighbour(cells, cell, dx, dy) {
  const steps = (other) => [(other.column - cell.column) * dx + (other.row - cell.row) * dy,
    Math.abs(dx ? other.row - cell.row : other.column - cell.column)];
  const ahead = cells.filter((other) => steps(other)[0] > 0);
  ahead.sort((a, b) => steps(a)[1] - steps(b)[1] || steps(a)[0] - steps(b)[0]);
  return ahead[0] ?? cell;
}

const nameOf = ({ level, row, column }) => `${level}:${row},${column}`;
const RULE = /^(?:(\*)|(\d+)(?:\s*:\s*(\d+)\s*,\s*(\d+))?)\s*=\s*(\d+\.?\d*|\.\d+)$/;

/**
 * "1:0,1=0.5; 2=0.7; *=1.2" as a Map from "1:0,1", "2" and "*" to factors: what kernels/cells.py's parse_cells reads.
 *
 * Throws an Error in one sentence about the first piece that cannot be read, or that says again what another says.
 */
export function parseCells(text) {
  const rules = new Map();
  for (const piece of text.split(";").map((part) => part.trim())) {
    if (!piece) continue;
    const [, all, level, row, column, factor] = RULE.exec(piece) ?? [];
    if (factor === undefined || factor > STRONGEST) {
      throw new Error(say("unreadable", { piece, most: STRONGEST }));
    }
    const name = all ?? (row === undefined ? String(+level) : nameOf({ level: +level, row: +row, column: +column }));
    if (rules.has(name)) throw new Error(say("twice", { piece, name }));
    rules.set(name, +factor);
  }
  return rules;
}

/** The text of such a Map: everything first, then whole levels, then cells. */
export function formatCells(rules) {
  const rank = (name) => (name === "*" ? [-1] : [Number(name.includes(":")), ...name.split(/[:,]/).map(Number)]);
  const order = (a, b) => {
    const [left, right] = [rank(a), rank(b)];
    const at = left.findIndex((value, index) => value !== right[index]);
    return at < 0 ? 0 : left[at] - (right[at] ?? -1);
  };
  return [...rules.keys()].sort(order).map((name) => `${name}=${rules.get(name)}`).join("; ");
}

/** What a cell counts for: the product of its own factor, its level's and everything's. */
export function factorOf(rules, cell) {
  return [nameOf(cell), String(cell.level), "*"].reduce((product, name) => product * (rules.get(name) ?? 1), 1);
}

/** The rules with this own factor of a cell. */
export function setCell(rules, cell, factor) {
  const changed = new Map(rules);
  if (factor === 1) changed.delete(nameOf(cell));
  else changed.set(nameOf(cell), factor);
  return changed;
}

/** A cell's own factor, without its level's and everything's. */
export const ownFactor = (rules, cell) => rules.get(nameOf(cell)) ?? 1;

/** The rules with a cell's own factor raised by `amount`, in steps of 0.05; null takes it away. */
export function raiseCell(rules, cell, amount) {
  return setCell(rules, cell, amount === null ? 1 : snap(clamp(ownFactor(rules, cell) + amount, 0, STRONGEST), 0.05));
}
