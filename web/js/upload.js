/** The button of Load Embedding: a file of the artist's computer goes into ComfyUI's input folder and is chosen. */

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { say } from "./texts.js";

const NODE = "SDALoadEmbedding";
const FOLDER = "embeddings"; // inside the input folder

app.registerExtension({
  name: "SemanticDiffusionAdapter.Upload",
  nodeCreated(node) {
    if ((node.comfyClass ?? node.constructor?.comfyClass) !== NODE) return;
    const combo = node.widgets?.find(({ name }) => name === "file");
    if (!combo) return;
    const act = () => choose((file) => take(node, combo, file));
    const button = node.addWidget("button", say("upload"), null, act, { serialize: false });
    button.serialize = false; // neither in the workflow (this line) nor in the prompt (the option)
  },
});

function choose(act) {
  const input = Object.assign(document.createElement("input"), { type: "file", accept: ".safetensors" });
  input.addEventListener("change", () => input.files.length && act(input.files[0]));
  input.click();
}

async function take(node, combo, file) {
  const body = new FormData();
  body.append("image", file); // core's route for every upload, whatever the file is
  body.append("subfolder", FOLDER);
  try {
    const answer = await api.fetchApi("/upload/image", { method: "POST", body });
    if (!answer.ok) throw new Error(`${answer.status} ${answer.statusText}`);
    const { name, subfolder } = await answer.json();
    const path = subfolder ? `${subfolder}/${name}` : name;
    if (!combo.options.values.includes(path)) combo.options.values.push(path);
    combo.value = path;
    combo.callback?.(path);
    node.setDirtyCanvas?.(true, true);
  } catch (error) {
    const detail = say("uploadFailed", { name: file.name, reason: error.message });
    app.extensionManager?.toast?.add({ severity: "error", summary: node.title, detail });
  }
}
