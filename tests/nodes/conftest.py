"""A real ComfyUI in this process (no server), toy models of its own classes, and a random miniature in the shipped formats."""

from __future__ import annotations

import asyncio
import copy
import math
import os
import re
import sys
import uuid
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
CORE = Path(os.environ.get("COMFYUI_PATH") or ROOT / ".host" / "ComfyUI")

if (CORE / "main.py").is_file():
    sys.path.insert(0, str(CORE))
    import comfy.cli_args

    comfy.cli_args.args.cpu = True  # before anything looks for a device: these tests are for the CPU

FLUX = {
    "hidden_size": 64, "num_heads": 2, "depth": 2, "depth_single_blocks": 2, "axes_dim": [8, 12, 12],
    "context_in_dim": 24, "vec_in_dim": 24, "in_channels": 8, "mlp_ratio": 4.0, "theta": 10000, "qkv_bias": True,
    "guidance_embed": False, "patch_size": 2, "latent": {"channels": 8, "scale": 0.7, "shift": 0.1, "downsample": 8},
    "sampling_shift_mu": 0.5,
}  # fmt: skip
T5 = {
    "d_model": 24, "d_kv": 6, "d_ff": 40, "num_heads": 4, "num_layers": 2, "vocab_size": 9, "feed_forward_proj": "gated-gelu",
    "relative_attention_num_buckets": 32, "dropout_rate": 0.0, "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
WORDS = ["<pad>", "</s>", "<unk>", "a", "red", "circle", "remove", "the", "2"]
VAE = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 8, "sample_size": 64, "norm_num_groups": 4,
    "layers_per_block": 1, "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [32, 64, 96, 128], "use_quant_conv": False, "use_post_quant_conv": False,
}  # fmt: skip


def scramble(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Random weights everywhere, also where the network starts at zero: nothing may depend on lucky initial values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = 1 / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.2
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(noise if parameter.ndim > 1 else noise + 0.5)
    return module.eval()


def bfl_keys(state_dict: dict) -> dict:
    """The keys of published Flux files: newer cores call the norms' weight `weight`, the files say `scale`."""
    return {name.replace("_norm.weight", "_norm.scale"): tensor for name, tensor in state_dict.items()}


def toy_network(seed: int = 0, **changes):
    import comfy.ldm.flux.model
    import comfy.ops

    numbers = {k: v for k, v in (FLUX | changes).items() if k not in ("latent", "sampling_shift_mu")}
    defaults = {"txt_ids_dims": []} if "txt_ids_dims" in comfy.ldm.flux.model.FluxParams.__dataclass_fields__ else {}
    network = comfy.ldm.flux.model.Flux(
        **(defaults | numbers), out_channels=numbers["in_channels"], dtype=torch.float32, operations=comfy.ops.manual_cast
    )
    return scramble(network, seed)


class GateLora(torch.nn.Module):
    """The tensors of a gate's LoRA of rank 4 for the toy Flux."""

    def __init__(self) -> None:
        from semantic_diffusion_adapter.training.frozen.flux import build_flux
        from semantic_diffusion_adapter.training.objectives.gate import LAYERS

        super().__init__()
        self.layers = {
            name: layer for name, layer in build_flux(FLUX).named_modules() if re.fullmatch(LAYERS, name)
        }
        self.parts = torch.nn.ParameterList(
            torch.empty(shape) for layer in self.layers.values() for shape in ((4, layer.in_features), (layer.out_features, 4))
        )

    def state_dict(self) -> dict[str, torch.Tensor]:
        names = [f"transformer.{name}.lora_{part}.weight" for name in self.layers for part in "AB"]
        return dict(zip(names, self.parts))


def write_random_miniature(root: Path) -> None:
    """assets/miniature with every file of the real one, at still smaller widths and with random weights."""
    import diffusers
    import transformers
    from semantic_diffusion_adapter.kernels import checkpoint
    from semantic_diffusion_adapter.kernels.adapter import Adapter, AdapterConfig
    from semantic_diffusion_adapter.kernels.edit_decoder import T5EditDecoder, T5EditDecoderConfig
    from semantic_diffusion_adapter.kernels.hierarchy import PRESETS
    from semantic_diffusion_adapter.kernels.vision.towers import TowerConfig, build_tower

    half = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    vision = {"image_size": 28, "patch_size": 14, "layers": 2, "width": 16, "head_width": 8}
    towers = (
        TowerConfig("miniature_clip", "open_clip", {"embed_dim": 8, "vision_cfg": vision}, 28, 14, 16, **half),
        TowerConfig(
            "miniature_dinov2", "dinov2",
            {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14},
            28, 14, 12, **half,
        ),
    )  # fmt: skip
    table = PRESETS["tree128"].to_json()
    adapter = AdapterConfig(hierarchy=table, towers=towers, width=24, heads=2, layers=2, out_dim=24)
    editor = T5EditDecoderConfig(dim=24, text_dim=24, hierarchy=table, width=16, heads=2, layers=1)

    def write(name: str, module, kind: str, config: dict, seed: int, dtype=torch.float16, **fields) -> None:
        state = scramble(module, seed).state_dict()
        path = root / f"{name}.safetensors"
        checkpoint.save(path, bfl_keys(state) if kind == "flux" else state, kind, config, dtype=dtype, **fields)

    write("diffusion_models/miniature_flux", toy_network(), "flux", FLUX, 1, dtype=torch.int8)
    write("vae/miniature_vae", diffusers.AutoencoderKL(**VAE), "vae", VAE, 2)
    text = {"t5": T5, "vocabulary": WORDS, "length": 7}
    write("text_encoders/miniature_t5", transformers.T5EncoderModel(transformers.T5Config(**T5)), "text_encoder", text, 3)
    for seed, tower in enumerate(towers):
        write(f"clip_vision/{tower.id}", build_tower(tower).model, "vision_tower", tower.to_json(), seed)
    widths = {"text": 24, "pooled": 24}
    write("semantic_adapters/miniature_tree128", Adapter(adapter), "adapter", adapter.to_json(), 4, widths=widths)
    write("edit_decoders/miniature_editor", T5EditDecoder(editor), "edit_decoder", editor.to_json(), 5)
    write("loras/miniature_gate", GateLora(), "gate_lora", {"rank": 4}, 6)
    Image.new("RGB", (128, 128), (190, 80, 60)).save(root / "scene.png")


@pytest.fixture(scope="session")
def random_miniature(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("miniature")
    write_random_miniature(root)
    return root


@pytest.fixture
def assets(random_miniature, monkeypatch) -> Path:
    """The random miniature in place of assets/miniature, and its folders in a fresh copy of core's list of folders."""
    import folder_paths
    from semantic_diffusion_adapter.nodes.host import folders

    known = {name: (list(paths), set(kinds)) for name, (paths, kinds) in folder_paths.folder_names_and_paths.items()}
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", known)
    monkeypatch.setattr(folders, "MINIATURE", random_miniature)
    folder_paths.filename_list_cache.clear()
    folders.register()
    yield random_miniature
    folder_paths.filename_list_cache.clear()


@pytest.fixture
def toy() -> SimpleNamespace:
    """A toy MODEL of core's Flux class, and what sampling it needs."""
    import comfy.latent_formats
    import comfy.model_patcher
    import comfy.supported_models

    network = toy_network()
    numbers = {k: v for k, v in FLUX.items() if k not in ("latent", "sampling_shift_mu")}
    config = comfy.supported_models.Flux(
        {"image_model": "flux", "disable_unet_model_creation": True, "out_channels": 8, **numbers}
    )
    config.latent_format = comfy.latent_formats.LatentFormat()
    config.latent_format.latent_channels = 8
    config.set_inference_dtype(torch.float32, None)
    base = config.get_model({})
    base.diffusion_model = network
    cpu = torch.device("cpu")
    model = comfy.model_patcher.ModelPatcher(base, load_device=cpu, offload_device=cpu)
    return SimpleNamespace(
        model=model, network=network, sample=sample, plain=plain, dense=dense, without_layout=without_layout,
        make=toy_network,
    )  # fmt: skip


def plain(length: int = 5, seed: int = 9) -> list:
    """An ordinary text conditioning."""
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(1, length, 24, generator=generator), {"pooled_output": torch.randn(1, 24, generator=generator)}]]


def without_layout(positive: list) -> list:
    """What an unpatched Flux reads of a conditioning."""
    return [[tokens, {k: v for k, v in settings.items() if k != "model_conds"}] for tokens, settings in positive]


def dense(
    model, e, grid: tuple[int, int], text: int, references: int = 0, mixing: str = "all",
    where=lambda kind, index: True, calls: list | None = None,
):  # fmt: skip
    """The oracle: a clone of an unpatched MODEL whose every attention is core's mathematics in float64, written out, with one
    dense mask `where` it belongs. The shapes of q are noted in `calls`."""
    from semantic_diffusion_adapter.kernels import visibility

    bias = visibility.region_bias(e.boxes, e.strengths, grid, text, references, mixing, e.masks, e.masked_by).double()

    def override(func, q, k, v, heads, transformer_options, **kwargs):
        mask = torch.zeros(q.shape[2], q.shape[2], dtype=torch.float64)
        if where(transformer_options["block_type"], transformer_options["block_index"]):
            mask[:, : e.token_count] = bias
        logits = q.double() @ k.double().transpose(-1, -2) / math.sqrt(q.shape[-1]) + mask
        if calls is not None:
            calls.append(q.shape)
        return (logits.softmax(-1) @ v.double()).to(q.dtype).transpose(1, 2).flatten(2)

    clone = model.clone()
    clone.model_options["transformer_options"] = {"optimized_attention_override": override}
    return clone


def sample(model, positive, negative=None, size=(8, 8), batch: int = 1, cfg: float = 1.0, steps: int = 2, seed: int = 0):
    """Latent [batch, C, *size] that KSampler's own function gives (euler, simple)."""
    import comfy.sample

    channels = model.get_model_object("latent_format").latent_channels
    latent = torch.zeros(batch, channels, *size)
    noise = comfy.sample.prepare_noise(latent, seed)
    with torch.no_grad():
        return comfy.sample.sample(
            model, noise, steps, cfg, "euler", "simple", positive, negative or positive, latent,
            denoise=1.0, disable_pbar=True, seed=seed,
        )  # fmt: skip


@pytest.fixture
def embedding():
    """embedding(preset="tree64", batch=1, width=24, seed=0): random tokens, every strength as trained."""
    from semantic_diffusion_adapter.kernels.embedding import from_hierarchy
    from semantic_diffusion_adapter.kernels.hierarchy import hierarchy

    def make(preset="tree64", batch: int = 1, width: int = 24, seed: int = 0, pooled: bool = True):
        generator = torch.Generator().manual_seed(seed)
        grids = hierarchy(preset)
        tokens = torch.randn(batch, grids.token_count, width, generator=generator)
        return from_hierarchy(tokens, grids, torch.randn(batch, width, generator=generator) if pooled else None)

    return make


@pytest.fixture
def clip(assets):
    """The random miniature's CLIP."""
    from semantic_diffusion_adapter.nodes.host import miniature, text_encoder

    return text_encoder.load_clip(str(assets / miniature.TEXT_ENCODER))


class Listener:
    """What a PromptExecutor needs of a server: somebody to tell."""

    client_id = "test"
    last_node_id = None

    def __init__(self):
        self.messages = []

    def send_sync(self, event, data, client_id=None):
        self.messages.append((event, data))

    def send_progress_text(self, *arguments):
        pass

    def executed(self) -> set[str]:
        return {data["node"] for event, data in self.messages if event == "executing" and data["node"]}

    def errors(self) -> list[str]:
        return [data["exception_message"].strip() for event, data in self.messages if event == "execution_error"]


@pytest.fixture
def queue() -> Callable:
    """queue(graph, extra data) -> (nodes that ran, sentences of the errors): core's own validation, execution, and one cache
    for all calls."""
    import execution

    listener = Listener()
    # Every core asks for other limits of its cache by name; none of them counts here.
    executor = execution.PromptExecutor(listener, cache_args=defaultdict(int))

    def run(graph: dict, **extra) -> tuple[set[str], list[str]]:
        graph, identity = copy.deepcopy(graph), str(uuid.uuid4())
        valid, _, outputs, wrong = asyncio.run(execution.validate_prompt(identity, graph, None))
        if not valid:
            return set(), [error["details"] for node in wrong.values() for error in node["errors"]]
        listener.messages.clear()
        executor.execute(graph, identity, {"client_id": "test", **extra}, outputs)
        return listener.executed(), listener.errors()

    return run
