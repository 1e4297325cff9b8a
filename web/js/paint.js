/**
 * Drawing on a canvas 2D context. Sizes are in CSS pixels, boxes in shares of the picture, `frame` is where that lies.
 *
 * Lines over a picture are light on a dark edge, so that they show on any picture and in any theme. Tints are orange for
 * more and blue for less, as Preview Embedding has them (Okabe and Ito's, told apart with every kind of colour vision), and a number says the same.
 */

import { factorOf, fitBox } from "./regions.js";
import { say } from "./texts.js";

const ACCENT = "#56b4e9";
const MORE = "230, 159, 0";
const LESS = "0, 114, 178";
const EDGE = "rgba(0, 0, 0, 0.6)";

export const place = (frame, [x0, y0, x1, y1]) => {
  const [left, top] = [Math.round(frame.x + x0 * frame.width), Math.round(frame.y + y0 * frame.height)];
  return [left, top, Math.round(frame.x + x1 * frame.width) - left, Math.round(frame.y + y1 * frame.height) - top];
};

/** The picture, or a plain ground in the theme's ink where there is none. */
export function paintGround(ctx, frame, picture, { ink, paper }) {
  const whole = place(frame, [0, 0, 1, 1]);
  if (picture) {
    ctx.drawImage(picture, ...whole);
    return;
  }
  ctx.save();
  ctx.fillStyle = paper;
  ctx.fillRect(...whole);
  ctx.fillStyle = ctx.strokeStyle = ink;
  ctx.globalAlpha = 0.08;
  ctx.fillRect(...whole);
  ctx.globalAlpha = 0.35;
  ctx.strokeRect(...whole);
  ctx.restore();
}

/** The borders of all cells, the coarser the thicker; `bright` is the level that is worked on. */
export function paintLevels(ctx, frame, levels, bright = null) {
  ctx.save();
  levels.forEach((cells, depth) => {
    const width = Math.max(2.5 - 0.75 * depth, 1);
    const strength = bright === null || bright === cells ? 0.8 : 0.3;
    for (const [style, wide] of [[`rgba(0, 0, 0, ${strength / 2})`, width + 1.5], [`rgba(255, 255, 255, ${strength})`, width]]) {
      ctx.strokeStyle = style;
      ctx.lineWidth = wide;
      for (const { box } of cells) ctx.strokeRect(...place(frame, box));
    }
  });
  ctx.restore();
}

/**
 * What a region will show: another picture where it stands in its own frame, or `shrunk` into the region's box.
 *
 * A region is {box: [x0, y0, x1, y1], mask}, the mask an image that is as opaque as the region is strong, or none: the box.
 */
export function paintInside(ctx, frame, region, { other, shrunk, ...theme }) {
  const [x, y, width, height] = place(frame, region.box);
  layer(ctx, (sheet) => {
    paintGround(sheet, shrunk ? { x, y, width, height } : frame, other, theme);
    sheet.globalCompositeOperation = "destination-in";
    fill(sheet, frame, region);
  });
}

/** The chosen region: the rest of the picture dimmed, an edge, and handles on that of a box while it can be dragged. */
export function paintRegion(ctx, frame, region, handles) {
  layer(ctx, (sheet) => {
    sheet.fillStyle = "rgba(0, 0, 0, 0.45)";
    sheet.fillRect(...place(frame, [0, 0, 1, 1]));
    sheet.globalCompositeOperation = "destination-out";
    fill(sheet, frame, region);
  });
  if (region.mask) {
    for (const [style, width] of [[EDGE, 2.5], [ACCENT, 1.5]]) layer(ctx, (sheet) => rim(sheet, frame, region, style, width));
    return;
  }
  const inside = place(frame, region.box);
  outline(ctx, inside);
  if (handles) paintHandles(ctx, inside);
}

export function paintHandles(ctx, [left, top, width, height]) {
  ctx.save();
  ctx.lineWidth = 1;
  ctx.fillStyle = "#fff";
  ctx.strokeStyle = EDGE;
  for (const across of [0, 0.5, 1]) {
    for (const down of [0, 0.5, 1]) {
      if (across === 0.5 && down === 0.5) continue;
      const corner = [Math.round(left + across * width) - 3.5, Math.round(top + down * height) - 3.5, 7, 7];
      ctx.fillRect(...corner);
      ctx.strokeRect(...corner);
    }
  }
  ctx.restore();
}

/** One level's cells tinted by their factors; a number where it is not 1 and on the selected cell. */
export function paintCells(ctx, frame, cells, rules, selected) {
  ctx.save();
  for (const cell of cells) {
    const factor = factorOf(rules, cell);
    const area = place(frame, cell.box);
    if (factor === 0) hatch(ctx, area);
    else if (factor !== 1) {
      ctx.fillStyle = `rgba(${factor > 1 ? MORE : LESS}, ${0.15 + 0.45 * Math.min(Math.abs(factor - 1), 1)})`;
      ctx.fillRect(...area);
    }
    if (factor !== 1 || cell === selected) label(ctx, area, factor === 0 ? say("off") : factor.toFixed(2));
  }
  if (selected) outline(ctx, place(frame, selected.box));
  ctx.restore();
}

/** Draw on a sheet of its own, whose compositing leaves alone what is there, and lay it on top. */
function layer(ctx, draw) {
  const sheet = Object.assign(document.createElement("canvas"), { width: ctx.canvas.width, height: ctx.canvas.height });
  const own = sheet.getContext("2d");
  own.setTransform(ctx.getTransform());
  draw(own);
  ctx.save();
  ctx.resetTransform();
  ctx.drawImage(sheet, 0, 0);
  ctx.restore();
}

function fill(ctx, frame, { box, mask }) {
  ctx.fillStyle = "#000";
  if (mask) ctx.drawImage(mask, ...place(frame, [0, 0, 1, 1]));
  else ctx.fillRect(...place(frame, box));
}

/** The line around a mask: all that lies at most `width` outside it. */
function rim(ctx, frame, region, style, width) {
  for (let turn = 0; turn < 8; turn++) {
    const [x, y] = [frame.x + width * Math.cos((turn * Math.PI) / 4), frame.y + width * Math.sin((turn * Math.PI) / 4)];
    ctx.drawImage(region.mask, x, y, frame.width, frame.height);
  }
  ctx.globalCompositeOperation = "source-in";
  ctx.fillStyle = style;
  ctx.fillRect(frame.x - width, frame.y - width, frame.width + 2 * width, frame.height + 2 * width);
  ctx.globalCompositeOperation = "destination-out";
  fill(ctx, frame, region);
}

export function outline(ctx, area) {
  ctx.save();
  for (const [style, width] of [[EDGE, 4], [ACCENT, 2]]) {
    ctx.strokeStyle = style;
    ctx.lineWidth = width;
    ctx.strokeRect(...area);
  }
  ctx.restore();
}

function hatch(ctx, [x, y, width, height]) {
  ctx.save();
  ctx.beginPath();
  ctx.rect(x, y, width, height);
  ctx.clip();
  ctx.fillStyle = "rgba(0, 0, 0, 0.65)";
  ctx.fillRect(x, y, width, height);
  ctx.strokeStyle = `rgba(${LESS}, 0.8)`;
  ctx.lineWidth = 1;
  ctx.beginPath();
  for (let start = x - height; start < x + width; start += 8) {
    ctx.moveTo(start, y + height);
    ctx.lineTo(start + height, y);
  }
  ctx.stroke();
  ctx.restore();
}

function label(ctx, [x, y, width, height], text) {
  const size = Math.min(12, height - 4, width / 2.5);
  if (size < 6) return; // the tint alone, where no number could be read
  ctx.font = `600 ${size}px sans-serif`;
  ctx.textAlign = "center";
  ctx.textBaseline = "middle";
  const room = ctx.measureText(text).width + size;
  ctx.fillStyle = "rgba(0, 0, 0, 0.65)";
  ctx.fillRect(x + (width - room) / 2, y + (height - size * 1.5) / 2, room, size * 1.5);
  ctx.fillStyle = "#fff";
  ctx.fillText(text, x + width / 2, y + height / 2);
}
