"""Graphs as files hold them, against the nodes' schemas: for templates and blueprints."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import uuid

import execution
import pytest
import semantic_diffusion_adapter
from semantic_diffusion_adapter.runner.workflow import SEEDS, WIDGETS

import nodes as stock

EXTRAS = ("nodes_mask", "nodes_custom_sampler", "nodes_sd3", "nodes_flux", "nodes_edit_model")  # of core, which a server loads by itself
INSIDE, OUTSIDE = -10, -20  # the ends of a subgraph's own links


def object_info(monkeypatch: pytest.MonkeyPatch) -> dict:
    """/object_info of core's nodes and ours; core validates with the same classes."""
    classes = dict(stock.NODE_CLASS_MAPPINGS)
    for module in [*(importlib.import_module(f"comfy_extras.{name}") for name in EXTRAS), semantic_diffusion_adapter]:
        if hasattr(module, "NODE_CLASS_MAPPINGS"):
            classes |= module.NODE_CLASS_MAPPINGS
        else:
            made = module.comfy_entrypoint()
            listed = asyncio.run((asyncio.run(made) if inspect.isawaitable(made) else made).get_node_list())
            classes |= {node.GET_SCHEMA().node_id: node for node in listed}
    monkeypatch.setattr(stock, "NODE_CLASS_MAPPINGS", classes)
    return {
        name: node.GET_NODE_INFO_V1()
        if hasattr(node, "GET_NODE_INFO_V1")
        else {
            "input": node.INPUT_TYPES(),
            "output": node.RETURN_TYPES,
            "output_name": getattr(node, "RETURN_NAMES", node.RETURN_TYPES),
            "output_node": getattr(node, "OUTPUT_NODE", False),
        }
        for name, node in classes.items()
    }


def type_of(kind) -> str:
    return "COMBO" if isinstance(kind, list) else kind


def slots(schema: dict) -> list[tuple[str, str, bool, bool]]:
    """(name, type, is optional, is a widget) of every input in the page's order: the sockets first, then the widgets."""
    found = []
    for group in ("required", "optional"):
        for name, (kind, *rest) in schema["input"].get(group, {}).items():
            widget = type_of(kind) in WIDGETS and not (rest and rest[0].get("forceInput"))
            found.append((name, type_of(kind), group == "optional", widget))
    return sorted(found, key=lambda slot: slot[3])


def check(nodes: list[dict], links: list[list], info: dict) -> None:
    """Every slot, link and widget value of a graph is what the page would have made of these schemas."""
    by_id = {node["id"]: node for node in nodes}
    assert len(by_id) == len(nodes) and len({link[0] for link in links}) == len(links)
    for link, origin, slot, target, at, kind in links:
        if origin != INSIDE:
            output = by_id[origin]["outputs"][slot]
            assert link in output["links"] and output["type"] == kind
        if target != OUTSIDE:
            assert by_id[target]["inputs"][at]["link"] == link and by_id[target]["inputs"][at]["type"] == kind
    ends = {(link[1], link[2], link[0]) for link in links} | {(link[3], link[4], link[0]) for link in links}
    for node in nodes:
        for number, output in enumerate(node["outputs"]):
            assert {(node["id"], number, link) for link in output["links"] or []} <= ends
        for number, slot in enumerate(node["inputs"]):
            assert slot["link"] is None or (node["id"], number, slot["link"]) in ends
        if node["type"] == "MarkdownNote":
            continue
        schema = info[node["type"]]
        wanted = slots(schema)
        options = {**schema["input"].get("required", {}), **schema["input"].get("optional", {})}
        controlled = [n for n in SEEDS if n in options and options[n][1].get("control_after_generate", True)]
        values = len([slot for slot in wanted if slot[3]]) + len(controlled)
        if node["type"] == "LoadImage":  # has the page's own upload button, and names no file: who knows which are there?
            wanted, values = [*wanted, ("upload", "IMAGEUPLOAD", False, True)], 0
        if node["type"] == "SDARegions":  # shows as many of its embeddings as are connected, and one more
            shown = {slot["name"] for slot in node["inputs"]}
            wanted = [slot for slot in wanted if slot[0] in shown or not slot[0].startswith("other_")]
        there = [(slot["name"], slot["type"], slot.get("shape") == 7, "widget" in slot) for slot in node["inputs"]]
        assert there == wanted, node["type"]
        assert len(node["widgets_values"]) == values, node["type"]
        outputs = [(output["name"], output["type"]) for output in node["outputs"]]
        known = list(zip(schema["output_name"], map(type_of, schema["output"])))
        if not node["type"].startswith("SDA"):
            known = known[: len(outputs)]  # newer cores give their nodes more of them: the page adds those when it opens the file
        assert outputs == known, node["type"]


def validate(prompt: dict) -> None:
    """Core's own validation, as when the prompt is queued. It may tidy the numbers of `prompt`."""
    valid, error, _, node_errors = asyncio.run(execution.validate_prompt(str(uuid.uuid4()), prompt, None))
    assert valid and not node_errors, (error, node_errors)
