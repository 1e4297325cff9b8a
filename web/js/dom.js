/** Elements of the canvas widget, and how they look. */

const STYLE = `
.sda-editor { display: flex; flex-direction: column; gap: 4px; width: 100%; height: 100%; min-height: 300px; min-width: 0;
  contain: inline-size; box-sizing: border-box; font: 11px/1.3 sans-serif; color: var(--input-text, #ddd); }
.sda-editor .sda-bar { display: flex; gap: 4px; align-items: center; }
.sda-editor [hidden] { display: none; }
.sda-editor button { font: inherit; color: inherit; padding: 2px 8px; border-radius: 4px; cursor: pointer;
  border: 1px solid var(--border-color, #666); background: var(--comfy-input-bg, #222); }
.sda-editor button[aria-pressed="true"] { border-color: #56b4e9; box-shadow: inset 0 0 0 1px #56b4e9; }
.sda-editor button:disabled { opacity: 0.4; cursor: default; }
.sda-editor button:focus-visible { outline: 2px solid #56b4e9; outline-offset: 1px; }
.sda-editor .sda-gap { flex: 1; }
.sda-editor .sda-stage { position: relative; flex: 1 1 0; min-height: 0; border-radius: 6px;
  background: var(--comfy-input-bg, #222); }
.sda-editor .sda-stage:focus { outline: 2px solid #56b4e9; outline-offset: -1px; }
.sda-editor canvas { position: absolute; inset: 0; width: 100%; height: 100%; touch-action: none; }
.sda-window { position: fixed; inset: 3vh 3vw; z-index: 10000; padding: 12px; border: 1px solid var(--border-color, #666);
  border-radius: 8px; background: var(--comfy-menu-bg, #353535); box-sizing: border-box; box-shadow: 0 0 0 100vmax rgba(0, 0, 0, 0.6); }
.sda-editor .sda-line { overflow-wrap: anywhere; }
.sda-editor .sda-hint { opacity: 0.7; cursor: help; }
/* Where Nodes 2.0 leaves details out of far nodes, it also takes the pointer from their widgets; this one is still seen. */
.isLOD .sda-editor { pointer-events: auto; }
.sda-panel { display: flex; flex-direction: column; gap: 4px; flex: 0 0 auto; }
.sda-panel .sda-rows { height: 88px; overflow-y: auto; border-radius: 4px; display: flex; flex-direction: column; gap: 2px; }
.sda-panel .sda-row { display: flex; gap: 4px; align-items: center; padding: 1px 2px; border-radius: 4px; }
.sda-panel .sda-row[aria-current="true"] { background: color-mix(in srgb, #56b4e9 25%, transparent); }
.sda-panel .sda-row button { padding: 0 5px; }
.sda-panel input, .sda-panel select, .sda-panel textarea { font: inherit; color: inherit; min-width: 0; box-sizing: border-box;
  background: var(--comfy-input-bg, #222); border: 1px solid var(--border-color, #666); border-radius: 4px; }
.sda-panel input[type="color"] { width: 22px; height: 18px; padding: 0; flex: none; }
.sda-panel input[type="text"] { flex: 1; }
.sda-panel textarea { width: 100%; height: 38px; resize: none; }
.sda-panel .sda-fields { display: grid; grid-template-columns: repeat(auto-fill, minmax(118px, 1fr)); gap: 3px 10px; }
.sda-panel .sda-all { grid-column: 1 / -1; }
.sda-panel .sda-field { display: flex; gap: 6px; align-items: center; }
.sda-panel .sda-field label { flex: 0 0 auto; }
.sda-panel .sda-field > :last-child { flex: 1 1 0; }
/* Where there is room the panel stands beside the picture. */
.sda-wide { display: grid; grid-template: auto minmax(0, 1fr) auto auto / minmax(0, 1fr) minmax(270px, 30%); column-gap: 12px; }
.sda-wide > * { grid-column: 1; }
.sda-wide > .sda-panel { grid-area: 1 / 2 / -1 / 3; }
.sda-wide .sda-panel .sda-rows { height: auto; flex: 1 1 0; }
.sda-wide .sda-panel textarea { height: 76px; }`;

/** An element with these attributes and children. */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

/** Let the page know the looks, once. */
export function dress() {
  if (document.getElementById("sda-style")) return;
  document.head.append(Object.assign(make("style", { id: "sda-style" }), { textContent: STYLE }));
}
