/** What a running node warns of (nodes/host/saying.py), as a message of the page under the node's name. */

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

const SHOWN_FOR = 15_000; // milliseconds

app.registerExtension({
  name: "SemanticDiffusionAdapter.Warn",
  setup() {
    api.addEventListener("sda.warn", ({ detail: { node, text } }) => {
      const summary = app.graph?.getNodeById?.(node)?.title ?? "";
      app.extensionManager?.toast?.add?.({ severity: "warn", summary, detail: text, life: SHOWN_FOR });
    });
  },
});
