/**
 * The nodes' texts in the page's language, where the page itself loses them: frontends before 1.33.13 load a language after
 * they have merged the packs' texts into it, and over them. Where the page finds a text of its own it prefers it.
 */

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

const OURS = /^SDA[A-Z]/;

let all = {}; // by node id, as in locales/<language>/nodeDefs.json

app.registerExtension({
  name: "SemanticDiffusionAdapter.Names",
  async addCustomNodeDefs(defs) {
    const language = app.extensionManager?.setting?.get("Comfy.Locale");
    const texts = (await api.getCustomNodesI18n?.())?.[language];
    all = texts?.nodeDefs ?? {};
    for (const [id, def] of Object.entries(defs)) {
      if (OURS.test(id) && all[id]) translate(def, all[id], texts.nodeCategories);
    }
  },
  nodeCreated(node) {
    const id = node.comfyClass ?? node.constructor?.comfyClass;
    if (OURS.test(id) && all[id]) label(node, all[id]);
  },
});

function translate(def, { display_name, description, inputs, outputs }, categories) {
  Object.assign(def, { display_name, description, category: categories?.[def.category] ?? def.category });
  for (const inputsOfKind of Object.values(def.input ?? {})) {
    for (const [name, [, options]] of Object.entries(inputsOfKind)) {
      if (options && inputs?.[key(name)]) options.tooltip = inputs[key(name)].tooltip;
    }
  }
  def.output_tooltips = def.output_tooltips?.map((english, at) => outputs?.[at]?.tooltip ?? english);
}

/** Sockets and widgets keep their names, by which workflows find them; only what is shown changes. */
function label(node, { inputs, outputs }) {
  for (const input of node.inputs ?? []) input.localized_name = inputs?.[key(input.name)]?.name ?? input.localized_name;
  for (const widget of node.widgets ?? []) widget.label = inputs?.[key(widget.name)]?.name ?? widget.label;
  node.outputs?.forEach((output, at) => (output.localized_name = outputs?.[at]?.name ?? output.localized_name));
}

/** How a name stands in the files of texts, where a dot is a step. */
function key(name) {
  return name.replaceAll(".", "_");
}
