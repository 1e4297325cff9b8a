"""The whole graph through core's own validation, execution and cache, on a miniature of random weights."""

from __future__ import annotations

import asyncio
import copy

import pytest

pytest.importorskip("comfy.sd", reason="no ComfyUI here: set COMFYUI_PATH, or `python3 run.py test` makes one")

import folder_paths  # noqa: E402
import semantic_diffusion_adapter  # noqa: E402

import nodes as stock  # noqa: E402

GRAPH = {
    "load": {"class_type": "SDALoadMiniature", "inputs": {}},
    "vision": {
        "class_type": "SDALoadVisionEncoders",
        "inputs": {
            "encoder_1": ["load", 3], "model_1": "from file", "encoder_2": ["load", 4], "model_2": "from file",
            "encoder_3": "none", "model_3": "from file",
        },
    },
    "adapter": {"class_type": "SDALoadAdapter", "inputs": {"adapter": ["load", 5]}},
    "editor": {"class_type": "SDALoadEditDecoder", "inputs": {"edit_decoder": "miniature_editor.safetensors"}},
    "encode": {"class_type": "SDAEncodeImage", "inputs": {"vision": ["vision", 0], "image": ["load", 7]}},
    "build": {
        "class_type": "SDABuildEmbedding",
        "inputs": {"adapter": ["adapter", 0], "features": ["encode", 0], "preset": "tree64"},
    },
    "edit": {
        "class_type": "SDAEditEmbedding",
        "inputs": {
            "embedding": ["build", 0], "clip": ["load", 1], "edit_decoder": ["editor", 0],
            "instruction": "remove the red circle", "mode": "parallel",
        },
    },
    "blend": {
        "class_type": "SDABlendEmbeddings",
        "inputs": {"embedding_a": ["build", 0], "embedding_b": ["edit", 0], "amount": 0.5, "mode": "slerp", "levels": "all"},
    },
    "prompt": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["load", 1], "text": "a red circle"}},
    "positive": {"class_type": "SDAEmbeddingToConditioning", "inputs": {"embedding": ["blend", 0], "text": ["prompt", 0]}},
    "negative": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["load", 1], "text": ""}},
    "patch": {
        "class_type": "SDAMaskedAttention",
        "inputs": {
            "model": ["load", 0], "strength": 1.0, "start_percent": 0.0, "end_percent": 1.0, "token_mixing": "all",
        },
    },
    "latent": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
    "sample": {
        "class_type": "KSampler",
        "inputs": {
            "model": ["patch", 0], "positive": ["positive", 0], "negative": ["negative", 0], "latent_image": ["latent", 0],
            "seed": 1, "steps": 2, "cfg": 1.5, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0,
        },
    },
    "decode": {"class_type": "VAEDecode", "inputs": {"samples": ["sample", 0], "vae": ["load", 2]}},
    "show": {"class_type": "PreviewImage", "inputs": {"images": ["decode", 0]}},
}  # fmt: skip


@pytest.fixture
def run(queue, assets, tmp_path, monkeypatch):
    """`queue` with our nodes and a folder for what they show."""
    extension = asyncio.run(semantic_diffusion_adapter.comfy_entrypoint())
    ours = {node.GET_SCHEMA().node_id: node for node in asyncio.run(extension.get_node_list())}
    monkeypatch.setattr(stock, "NODE_CLASS_MAPPINGS", stock.NODE_CLASS_MAPPINGS | ours)
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path))
    return queue


def test_the_whole_graph_runs_and_is_cached(run, tmp_path):
    ran, errors = run(GRAPH)
    assert not errors and ran == set(GRAPH)
    assert len(list(tmp_path.glob("*.png"))) == 1
    assert run(GRAPH) == (set(), []), "the same graph again must come from the cache"
    changed = copy.deepcopy(GRAPH)
    changed["edit"]["inputs"]["instruction"] = "a circle"
    ran, errors = run(changed)
    assert not errors and ran == {"edit", "blend", "positive", "sample", "decode", "show"}


def test_an_error_reaches_the_artist_as_the_sentence_that_was_written(run):
    broken = copy.deepcopy(GRAPH)
    broken["blend"]["inputs"]["levels"] = "7"
    ran, errors = run(broken)
    assert ran and errors == ["The embedding has no level 7: it has 0, 1, 2."]
    broken["edit"]["inputs"]["instruction"] = ""
    sentence = "The instruction is empty: write what to change, for example `remove the red circle`."
    assert run(broken) == (set(), [f"instruction - {sentence}"]), "what is wrong by itself is told before anything runs"


def test_networks_loaded_in_one_prompt_work_in_the_next(run):
    """Core runs prompts in inference mode, whose tensors outside of it are of limited use."""
    shorter = {name: copy.deepcopy(node) for name, node in GRAPH.items() if name not in ("edit", "editor", "blend", "prompt")}
    shorter["positive"]["inputs"] = {"embedding": ["build", 0]}
    ran, errors = run(shorter)
    assert not errors and "build" in ran
    ran, errors = run(GRAPH)
    assert not errors and "edit" in ran and "build" not in ran
