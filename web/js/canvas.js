/**
 * The extension: gives five nodes the canvas widget. Their own widgets keep the values, so a workflow is the same with and
 * without this file, and where the page lacks something that is used here, those widgets are simply all there is.
 */

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { Editor } from "./editor.js";
import { inside } from "./faces.js";
import { connectedOf, growing } from "./grow.js";
import { RegionsTool } from "./layers.js";
import { Panel } from "./panel.js";
import { isLinked, outputOf, pictureFinder, picturesAbove, picturesBelow } from "./pictures.js";
import { levelsOf } from "./regions.js";
import { say, speak } from "./texts.js";
import { BoxTool, CellTool } from "./tools.js";

// `ground`: the inputs above which the picture is looked for, `other`: the one whose picture will be inside the box.
const BOX = { tool: BoxTool, widgets: ["x", "y", "width", "height"], ground: ["image", "embedding"] };
const NODES = {
  SDACompose: { ...BOX, other: "other" },
  SDAPlace: { ...BOX, other: "other", shrunk: true },
  SDARegionalPrompt: { ...BOX, ground: [...BOX.ground, "mask"] },
  SDARegions: { tool: RegionsTool, widgets: ["regions"], ground: ["image", "embedding"], panel: Panel },
  SDAStrength: { tool: CellTool, widgets: ["cells"], ground: ["embedding"] },
};
const WIDGET = "sda_canvas";
const WIDTH = 340;

const editors = new Set();
const onFaces = new WeakMap(); // subgraph's node -> [the canvas that we put on its face, its editor]
const left = new Map(); // place -> the editor of a node that was taken away: the page's undo puts another node there

app.registerExtension({
  name: "SemanticDiffusionAdapter.Canvas",
  async init() {
    speak(await api.getCustomNodesI18n?.(), app.extensionManager?.setting?.get("Comfy.Locale"));
  },
  setup() {
    const redraw = () => editors.forEach((editor) => editor.draw());
    api.addEventListener("executed", redraw); // new pictures
    api.addEventListener("graphChanged", () => {
      redraw(); // new links, another file in an image loader, something to undo
      const root = app.rootGraph ?? app.graph; // what stands on a face was changed inside, where the page may be now
      for (const graph of [root, ...(root?.subgraphs?.values() ?? [])]) graph?.nodes.forEach(dress);
    });
  },
  nodeCreated: dress,
});

const kindOf = (node) => NODES[node.comfyClass ?? node.constructor?.comfyClass];

/** Give a canvas to a node of ours, or to a subgraph as long as such a node's widgets stand on its face. */
function dress(node) {
  if (typeof node.addDOMWidget !== "function") return;
  try {
    const kind = kindOf(node);
    const within = kind ? null : inside(node, (each) => kindOf(each)?.widgets);
    const there = node.widgets?.some(({ name }) => name === WIDGET); // on some pages a canvas from inside, by their own means
    if (!there && kind) attach(node, kind);
    else if (!there && within) attach(within.node, kindOf(within.node), node, within.find);
    else if (!kind && !within) undress(node);
  } catch (error) {
    console.warn("semantic diffusion: no canvas on", node.title, error);
  }
}

function undress(face) {
  const [widget, editor] = onFaces.get(face) ?? [];
  if (!widget) return;
  onFaces.delete(face);
  editor.leave();
  editors.delete(editor);
  face.removeWidget?.(widget);
}

/** A canvas for a node, on its own face or on that of the subgraph that it is in. */
function attach(node, kind, face = node, find = (name) => node.widgets?.find((widget) => widget.name === name)) {
  const { tool: Tool, widgets: names, ground, other, shrunk, panel } = kind;
  const widgets = () => names.map(find);
  if (!widgets().every(Boolean)) return;
  const outer = face === node ? null : face;
  const read = () => widgets().map((widget) => (Tool === BoxTool ? Number(widget?.value) || 0 : String(widget?.value ?? "")));
  const [findGround, findOther, findMask] = [0, 1, 2].map(() => pictureFinder(() => editor.draw()));
  let output = null; // of the last run
  const seen = () => output ?? outputOf(node) ?? {};
  const masked = () => Tool === BoxTool && ["mask", "bboxes"].some((name) => isLinked(node, name, outer));
  const connected = () => masked() || names.some((name) => isLinked(node, name, outer));
  const region = () => (connected() ? regionOf(seen(), masked(), findMask) : undefined);

  const editor = new Editor(new Tool(read()), {
    read,
    write(state) {
      widgets().forEach((widget, at) => {
        if (!widget || widget.value === state[at]) return;
        widget.value = state[at];
        widget.callback?.(state[at], app.canvas, face);
      });
      face.setDirtyCanvas?.(true, false);
    },
    /** Tell the page, which keeps what can be undone and whether there is something to save. */
    commit() {
      app.canvas?.emitBeforeChange?.();
      app.canvas?.emitAfterChange?.();
    },
    undo: () => app.extensionManager?.command?.execute("Comfy.Undo"),
    undoes: () => Boolean(app.extensionManager?.workflow?.activeWorkflow?.changeTracker?.undoQueue?.length),
    locked() {
      if (masked()) return region() ? say("masked") : say("maskUnseen");
      return connected() ? say("connected") : "";
    },
    levels: () => levelsOf(seen().layout, seen().cells),
    view: (onResult) => {
      if (Tool === RegionsTool) Object.assign(editor.tool, { found: seen().found ?? [], connected: connectedOf(node) });
      return {
        ground: findGround(onResult ? picturesBelow(node, outer) : picturesAbove(node, ground, outer)),
        other: other && findOther(picturesAbove(node, [other], outer)),
        shrunk,
        region: region(),
      };
    },
    forward: (name, event) => app.canvas?.[name]?.(event),
  }, panel);

  const settle = outer ? () => {} : growing(node);
  settle();
  const options = { serialize: false, getMinHeight: () => editor.least(face.size[0]) };
  const widget = face.addDOMWidget(WIDGET, WIDGET, editor.element, options);
  widget.serialize = false; // neither in the workflow (this line) nor in the prompt (the option)
  if (outer) onFaces.set(face, [widget, editor]);
  if (face.graph?.getNodeById(face.id) === face) editors.add(editor); // a face that got its canvas later
  const [width, height] = face.computeSize?.() ?? face.size;
  face.setSize?.([Math.max(width, face.size[0], WIDTH), Math.max(height, face.size[1])]);

  for (const each of widgets()) after(each, "callback", () => editor.draw()); // typed by hand
  after(face, "onConnectionsChange", () => {
    settle();
    editor.draw();
  });
  after(face, "onConfigure", () => {
    settle();
    // Older pages empty the list of a subgraph first.
    if (onFaces.get(face)?.[0] === widget && !face.widgets.includes(widget)) face.widgets.push(widget);
    if (left.has(placeOf(face))) editor.follow(left.get(placeOf(face)));
    left.delete(placeOf(face));
    editor.draw();
  });
  after(node, "onExecuted", (message) => {
    output = message;
    editor.draw();
  });
  after(face, "onAdded", () => editors.add(editor));
  after(face, "onRemoved", () => {
    left.set(placeOf(face), editor);
    editor.leave();
    editors.delete(editor);
  });
}

/** What names a node in all of the workflow: a subgraph counts its own nodes from 1. */
const placeOf = ({ id, graph }) => (graph && graph !== graph.rootGraph ? `${graph.id}:${id}` : `${id}`);

/** Where the region was that inputs gave to the last run: {box: [x0, y0, x1, y1], mask: image or null}, null if unknown. */
function regionOf({ box, mask = [] }, masked, find) {
  if (!box || masked !== Boolean(mask.length)) return null;
  const image = find(mask.slice(0, 1));
  return masked && !image ? null : { box: box.slice(0, 4), mask: image };
}

function after(object, method, act) {
  const before = object[method];
  object[method] = function (...args) {
    const result = before?.apply(this, args);
    act(...args);
    return result;
  };
}
