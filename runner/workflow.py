"""From a workflow file, as the page saves it, to the prompt that ComfyUI's API takes.

The templates in example_workflows/ are the only source; the browser test compares this with the real page's own export.
"""

from __future__ import annotations

from .environment import Failure

WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
SEEDS = ("seed", "noise_seed")
MUTED, BYPASSED = 2, 4
SCENE = 7  # the bundled picture among SDALoadMiniature's outputs


def to_prompt(workflow: dict, nodes: dict) -> dict:
    """The API prompt of `workflow`; `nodes` is /object_info. Notes and bypassed nodes are left out.

    Raises Failure for nodes that are muted or only on the page (Reroute): no template of ours uses them.
    """
    links = _sources(workflow)
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in ("Note", "MarkdownNote") or node.get("mode", 0) == BYPASSED:
            continue
        if node["type"] not in nodes or node.get("mode", 0) == MUTED:
            raise Failure(f"Node {node['id']} ({node['type']}) is unknown to this ComfyUI, or muted.")
        inputs = _widget_values(node, nodes[node["type"]])
        for socket in node.get("inputs", []):
            if socket.get("link") is not None:
                inputs[socket["name"]] = links[socket["link"]]
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def _sources(workflow: dict) -> dict[int, list]:
    """Where each link comes from: through a bypassed node, from its first input of the same type."""
    origins = {link[0]: (link[1], link[2]) for link in workflow["links"]}
    bypassed = {node["id"]: node for node in workflow["nodes"] if node.get("mode", 0) == BYPASSED}
    sources = {}
    for link, (node, slot) in origins.items():
        while node in bypassed:
            kind = bypassed[node]["outputs"][slot]["type"]
            came = next((socket["link"] for socket in bypassed[node]["inputs"] if socket["type"] == kind), None)
            if came is None:
                raise Failure(f"Node {node} is bypassed and has no {kind} to pass on.")
            node, slot = origins[came]
        sources[link] = [str(node), slot]
    return sources


def _widget_values(node: dict, schema: dict) -> dict:
    """A node stores its widgets' values in the order of its inputs; a seed is followed by what to do after a run."""
    values, result = list(node.get("widgets_values") or []), {}
    declared = {**schema["input"].get("required", {}), **schema["input"].get("optional", {})}
    for name, (kind, *rest) in declared.items():
        options = rest[0] if rest else {}
        if not (isinstance(kind, list) or kind in WIDGETS) or options.get("forceInput"):
            continue
        if not values:
            raise Failure(f"{node['type']} has a widget {name} in this ComfyUI that the template knows nothing of.")
        result[name] = values.pop(0)
        if kind == "INT" and options.get("control_after_generate", name in SEEDS):
            values.pop(0)
    return result


def fill(prompt: dict, image: str, instruction: str | None, seed: int) -> dict:
    """`prompt` with this uploaded picture, instruction (None: the template's own) and seed; returns it.

    A template takes its picture from Load Miniature, so that it runs in any ComfyUI as it is; what hung on that is
    connected to a Load Image here, as a person would do on the page.
    """
    scene, own = [next(key for key, node in prompt.items() if node["class_type"] == "SDALoadMiniature"), SCENE], ["picture", 0]
    prompt[own[0]] = {"class_type": "LoadImage", "inputs": {"image": image}}
    for node in prompt.values():
        inputs = node["inputs"]
        inputs.update({name: own for name, value in inputs.items() if value == scene})
        if node["class_type"] == "SDAEditEmbedding" and instruction is not None:
            inputs["instruction"] = instruction
        for name in SEEDS:
            if name in inputs and not isinstance(inputs[name], list):
                inputs[name] = seed
    return prompt


def pictures(prompt: dict, outputs: dict) -> dict[str, dict]:
    """The saved pictures by the last word of their file name prefix: `.../edited` -> "edited"."""
    return {
        prompt[node]["inputs"]["filename_prefix"].rsplit("/", 1)[-1]: found["images"][0]
        for node, found in outputs.items()
        if prompt[node]["class_type"] == "SaveImage"
    }
