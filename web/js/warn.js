/** What a running node warns of (nodes/host/saying.py), as a message of the page under the node's name. */

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

const SHOWN_FOR = 15_000; // milliseconds

const shown = new Set(); // what can be read now: a node may read its text again and again

app.registerExtension({
  name: "SemanticDiffusionAdapter.Warn",
  setup() {
    api.addEventListener("sda.warn", ({ detail: { node, text } }) => {
      const message = `${node} ${text}`;
      if (shown.has(message)) return;
      shown.add(message);
      setTimeout(() => shown.delete(message), SHOWN_FOR);
      const summary = app.graph?.getNodeById?.(node)?.title ?? "";
      app.extensionManager?.toast?.add?.({ severity: "warn", summary, detail: text, life: SHOWN_FOR });
    });
  },
});
