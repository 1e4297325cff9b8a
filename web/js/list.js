/**
 * The list of regions as text and as objects, and the painted masks in it: arithmetic without a DOM.
 *
 * The text is what kernels/region_list.py reads: {"version": 1, "regions": [{name, colour, on, box or mask, ...}]}. A mask is
 * the lengths of its runs, black first, on a grid of SIDE x SIDE over the whole picture; here it is also a Uint8Array of 0 and
 * 1. Regions are never changed: every function returns new ones, so that what is drawn of the others can be kept.
 */

import { fitBox } from "./regions.js";
import { say } from "./texts.js";

export const SIDE = 256;
export const MOST = 64;
const LONGEST = 2 ** 20;
const COLOURS = ["#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#f0e442", "#0072b2", "#d55e00", "#999999"]; // Okabe and Ito's
const DEFAULTS = {
  name: "", colour: COLOURS[0], on: true, box: null, mask: null, feather: 0, speaks: 0, placed: false, prompt: "", strength: 1,
  balance: 0, start: 0, end: 1, mode: "replace",
};
const LIMITS = { feather: [0, 1], strength: [0, 2], balance: [-1, 1], start: [0, 1], end: [0, 1], speaks: [0, 16] };

/** The regions of a text, with all their fields. An Error in one sentence for a text that is no such list. */
export function parseList(text) {
  if (!text.trim()) return [];
  const broken = (why) => new Error(say("listBroken", { why }));
  if (text.length > LONGEST) throw broken(`> ${LONGEST}`);
  let value;
  try {
    value = JSON.parse(text);
  } catch {
    throw broken("JSON");
  }
  const { version = 1, regions = [] } = value ?? {};
  if (version !== 1) throw broken(`version ${JSON.stringify(version)?.slice(0, 20)}`);
  if (!Array.isArray(regions) || regions.length > MOST) throw broken(`regions > ${MOST}`);
  return regions.map((region, at) => {
    const wrong = wrongField(region);
    if (wrong) throw broken(`regions.${at}.${wrong}`);
    return { ...DEFAULTS, ...region };
  });
}

/** The first field of a region that is not what it must be, or null. */
function wrongField(region) {
  if (typeof region !== "object" || !region || Array.isArray(region)) return "?";
  for (const [name, value] of Object.entries(region)) {
    const kept = DEFAULTS[name];
    if (kept === undefined) return name.slice(0, 20);
    if (name === "box" || name === "mask") continue;
    if (typeof value !== typeof kept) return name;
    const [low, high] = LIMITS[name] ?? [];
    if (typeof value === "number" && !(value >= low && value <= high)) return name;
  }
  const { box, mask, colour = DEFAULTS.colour, mode = DEFAULTS.mode } = region;
  if (!box && !mask) return "box";
  if (box && !(Array.isArray(box) && box.length === 4 && box.every((side) => typeof side === "number" && side >= 0 && side <= 1))) return "box";
  if (mask && !(Array.isArray(mask) && mask.every((run) => Number.isInteger(run) && run >= 0))) return "mask";
  if (mask && mask.reduce((sum, run) => sum + run, 0) !== SIDE * SIDE) return "mask";
  if (!/^#[0-9a-f]{6}$/.test(colour)) return "colour";
  return ["replace", "join"].includes(mode) ? null : "mode";
}

/** The text of such regions, without what is as it is anyway; "" without any. */
export function formatList(regions) {
  if (!regions.length) return "";
  const said = (region) => Object.fromEntries(Object.entries(region).filter(([name, value]) => value !== DEFAULTS[name]));
  return JSON.stringify({ version: 1, regions: regions.map(said) });
}

/** A new region of this shape, {box} or {mask}, named and coloured unlike the others. */
export function newRegion(regions, shape) {
  const taken = new Set(regions.map(({ colour }) => colour));
  const names = new Set(regions.map(({ name }) => name));
  let number = regions.length + 1;
  while (names.has(say("regionName", { number }))) number += 1;
  const colour = COLOURS.find((each) => !taken.has(each)) ?? COLOURS[regions.length % COLOURS.length];
  return { ...DEFAULTS, colour, name: say("regionName", { number }), ...shape };
}

/** The list with the region at a place changed, taken out, or moved by a number of places. */
export const changed = (regions, at, change) => regions.map((region, place) => (place === at ? { ...region, ...change } : region));
export const without = (regions, at) => regions.filter((_, place) => place !== at);
export function moved(regions, at, by) {
  const to = Math.min(Math.max(at + by, 0), regions.length - 1);
  const rest = without(regions, at);
  rest.splice(to, 0, regions[at]);
  return rest;
}

/** The bytes of runs. */
export function readMask(runs) {
  const bytes = new Uint8Array(SIDE * SIDE);
  let from = 0;
  runs.forEach((run, at) => {
    if (at % 2) bytes.fill(1, from, from + run);
    from += run;
  });
  return bytes;
}

/** The runs of bytes. */
export function writeMask(bytes) {
  const runs = [];
  let [from, value] = [0, 0];
  while (from < bytes.length) {
    const next = bytes.indexOf(1 - value, from);
    const to = next < 0 ? bytes.length : next;
    runs.push(to - from);
    [from, value] = [to, 1 - value];
  }
  return runs;
}

/** The bytes of a region's shape: of its mask, else of the pixels whose middle lies in its box. */
export function bytesOf({ box, mask }) {
  if (mask) return readMask(mask);
  const bytes = new Uint8Array(SIDE * SIDE);
  const [x, y, width, height] = fitBox(box);
  const [left, right, top, bottom] = [x, x + width, y, y + height].map((side) => Math.round(side * SIDE));
  for (let row = top; row < bottom; row++) bytes.fill(1, row * SIDE + left, row * SIDE + right);
  return bytes;
}

/** [x, y, width, height] around what is white, or null where nothing is. */
export function boxOf(bytes) {
  let [left, top, right, bottom] = [SIDE, SIDE, -1, -1];
  for (let at = bytes.indexOf(1); at >= 0; at = bytes.indexOf(1, at + 1)) {
    const [row, column] = [Math.floor(at / SIDE), at % SIDE];
    left = Math.min(left, column);
    right = Math.max(right, column);
    top = Math.min(top, row);
    bottom = row;
  }
  return right < 0 ? null : [left, top, right + 1 - left, bottom + 1 - top].map((side) => side / SIDE);
}

/**
 * Paint `value` into the bytes along a line with a round brush. Points and radius are shares, the radius of the picture's
 * height; aspect is its width / height, for the grid is square and the picture need not be.
 */
export function paintLine(bytes, [ax, ay], [bx, by], radius, aspect, value) {
  const [rx, ry] = [Math.max((radius * SIDE) / aspect, 0.5), Math.max(radius * SIDE, 0.5)];
  const from = [ax * SIDE, ay * SIDE];
  const way = [(bx - ax) * SIDE, (by - ay) * SIDE];
  const [lowX, highX] = [Math.min(ax, bx) * SIDE - rx, Math.max(ax, bx) * SIDE + rx];
  const [lowY, highY] = [Math.min(ay, by) * SIDE - ry, Math.max(ay, by) * SIDE + ry];
  const long = (way[0] / rx) ** 2 + (way[1] / ry) ** 2;
  for (let row = Math.max(Math.floor(lowY), 0); row < Math.min(Math.ceil(highY), SIDE); row++) {
    for (let column = Math.max(Math.floor(lowX), 0); column < Math.min(Math.ceil(highX), SIDE); column++) {
      // In units of the brush: how far is the pixel's middle from the nearest point of the line?
      const [px, py] = [(column + 0.5 - from[0]) / rx, (row + 0.5 - from[1]) / ry];
      const along = long ? Math.min(Math.max((px * way[0]) / rx / long + (py * way[1]) / ry / long, 0), 1) : 0;
      if (Math.hypot(px - (along * way[0]) / rx, py - (along * way[1]) / ry) <= 1) bytes[row * SIDE + column] = value;
    }
  }
  return bytes;
}

/** The bytes moved by shares of the picture; what leaves it is lost. */
export function shiftMask(bytes, dx, dy) {
  const [across, down] = [Math.round(dx * SIDE), Math.round(dy * SIDE)];
  const made = new Uint8Array(SIDE * SIDE);
  for (let row = Math.max(down, 0); row < Math.min(SIDE + down, SIDE); row++) {
    const from = (row - down) * SIDE;
    const line = bytes.subarray(from + Math.max(-across, 0), from + Math.min(SIDE - across, SIDE));
    made.set(line, row * SIDE + Math.max(across, 0));
  }
  return made;
}

/** A box whose sides lie on the lines of the quadtree (quarters of the picture) where they are within reach of one. */
export function snapBox(box, [reachX, reachY]) {
  const near = (value, reach) => {
    const line = Math.round(value * 4) / 4;
    return Math.abs(value - line) <= reach ? line : value;
  };
  const [x, y, width, height] = box;
  const [left, right] = [near(x, reachX), near(x + width, reachX)];
  const [top, bottom] = [near(y, reachY), near(y + height, reachY)];
  return fitBox([left, top, right - left, bottom - top]);
}
