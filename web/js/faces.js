/**
 * Faces: a subgraph whose face shows the widgets that a canvas draws gets that canvas as well.
 *
 * The page knows how to show widgets that have an input, and those alone on newer frontends. Their values are then the
 * face's own: one for each place where the subgraph stands, and the node inside has them when it runs.
 */

const INSIDE = -10; // the page's id for the inputs of a subgraph, seen from its inside

/** The first node in a subgraph all of whose widgets of some names stand on its face: {node, find(name)}, or null. */
export function inside(face, namesOf) {
  if (!face.isSubgraphNode?.()) return null;
  for (const node of face.subgraph.nodes) {
    const names = namesOf(node);
    const find = (name) => widgetOf(face, node, name);
    if (names?.every(find)) return { node, find };
  }
  return null;
}

/** The slot of the face that gives this input of a node inside, -1 where it is not given from outside. */
export function slotOutside(node, slot) {
  const link = slot < 0 ? null : node.getInputLink?.(slot);
  return Number(link?.origin_id) === INSIDE ? link.origin_slot : -1; // newer pages write ids as text
}

function widgetOf(face, node, name) {
  const slot = slotOutside(node, node.inputs?.findIndex(({ widget }) => widget?.name === name) ?? -1);
  const input = face.inputs?.[slot];
  return input?.widget && face.widgets?.find((widget) => widget.name === input.widget.name);
}
