"""An artist's mistakes over the API of a real ComfyUI: each is answered with one sentence that names the thing and the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from semantic_diffusion_adapter.kernels import embedding_file
from semantic_diffusion_adapter.kernels.embedding import from_hierarchy
from semantic_diffusion_adapter.kernels.hierarchy import hierarchy
from semantic_diffusion_adapter.runner.client import Client
from semantic_diffusion_adapter.runner.environment import Failure
from semantic_diffusion_adapter.runner.server import Server

pytestmark = pytest.mark.host

ABSENT = "absent.safetensors"


def node(kind: str, **inputs: object) -> dict:
    return {"class_type": kind, "inputs": inputs}


MINIATURE = node("SDALoadMiniature")
ENCODERS = {f"{what}_{slot}": value for slot in (1, 2, 3) for what, value in (("encoder", "none"), ("model", "from file"))}
VISION = node("SDALoadVisionEncoders", **ENCODERS | {"encoder_1": ["miniature", 3], "encoder_2": ["miniature", 4]})
FEATURES = node("SDAEncodeImage", vision=["vision", 0], image=["miniature", 7])
BUILT = node("SDABuildEmbedding", adapter=["adapter", 0], features=["features", 0], preset="tree64")
ENCODED = {
    "miniature": MINIATURE, "vision": VISION, "features": FEATURES, "built": BUILT,
    "adapter": node("SDALoadAdapter", adapter=["miniature", 5]),
}  # fmt: skip


def told(client: Client, prompt: dict, kind: str, words: str) -> None:
    """Running it ends in a sentence of the node of this class, which holds these words."""
    prompt = prompt | {"end": prompt.get("end", node("SDAPreviewEmbedding", embedding=["embedding", 0], measure="strength"))}
    with pytest.raises(Failure) as error:
        client.run(prompt)
    message = str(error.value)
    assert message.startswith(f"{kind}: ") and words in message, message
    assert "\n" not in message and message.endswith("."), message


@pytest.mark.parametrize(
    ("spoilt", "kind", "words"),
    [
        ({"adapter": node("SDALoadAdapter", adapter=ABSENT)}, "SDALoadAdapter", "models/semantic_adapters: put the file there"),
        (
            {"adapter": node("SDALoadAdapter", adapter=["miniature", 6])},
            "SDALoadAdapter",
            "There is no 'miniature_editor.safetensors' in models/semantic_adapters",
        ),
        (
            {"vision": node("SDALoadVisionEncoders", **ENCODERS | {"encoder_1": ABSENT})},
            "SDALoadVisionEncoders",
            "models/clip_vision: put the file there",
        ),
        (
            {"vision": node("SDALoadVisionEncoders", **ENCODERS | {"encoder_1": ["miniature", 3]})},
            "SDABuildEmbedding",
            "load 'miniature-dinov2' in Load Vision Encoders",
        ),
        ({"vision": node("SDALoadVisionEncoders", **ENCODERS)}, "SDALoadVisionEncoders", "No vision encoder is chosen"),
    ],
    ids=["no adapter", "no adapter but a decoder", "no encoder", "an encoder too few", "no encoder at all"],
)
def test_the_wrong_file(client: Client, miniature: Path, spoilt: dict, kind: str, words: str) -> None:
    told(client, ENCODED | spoilt | {"end": node("SDAPreviewEmbedding", embedding=["built", 0], measure="strength")}, kind, words)


@pytest.fixture
def loaded(client: Client, tmp_path: Path):
    """loaded(width, adapter) -> a Load Embedding node whose file says so."""

    def make(width: int, adapter: str) -> dict:
        grids = hierarchy("tree64")
        tokens = torch.randn(1, grids.token_count, width, generator=torch.Generator().manual_seed(0))
        path = tmp_path / f"{width} {adapter}"
        embedding_file.save(path, from_hierarchy(tokens, grids, None, {"adapter": adapter}))
        return node("SDALoadEmbedding", file=client.upload(path))

    return make


@pytest.mark.parametrize(
    ("prefix", "words"),
    [
        ("", "is empty: write a name"),
        ("../mine", "leads out of the output folder: write a name"),
        ("a" * 300, "is too long (300 bytes): shorten it"),
        ("a\0b", "a character that cannot be seen: type it again"),
        ("mine/<img src=x>", "the sign <, which Windows cannot store in a name: leave it out"),
        ("con", "'con', which Windows keeps for a device: choose another word"),
        ("...", "nothing but dots and spaces: give it letters"),
    ],
)
def test_a_name_that_cannot_be_saved(client: Client, loaded, prefix: str, words: str) -> None:
    save = node("SDASaveEmbedding", embedding=["embedding", 0], filename_prefix=prefix)
    told(client, {"embedding": loaded(24, "one.safetensors"), "end": save}, "SDASaveEmbedding", words)


def test_core_offers_no_tower_of_the_miniature(nodes: dict) -> None:
    offered = nodes["CLIPVisionLoader"]["input"]["required"]["clip_name"]
    assert "miniature_clip" not in str(offered)
    assert "miniature_clip" in str(nodes["SDALoadVisionEncoders"]["input"]["required"]["encoder_1"])


def test_embeddings_of_different_adapters(client: Client, loaded) -> None:
    blend = node(
        "SDABlendEmbeddings", embedding_a=["one", 0], embedding_b=["other", 0], amount=0.5, mode="slerp", levels="all"
    )  # fmt: skip
    prompt = {"one": loaded(192, "one.safetensors"), "other": loaded(192, "other.safetensors"), "embedding": blend}
    told(client, prompt, "SDABlendEmbeddings", "different adapters (one.safetensors and other.safetensors)")
    told(client, prompt | {"other": loaded(24, "one.safetensors")}, "SDABlendEmbeddings", "use adapters of the same model")
    blend["inputs"]["levels"] = "fine"
    told(client, prompt, "SDABlendEmbeddings", "write `all`")


def test_an_adapter_of_another_model(client: Client, miniature: Path, loaded) -> None:
    times = {"start_percent": 0.0, "end_percent": 1.0}
    prompt = {
        "miniature": MINIATURE,
        "embedding": loaded(24, "one.safetensors"),
        "positive": node("SDAEmbeddingToConditioning", embedding=["embedding", 0]),
        "model": node("SDAMaskedAttention", model=["miniature", 0], strength=1.0, token_mixing="all", blocks="all", **times),
        "latent": node("EmptyLatentImage", width=128, height=128, batch_size=1),
        "sampled": node(
            "KSampler", model=["model", 0], positive=["positive", 0], negative=["positive", 0], latent_image=["latent", 0],
            seed=0, steps=1, cfg=1.0, sampler_name="euler", scheduler="simple", denoise=1.0,
        ),
        "picture": node("VAEDecode", samples=["sampled", 0], vae=["miniature", 2]),
        "end": node("PreviewImage", images=["picture", 0]),
    }  # fmt: skip
    told(client, prompt, "KSampler", "width 24 and this model reads 192: use an adapter that was trained for this model")
    prompt["model"]["inputs"]["start_percent"], prompt["model"]["inputs"]["end_percent"] = 0.8, 0.2
    told(client, prompt, "SDAMaskedAttention", "must not be after end_percent")


def test_an_edit_decoder_of_another_adapter(client: Client, miniature: Path, loaded) -> None:
    prompt = {
        "miniature": MINIATURE,
        "loaded": loaded(24, "one.safetensors"),
        "editor": node("SDALoadEditDecoder", edit_decoder=["miniature", 6]),
        "embedding": node(
            "SDAEditEmbedding", embedding=["loaded", 0], clip=["miniature", 1], edit_decoder=["editor", 0],
            instruction="remove the red circle", mode="parallel",
        ),
    }  # fmt: skip
    told(client, prompt, "SDAEditEmbedding", "use the edit decoder that belongs to the adapter")
    prompt["editor"]["inputs"]["edit_decoder"] = ABSENT
    told(client, prompt, "SDALoadEditDecoder", "models/edit_decoders: put the file there")
    prompt["editor"]["inputs"]["edit_decoder"], prompt["embedding"]["inputs"]["instruction"] = ["miniature", 6], " "
    told(client, prompt, "SDAEditEmbedding", "instruction is empty")


@pytest.fixture
def redux_files(server: Server):
    """A style model of FLUX.1 Redux's shape, and as much of a CLIP ViT-L as core needs to know it by."""
    half = {"dtype": torch.float16}
    files = {
        "style_models/redux.safetensors": {
            "redux_up.weight": torch.zeros(12288, 1152, **half), "redux_up.bias": torch.zeros(12288, **half),
            "redux_down.weight": torch.zeros(4096, 12288, **half), "redux_down.bias": torch.zeros(4096, **half),
        },
        "clip_vision/vit_l.safetensors": {
            "vision_model.embeddings.position_embedding.weight": torch.zeros(257, 1024, **half),
            "vision_model.encoder.layers.0.layer_norm1.weight": torch.zeros(1024, **half),
            "vision_model.encoder.layers.22.layer_norm1.weight": torch.zeros(1024, **half),
        },
    }  # fmt: skip
    paths = [server.base / "models" / name for name in files]
    for path, tensors in zip(paths, files.values()):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path)
    yield
    for path in paths:
        path.unlink()


def test_a_clip_vision_model_that_redux_does_not_read(client: Client, miniature: Path, redux_files: None) -> None:
    prompt = {
        "miniature": MINIATURE,
        "style": node("StyleModelLoader", style_model_name="redux.safetensors"),
        "tower": node("CLIPVisionLoader", clip_name="vit_l.safetensors"),
        "embedding": node(
            "SDAEncodeRedux", image=["miniature", 7], style_model=["style", 0], clip_vision=["tower", 0], preset="tree128",
            whole=1.0, quarters=1.0, sixteenths=1.0,
        ),
    }  # fmt: skip
    words = "gives tokens of width 1024 and the style model reads 1152: load sigclip_vision_patch14_384"
    told(client, prompt, "SDAEncodeRedux", words)
