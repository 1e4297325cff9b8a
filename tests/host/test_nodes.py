"""What the running ComfyUI tells its page about the pack."""

from __future__ import annotations

import urllib.parse
from pathlib import Path

import pytest
from semantic_diffusion_adapter.runner.client import Client
from semantic_diffusion_adapter.runner.server import PACK

pytestmark = pytest.mark.host

ROOT = Path(__file__).resolve().parents[2]
# Frozen: a saved workflow names these.
IDS = {
    "SDALoadVisionEncoders",
    "SDALoadAdapter",
    "SDALoadEditDecoder",
    "SDAEncodeImage",
    "SDABuildEmbedding",
    "SDAEditEmbedding",
    "SDABlendEmbeddings",
    "SDAEmbeddingToConditioning",
    "SDAMaskedAttention",
    "SDAEditGuider",
    "SDAChangeMask",
    "SDAFlowEditGuider",
    "SDAInversionEdit",
    "SDASourceGate",
    "SDAReferenceGate",
    "SDAAttributeEdit",
    "SDAAttributeMask",
    "SDARegionalPrompt",
    "SDAPlace",
    "SDARegions",
    "SDACompose",
    "SDAEncodeRedux",
    "SDAFitEmbedding",
    "SDAFromStyleModel",
    "SDAStrength",
    "SDAKeepOutsideMask",
    "SDAPreviewEmbedding",
    "SDAVisiblePatches",
    "SDASaveEmbedding",
    "SDALoadEmbedding",
    "SDALoadMiniature",
}


def test_the_nodes_are_all_there(nodes: dict) -> None:
    ours = {name for name, node in nodes.items() if node["python_module"].endswith(PACK)}
    assert ours == IDS


@pytest.mark.parametrize("name", sorted(IDS))
def test_a_node_explains_itself(name: str, nodes: dict) -> None:
    node = nodes[name]
    assert node["category"] == "semantic diffusion"
    assert node["description"].endswith(".")
    inputs = {**node["input"].get("required", {}), **node["input"].get("optional", {})}
    silent = [key for key, (_, *options) in inputs.items() if not (options and options[0].get("tooltip"))]
    assert silent == []
    assert len(node["output_tooltips"]) == len(node["output"]) and all(node["output_tooltips"])


def test_the_templates_are_listed_with_their_pictures(client: Client) -> None:
    files = {path.stem for path in (ROOT / "example_workflows").glob("*.json")}
    assert set(client.json("/workflow_templates")[PACK]) == files
    for name in files:
        for kind in ("json", "jpg"):
            served = client.get(f"/api/workflow_templates/{PACK}/{urllib.parse.quote(name)}.{kind}")
            assert served == (ROOT / "example_workflows" / f"{name}.{kind}").read_bytes()
