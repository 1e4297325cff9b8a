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

const place = (frame, [x0, y0, x1, y1]) => {
  const [left, top] = [Math.round(frame.x + x0 * frame.width), Math.round(frame.y + y0 * frame.height)];
  return [left, top, Math.round(frame.x + x1 * frame.width) - left, Math.round(frame.y + y1 * frame.height) - top];
};

/** The picture, or a plain ground in the theme's ink where there is none. */
export function paintGround(ctx, frame, picture, ink) {
  const whole = place(frame, [0, 0, 1, 1]);
  if (picture) {
    ctx.drawImage(picture, ...whole);
    return;
  }
  ctx.save();
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

/** The chosen box: the rest of the picture dimmed, handles on the edges and corners while it can be dragged. */
export function paintBox(ctx, frame, box, handles) {
  const [x, y, width, height] = fitBox(box);
  const inside = place(frame, [x, y, x + width, y + height]);
  ctx.save();
  ctx.beginPath();
  ctx.rect(...place(frame, [0, 0, 1, 1]));
  ctx.rect(...inside);
  ctx.fillStyle = "rgba(0, 0, 0, 0.45)";
  ctx.fill("evenodd");
  outline(ctx, inside);
  if (handles) {
    ctx.lineWidth = 1;
    ctx.fillStyle = "#fff";
    ctx.strokeStyle = EDGE;
    const [left, top, w, h] = inside;
    for (const across of [0, 0.5, 1]) {
      for (const down of [0, 0.5, 1]) {
        if (across === 0.5 && down === 0.5) continue;
        const corner = [Math.round(left + across * w) - 3.5, Math.round(top + down * h) - 3.5, 7, 7];
        ctx.fillRect(...corner);
        ctx.strokeRect(...corner);
      }
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

function outline(ctx, area) {
  for (const [style, width] of [[EDGE, 4], [ACCENT, 2]]) {
    ctx.strokeStyle = style;
    ctx.lineWidth = width;
    ctx.strokeRect(...area);
  }
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
