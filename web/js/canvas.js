/**
 * The extension: gives four nodes the canvas widget. Their own widgets keep the values, so a workflow is the same with and
 * without this file, and where the page lacks something that is used here, those widgets are simply all there is.
 */

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { Editor } from "./editor.js";
import { levelsOf } from "./regions.js";
import { say, speak } from "./texts.js";
import { BoxTool, CellTool } from "./tools.js";

const BOX = { Tool: BoxTool, names: ["x", "y", "width", "height"] };
const NODES = {
  SDACompose: BOX,
  SDAPlace: BOX,
  SDARegionalPrompt: BOX,
  SDAStrength: { Tool: CellTool, names: ["cells"] },
};
const WIDGET = "sda_canvas";
const HEIGHT = 320; // the editor's least height and the page's margins around it
const WIDTH = 340;

const editors = new Set();

app.registerExtension({
  name: "SemanticDiffusionAdapter.Canvas",
  async init() {
    speak(await api.getCustomNodesI18n?.(), app.extensionManager?.setting?.get("Comfy.Locale"));
  },
  setup() {
    const redraw = () => editors.forEach((editor) => editor.draw());
    api.addEventListener("executed", redraw); // new pictures
    api.addEventListener("graphChanged", redraw); // new links, another file in an image loader
  },
  nodeCreated(node) {
    const kind = NODES[node.comfyClass ?? node.constructor?.comfyClass];
    if (!kind || typeof node.addDOMWidget !== "function") return;
    try {
      attach(node, kind);
    } catch (error) {
      console.warn("semantic diffusion: no canvas on", node.title, error);
    }
  },
});

function attach(node, { Tool, names }) {
  const widgets = names.map((name) => node.widgets?.find((widget) => widget.name === name));
  if (!widgets.every(Boolean)) return;
  const read = () => widgets.map(({ value }) => (Tool === BoxTool ? Number(value) || 0 : String(value ?? "")));
  const findPicture = pictureFinder(node, () => editor.draw());
  let output = null; // of the last run
  const seen = () => output ?? outputOf(node);

  const editor = new Editor(new Tool(read()), {
    read,
    write(state) {
      widgets.forEach((widget, at) => {
        if (widget.value === state[at]) return;
        widget.value = state[at];
        widget.callback?.(state[at], app.canvas, node);
      });
      node.setDirtyCanvas?.(true, true);
    },
    /** Tell the page's own undo and its unsaved mark. */
    commit() {
      app.canvas?.emitBeforeChange?.();
      app.canvas?.emitAfterChange?.();
    },
    locked() {
      const linked = (name) => node.inputs?.some((input) => input.link != null && (input.widget?.name ?? input.name) === name);
      if (names.some(linked)) return say("connected");
      return Tool === BoxTool && linked("mask") ? say("masked") : "";
    },
    levels: () => levelsOf(seen()?.layout, seen()?.cells),
    picture: () => findPicture(seen()?.images?.[0]),
    forward: (name, event) => app.canvas?.[name]?.(event),
  });

  const widget = node.addDOMWidget(WIDGET, WIDGET, editor.element, { serialize: false, getMinHeight: () => HEIGHT });
  widget.serialize = false; // neither in the workflow (this line) nor in the prompt (the option)
  const [width, height] = node.computeSize?.() ?? node.size;
  node.setSize?.([Math.max(width, node.size[0], WIDTH), Math.max(height, node.size[1])]);

  for (const each of widgets) after(each, "callback", () => editor.draw()); // typed by hand
  for (const event of ["onConfigure", "onConnectionsChange"]) after(node, event, () => editor.draw());
  after(node, "onExecuted", (message) => {
    output = message;
    editor.draw();
  });
  after(node, "onAdded", () => editors.add(editor));
  after(node, "onRemoved", () => editors.delete(editor));
}

function after(object, method, act) {
  const before = object[method];
  object[method] = function (...args) {
    const result = before?.apply(this, args);
    act(...args);
    return result;
  };
}

/** What a node has shown: {images: [{filename, subfolder, type}], ...}; the page also notes an image loader's file there. */
function outputOf(node) {
  const graph = node.graph;
  const inside = graph?.rootGraph && graph.rootGraph !== graph; // a subgraph's nodes are noted under its id as well
  return app.nodeOutputs?.[inside ? `${graph.id}:${node.id}` : node.id];
}

/** The nodes above this one with the output that led to each, input by input, the nearest of each first. */
function* above(node) {
  const met = new Set([node]);
  for (let first = 0; first < (node.inputs?.length ?? 0); first++) {
    const queue = [[node, first]];
    for (const [from, slot] of queue) {
      const origin = from.graph && from.inputs[slot].link != null ? from.getInputNode?.(slot) : null;
      if (!origin || met.has(origin)) continue;
      met.add(origin);
      yield [origin, from.getInputLink?.(slot)?.origin_slot];
      (origin.inputs ?? []).forEach((_, at) => queue.push([origin, at]));
    }
  }
}

/** The nodes that show the very picture that this output gives. */
function showersOf(origin, slot) {
  if (origin.outputs?.[slot]?.type !== "IMAGE") return [];
  return (origin.getOutputNodes?.(slot) ?? []).filter(({ type }) => type === "PreviewImage" || type === "SaveImage");
}

/** A function that gives the picture to draw on: the node's own if there is one, else the nearest above it, else null. */
function pictureFinder(node, redraw) {
  let loaded = new Map(); // address -> image, null where it is none
  let shown = null;

  function load(file) {
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

  function* candidates(own) {
    if (own) yield load(own);
    for (const [origin, slot] of above(node)) {
      for (const shower of [origin, ...showersOf(origin, slot)]) {
        const file = outputOf(shower)?.images?.[0];
        if (file) yield load(file);
      }
      const drawn = origin.imgs?.[origin.imageIndex ?? 0];
      if (drawn?.naturalWidth) yield drawn;
    }
  }

  return (own) => {
    for (const image of candidates(own)) {
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
