/**
 * Colours for the pack's own socket types, on the classic canvas and in Nodes 2.0.
 *
 * One set for every palette: on the page's dark grounds and on its light ones each has a contrast of 2.8 or more. A palette
 * of the artist that names these types goes before it.
 */

import { app } from "../../../scripts/app.js";

const COLOURS = {
  SDA_VISION: "#6171d8",
  SDA_FEATURES: "#887a18",
  SDA_ADAPTER: "#c34ca0",
  SDA_EMBEDDING: "#14897d",
  SDA_EDIT_DECODER: "#bf5f28",
};

app.registerExtension({
  name: "SemanticDiffusionAdapter.Sockets",
  setup() {
    const rules = Object.entries(COLOURS).map(([type, colour]) => `--color-datatype-${type}: ${colour};`); // Nodes 2.0
    document.head.append(Object.assign(document.createElement("style"), { textContent: `:root { ${rules.join(" ")} }` }));
    const { canvas } = app;
    for (const colours of [canvas?.default_connection_color_byType, canvas?.constructor.link_type_colors]) {
      if (colours) Object.entries(COLOURS).forEach(([type, colour]) => fallBack(colours, type, colour));
    }
  },
});

/** A colour for when the palette has none: with every change of it the page writes "" for types that it does not know. */
function fallBack(colours, type, colour) {
  let chosen = colours[type];
  Object.defineProperty(colours, type, {
    get: () => chosen || colour,
    set: (value) => (chosen = value),
    enumerable: true,
    configurable: true,
  });
}
