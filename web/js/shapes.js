/** Drawing of many regions on a canvas 2D context: boxes and painted masks in their colours, the selected one on top. */

import { bytesOf, SIDE } from "./list.js";
import { outline, paintHandles, place } from "./paint.js";
import { fitBox } from "./regions.js";

const EDGE = "rgba(0, 0, 0, 0.6)";
const pictures = new WeakMap(); // region -> its mask as a picture
let kept = { key: [], sheet: null }; // the regions that are not selected, as they were drawn last

const corners = (box) => {
  const [x, y, width, height] = fitBox(box);
  return [x, y, x + width, y + height];
};

/** `list` on the picture; the selected region, at `at`, stronger and with handles; `found`: shapes that could be taken. */
export function paintShapes(ctx, frame, list, at, { handles, found }) {
  const others = list.filter((_, index) => index !== at);
  const key = [ctx.canvas.width, ctx.canvas.height, frame.x, frame.width, ctx.getTransform().a, ...others];
  if (key.length !== kept.key.length || key.some((part, index) => part !== kept.key[index])) {
    const sheet = Object.assign(document.createElement("canvas"), { width: ctx.canvas.width, height: ctx.canvas.height });
    const own = sheet.getContext("2d");
    own.setTransform(ctx.getTransform());
    for (const region of others) shape(own, frame, region, 0.22, 1);
    kept = { key, sheet };
  }
  ctx.save();
  ctx.resetTransform();
  ctx.drawImage(kept.sheet, 0, 0);
  ctx.restore();
  const region = list[at];
  if (region) {
    shape(ctx, frame, region, 0.4, 2);
    if (!region.mask) {
      outline(ctx, place(frame, corners(region.box)));
      if (handles) paintHandles(ctx, place(frame, corners(region.box)));
    }
  }
  ctx.save();
  ctx.setLineDash([4, 4]);
  for (const each of found) {
    for (const [style, width] of [[EDGE, 3], ["#fff", 1]]) {
      ctx.strokeStyle = style;
      ctx.lineWidth = width;
      ctx.strokeRect(...place(frame, corners(each.box)));
    }
  }
  ctx.restore();
}

/** Where the keys paint: a ring as large as the brush. */
export function paintPen(ctx, frame, [x, y], radius) {
  ctx.save();
  for (const [style, width] of [[EDGE, 3], ["#fff", 1.5]]) {
    ctx.strokeStyle = style;
    ctx.lineWidth = width;
    ctx.beginPath();
    ctx.arc(frame.x + x * frame.width, frame.y + y * frame.height, Math.max(radius * frame.height, 2), 0, 2 * Math.PI);
    ctx.stroke();
  }
  ctx.restore();
}

function shape(ctx, frame, region, opacity, width) {
  ctx.save();
  if (!region.on) ctx.globalAlpha = 0.3;
  const area = place(frame, region.mask ? [0, 0, 1, 1] : corners(region.box));
  if (region.mask) {
    ctx.globalAlpha *= opacity + 0.15; // a mask has no edge of its own
    ctx.drawImage(picture(region), ...area);
  } else {
    ctx.fillStyle = `${region.colour}${Math.round(opacity * 255).toString(16).padStart(2, "0")}`;
    ctx.fillRect(...area);
    for (const [style, wide] of [[EDGE, width + 2], [region.colour, width]]) {
      ctx.strokeStyle = style;
      ctx.lineWidth = wide;
      ctx.strokeRect(...area);
    }
  }
  ctx.restore();
  name(ctx, frame, region);
}

function picture(region) {
  if (!pictures.has(region)) {
    const sheet = Object.assign(document.createElement("canvas"), { width: SIDE, height: SIDE });
    const ctx = sheet.getContext("2d");
    const image = ctx.createImageData(SIDE, SIDE);
    const [red, green, blue] = [1, 3, 5].map((from) => parseInt(region.colour.slice(from, from + 2), 16));
    const pixel = new Uint32Array(new Uint8ClampedArray([red, green, blue, 255]).buffer)[0];
    const pixels = new Uint32Array(image.data.buffer);
    bytesOf(region).forEach((value, at) => {
      if (value) pixels[at] = pixel;
    });
    ctx.putImageData(image, 0, 0);
    pictures.set(region, sheet);
  }
  return pictures.get(region);
}

/** The name, at the shape's upper left corner. */
function name(ctx, frame, region) {
  const first = region.mask ? region.mask[0] : null; // the first white pixel
  const [x, y] = region.mask ? [(first % SIDE) / SIDE, Math.floor(first / SIDE) / SIDE] : fitBox(region.box);
  if (!region.name || y >= 1) return;
  const [left, top] = place(frame, [x, y, x, y]);
  ctx.save();
  ctx.font = "600 11px sans-serif";
  ctx.textBaseline = "top";
  const room = Math.min(ctx.measureText(region.name).width + 8, frame.x + frame.width - left);
  ctx.globalAlpha = region.on ? 1 : 0.5;
  ctx.fillStyle = "rgba(0, 0, 0, 0.65)";
  ctx.fillRect(left, top, room, 16);
  ctx.fillStyle = region.colour;
  ctx.fillRect(left, top, 3, 16);
  ctx.beginPath();
  ctx.rect(left, top, room, 16);
  ctx.clip();
  ctx.fillStyle = "#fff";
  ctx.fillText(region.name, left + 5, top + 3);
  ctx.restore();
}
