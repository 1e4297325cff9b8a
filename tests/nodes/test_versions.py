"""What the page is told of the nodes: everything that this core knows, and nothing that an older one does not."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

pytest.importorskip("comfy.sd", reason="no ComfyUI here: set COMFYUI_PATH, or `python3 run.py test` makes one")

import semantic_diffusion_adapter  # noqa: E402
from comfy_api.latest import io  # noqa: E402

RARELY_USED = {
    ("SDAMaskedAttention", "start_percent"), ("SDAMaskedAttention", "end_percent"), ("SDAMaskedAttention", "token_mixing"),
    ("SDAMaskedAttention", "blocks"), ("SDABlendEmbeddings", "mode"), ("SDAEditEmbedding", "mode"), ("SDAEditGuider", "cfg"),
    ("SDAChangeMask", "noises"), ("SDAChangeMask", "seed"), ("SDAFlowEditGuider", "n_avg"), ("SDAFlowEditGuider", "cfg"),
    ("SDAFlowEditGuider", "source_cfg"), ("SDAInversionEdit", "eta_stop"), ("SDAInversionEdit", "gamma"),
    ("SDAInversionEdit", "cfg"), ("SDASourceGate", "lo"), ("SDASourceGate", "hi"), ("SDASourceGate", "text_gate"),
    ("SDASourceGate", "start_percent"), ("SDASourceGate", "end_percent"), ("SDASourceGate", "blocks"), ("SDASourceGate", "share"),
    *(("SDAAttributeEdit", name) for name in ("coarse", "mask_threshold", "start_percent", "end_percent", "blocks")),
    ("SDAAttributeMask", "noises"), ("SDAAttributeMask", "seed"),
    *(("SDAReferenceGate", name) for name in ("lo", "hi", "start_percent", "end_percent", "blocks")),
}  # fmt: skip
WITH_A_CANVAS = {"SDACompose", "SDAPlace", "SDARegionalPrompt", "SDARegions", "SDAStrength"}
KNOWN = {field.name for field in dataclasses.fields(io.Schema)}


@pytest.fixture
def told(assets) -> dict[str, dict]:
    """/object_info of every node of the pack, as core makes it."""
    extension = asyncio.run(semantic_diffusion_adapter.comfy_entrypoint())
    return {node.GET_SCHEMA().node_id: node.GET_NODE_INFO_V1() for node in asyncio.run(extension.get_node_list())}


def inputs(info: dict) -> dict[str, dict]:
    given = (info["input"].get(group, {}) for group in ("required", "optional"))
    return {name: options for group in given for name, (_, options) in group.items()}


def test_rarely_used_inputs_are_folded_away_where_the_page_can(told):
    folded = {(node, name) for node, info in told.items() for name, options in inputs(info).items() if options.get("advanced")}
    assert folded == (RARELY_USED if hasattr(io.Float.Input("x"), "advanced") else set())


def test_what_a_canvas_shows_outlives_a_reload(told):
    kept = {node for node, info in told.items() if info.get("has_intermediate_output")}
    assert kept == (WITH_A_CANVAS if "has_intermediate_output" in KNOWN else set())


def test_nodes_are_found_by_other_words_for_them(told):
    assert bool(told["SDARegionalPrompt"].get("search_aliases")) == ("search_aliases" in KNOWN)


def test_bounding_boxes_are_a_socket_of_cores_type(told):
    for node in WITH_A_CANVAS - {"SDAStrength"}:
        kind, options = told[node]["input"]["optional"]["bboxes"]
        assert kind == "BOUNDING_BOX" and options["forceInput"] and not options.get("socketless"), "no widget, on any page"
    if hasattr(io, "BoundingBox"):
        assert io.BoundingBox.io_type == "BOUNDING_BOX"
