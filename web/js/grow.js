/** Inputs that grow: of a row of optional ones, a node shows as far as they are connected and one more. */

const NAME = /^other_(\d+)$/;

/** The inputs of the row that a node has now: [{number, slot, linked}], in order. */
const rowOf = (node) =>
  (node.inputs ?? []).flatMap(({ name, link }, slot) => {
    const number = Number(NAME.exec(name)?.[1]);
    return number ? [{ number, slot, linked: link !== null && link !== undefined }] : [];
  });

/** The last input of the row that is connected, 0 where none is. */
export const connectedOf = (node) => Math.max(0, ...rowOf(node).map(({ number, linked }) => (linked ? number : 0)));

/** Let a node that was just made show what it needs of a row, and add and take away as links come and go. */
export function growing(node) {
  const { type, shape } = node.inputs?.find(({ name }) => name === "other_1") ?? {};
  const most = Math.max(0, ...rowOf(node).map(({ number }) => number));
  if (!most || typeof node.removeInput !== "function") return () => {};
  return () => {
    const wanted = Math.min(connectedOf(node) + 1, most);
    const row = rowOf(node);
    const has = new Set(row.map(({ number }) => number));
    for (const { number, slot } of row.reverse()) if (number > wanted) node.removeInput(slot);
    for (let number = 1; number <= wanted; number++) if (!has.has(number)) node.addInput(`other_${number}`, type, { shape });
  };
}
