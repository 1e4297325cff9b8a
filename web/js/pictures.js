/** Which pictures a canvas is drawn on: those that the page already shows above a node, and those that a run has left. */

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { slotOutside } from "./faces.js";

/** What a node has shown: {images: [{filename, subfolder, type}], ...}; the page also notes an image loader's file there. */
export function outputOf(node) {
  const graph = node.graph;
  const inside = graph?.rootGraph && graph.rootGraph !== graph; // a subgraph's nodes are noted under its id as well
  return app.nodeOutputs?.[inside ? `${graph.id}:${node.id}` : node.id];
}

/** Whether something is connected to the input of this name, a widget's or not; seen from the face, if there is one. */
export function isLinked(node, name, face = null) {
  const slot = slotOf(node, name);
  if (!node.graph || slot < 0 || !node.isInputConnected?.(slot)) return false;
  const outside = face ? slotOutside(node, slot) : -1;
  return outside < 0 || Boolean(face.isInputConnected(outside));
}

/** The pictures above these inputs of a node, input by input, the nearest of each first: files, or images of the page. */
export function* picturesAbove(node, names, face = null) {
  for (const name of names) {
    for (const [origin, slot] of above(node, slotOf(node, name), face)) {
      for (const shower of [origin, ...showersOf(origin, slot)]) {
        const file = outputOf(shower)?.images?.[0];
        if (file) yield file;
      }
      const drawn = origin.imgs?.[origin.imageIndex ?? 0];
      if (drawn?.naturalWidth) yield drawn;
    }
  }
}

/** The pictures that came of a node in the last run, the nearest first; not those that our own nodes draw of embeddings. */
export function* picturesBelow(node, face = null) {
  const met = new Set(face ? [node, face] : [node]);
  for (const from of met) {
    const file = from.type?.startsWith("SDA") ? null : outputOf(from)?.images?.[0];
    if (file) yield file;
    from.outputs?.forEach((_, slot) => from.getOutputNodes?.(slot)?.forEach((next) => met.add(next)));
  }
}

/** A function that gives the first of some pictures that can be drawn, or null; `redraw` is called when one has come. */
export function pictureFinder(redraw) {
  let loaded = new Map(); // address -> image, null where it is none
  let shown = null;

  function load(file) {
    if (file instanceof Image) return file;
    const address = api.apiURL(`/view?${new URLSearchParams(file)}`);
    if (!loaded.has(address)) {
      const image = new Image();
      image.onload = redraw;
      image.onerror = () => {
        loaded.set(address, null);
        redraw();
      };
      image.src = address;
      loaded.set(address, image);
    }
    return loaded.get(address);
  }

  return (pictures) => {
    for (const picture of pictures) {
      const image = load(picture);
      if (!image) continue;
      if (!image.complete) return shown; // what was there, until the new one has come
      if (!image.naturalWidth) continue;
      shown = image;
      loaded = new Map([...loaded].filter(([, kept]) => kept === image || kept === null));
      return shown;
    }
    return (shown = null);
  };
}

function slotOf(node, name) {
  return node.inputs?.findIndex((input) => (input.widget?.name ?? input.name) === name) ?? -1;
}

/** The nodes above one input, with the output that led to each: a node is met once for every output that is used of it. */
function* above(node, slot, face) {
  const met = new Set();
  const queue = [[node, slot]];
  for (const [from, at] of queue) {
    const outside = face && from.graph === face.subgraph ? slotOutside(from, at) : -1;
    if (outside >= 0) queue.push([face, outside]);
    const link = from.graph && at >= 0 ? from.getInputLink?.(at) : null;
    const origin = link ? from.getInputNode(at) : null;
    const output = origin && `${origin.graph?.id} ${origin.id} ${link.origin_slot}`;
    if (!origin || met.has(output)) continue;
    met.add(output);
    yield [origin, link.origin_slot];
    origin.inputs?.forEach((_, next) => queue.push([origin, next]));
  }
}

/** The nodes that show the very picture that this output gives. */
function showersOf(origin, slot) {
  if (origin.outputs?.[slot]?.type !== "IMAGE") return [];
  return (origin.getOutputNodes?.(slot) ?? []).filter(({ type }) => type === "PreviewImage" || type === "SaveImage");
}
