"""The bundled workflow and its variations, queued over the API of a real ComfyUI with the shipped miniature."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from semantic_diffusion_adapter.kernels.checkpoint import read_header
from semantic_diffusion_adapter.runner.client import Client
from semantic_diffusion_adapter.runner.workflow import fill, pictures
from semantic_diffusion_adapter.training.miniature.parser import parse
from semantic_diffusion_adapter.training.miniature.score import colour_position, matches

pytestmark = pytest.mark.host

GATE = 0.90  # F1 (colour, place) of text to image from which on the adapter's pictures can be held to their content


def find(prompt: dict, kind: str, consumer: str | None = None) -> str:
    """The id of the node of this class (the one that leads to the SaveImage called `consumer`, where there are two)."""
    found = [key for key, node in prompt.items() if node["class_type"] == kind]
    if consumer:
        save = next(key for key, node in prompt.items() if node["inputs"].get("filename_prefix", "").endswith(consumer))
        found = [key for key in found if key in upstream(prompt, save)]
    assert len(found) == 1, f"{len(found)} nodes {kind}"
    return found[0]


def upstream(prompt: dict, node: str) -> set[str]:
    links = [value[0] for value in prompt[node]["inputs"].values() if isinstance(value, list)]
    return {node}.union(*(upstream(prompt, link) for link in links))


def only(prompt: dict, name: str) -> dict:
    """The part of the workflow that leads to one saved picture."""
    save = next(key for key, node in prompt.items() if node["inputs"].get("filename_prefix", "").endswith(name))
    return {key: copy.deepcopy(prompt[key]) for key in upstream(prompt, save)}


def run(client: Client, prompt: dict) -> dict[str, np.ndarray]:
    """Every saved picture as uint8 [H, W, 3], by name."""
    saved = pictures(prompt, client.run(prompt))
    return {name: pixels(client.image(output)) for name, output in saved.items()}


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def test_the_template_encodes_edits_and_decodes(client: Client, template: dict, miniature: Path) -> None:
    images = run(client, template)
    assert np.array_equal(images["source"], np.asarray(Image.open(miniature / "scene.png").convert("RGB")))
    assert {name: picture.shape for name, picture in images.items()} == dict.fromkeys(images, (128, 128, 3))
    assert not np.array_equal(images["reconstruction"], images["edited"]), "the instruction must matter"


def test_the_pictures_show_what_was_asked(client: Client, template: dict, miniature: Path, request) -> None:
    """Every object of the scene is repainted in its place, and the edit takes away just the one it names."""
    figures = read_header(miniature / "diffusion_models" / "miniature_flux.safetensors").get("figures", {})
    if figures.get("f1_colour_place", 0.0) < GATE:
        reason = f"the shipped base is not trained up to its gate yet: F1 (colour, place) {figures} < {GATE}"
        request.applymarker(pytest.mark.xfail(reason=reason))
    images = run(client, template)
    truth, painted, edited = (parse(images[name]) for name in ("source", "reconstruction", "edited"))
    assert len(truth.things) >= 2
    assert len(matches(truth, painted, colour_position)) == len(truth.things)
    assert template[find(template, "SDAEditEmbedding")]["inputs"]["instruction"].startswith("remove ")
    assert len(matches(truth, edited, colour_position)) == len(truth.things) - 1 == len(edited.things)


def test_an_uploaded_picture_takes_the_scenes_place(client: Client, template: dict, tmp_path: Path) -> None:
    photo = np.random.default_rng(0).integers(0, 256, (96, 200, 3), dtype=np.uint8)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    prompt = only(fill(template, client.upload(tmp_path / "photo.png"), None, seed=3), "source")
    square = Image.fromarray(photo).crop((52, 0, 148, 96)).resize((128, 128), Image.Resampling.LANCZOS)
    assert np.abs(run(client, prompt)["source"].astype(int) - np.asarray(square)).max() <= 2


def test_the_seed_decides(client: Client, template: dict) -> None:
    prompt = only(template, "reconstruction")
    sampler = prompt[find(prompt, "KSampler")]["inputs"]
    images = []
    for seed in (1, 2, 1):
        sampler["seed"] = seed
        images.append(run(client, prompt)["reconstruction"])
    assert np.array_equal(images[0], images[2])
    assert not np.array_equal(images[0], images[1])


def test_the_patch_leaves_plain_conditioning_and_the_model_alone(client: Client, template: dict) -> None:
    """Text alone gives the same picture without the patch, through it, and without it again afterwards."""
    prompt = only(template, "reconstruction")
    sampler, patch = prompt[find(prompt, "KSampler")]["inputs"], find(prompt, "SDAMaskedAttention")
    embedded, patched = sampler["positive"], sampler["model"]
    plain = prompt[patch]["inputs"]["model"]
    prompt["text"] = {
        "class_type": "CLIPTextEncode",
        "inputs": {"clip": [find(prompt, "SDALoadMiniature"), 1], "text": "a large red circle in the center"},
    }
    images = []
    for model, positive in ((plain, ["text", 0]), (patched, ["text", 0]), (patched, embedded), (plain, ["text", 0])):
        sampler.update(model=model, positive=positive)
        images.append(run(client, prompt)["reconstruction"])
    assert np.array_equal(images[0], images[1])
    assert np.array_equal(images[0], images[3])
    assert not np.array_equal(images[1], images[2])


def test_the_mask_matters(client: Client, template: dict) -> None:
    prompt = only(template, "reconstruction")
    sampler, patch = prompt[find(prompt, "KSampler")]["inputs"], prompt[find(prompt, "SDAMaskedAttention")]["inputs"]
    masked = run(client, prompt)["reconstruction"]
    sampler["model"] = patch["model"]
    assert not np.array_equal(masked, run(client, prompt)["reconstruction"])


@pytest.mark.parametrize(("width", "height", "batch", "cfg"), [(128, 128, 3, 2.0), (136, 120, 1, 1.0)])
def test_batches_guidance_and_odd_sizes(
    client: Client, template: dict, width: int, height: int, batch: int, cfg: float
) -> None:
    prompt = only(template, "reconstruction")
    prompt[find(prompt, "EmptyLatentImage")]["inputs"].update(width=width, height=height, batch_size=batch)
    prompt[find(prompt, "KSampler")]["inputs"].update(cfg=cfg, steps=4)
    save = find(prompt, "SaveImage")
    images = [pixels(client.image(output)) for output in client.run(prompt)[save]["images"]]
    assert [image.shape for image in images] == [(height, width, 3)] * batch
    assert len({image.tobytes() for image in images}) == batch


def test_progress_is_told_while_sampling_and_editing(client: Client, template: dict) -> None:
    prompt = only(template, "edited")
    prompt[find(prompt, "KSampler")]["inputs"]["seed"] = 77
    prompt[find(prompt, "SDAEditEmbedding")]["inputs"]["mode"] = "autoregressive"
    seen = {}
    client.run(prompt, lambda node, step, steps: seen.setdefault(prompt[node]["class_type"], []).append((step, steps)))
    assert (20, 20) in seen["KSampler"]
    tokens = seen["SDAEditEmbedding"]  # newer cores tell no more than ten of them a second
    assert len(tokens) > 2 and tokens == sorted(tokens) and tokens[-1] == (128, 128)
