"""Damaged and hostile files of every kind, and what becomes of them: a seeded fuzzer of the loaders.

A file is changed in one way and comes with one of three seals: `kept` (the digest as it was saved: damage on the way), `none` (a
file from before there were digests) or `new` (the digest computed anew: a stranger's own file). `python3 run.py bench files`
tries 10,000 of them; the suite a few hundred.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import signal
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from semantic_diffusion_adapter.kernels import base_files, checkpoint, embedding_file
from semantic_diffusion_adapter.kernels.adapter import Adapter, AdapterConfig, read_adapter
from semantic_diffusion_adapter.kernels.edit_decoder import (
    LLMEditDecoderConfig,
    T5EditDecoderConfig,
    build_edit_decoder,
    read_edit_decoder,
)
from semantic_diffusion_adapter.kernels.embedding import MASK_SIDE, SemanticEmbedding
from semantic_diffusion_adapter.kernels.vision.towers import TowerConfig, build_tower, load_tower_file

SECONDS = 8
SEALS = ("kept", "none", "new")
TABLE = [[1, 1, 2], [2, 2, 1]]
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
TRANSFORMER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
VIT = {"image_size": 28, "layers": 2, "width": 16, "head_width": 8, "patch_size": 14}
INTERN = {"intermediate_size": 32, "attention_bias": True, "image_size": [28, 28], "patch_size": [14, 14]}
ARCHITECTURES = {
    "open_clip": {"embed_dim": 8, "quick_gelu": True, "vision_cfg": VIT},
    "dinov2": TRANSFORMER | {"image_size": 28, "patch_size": 14, "num_register_tokens": 2},
    "internvit": TRANSFORMER | INTERN,
}
TOWERS = {
    kind: TowerConfig(kind, kind, architecture, 28, 14, 16, layer=-2 if kind == "internvit" else -1, **HALF)
    for kind, architecture in ARCHITECTURES.items()
}
BASE = {
    "flux": {
        "hidden_size": 16, "num_heads": 2, "depth": 1, "depth_single_blocks": 1, "axes_dim": [4, 2, 2], "context_in_dim": 12,
        "vec_in_dim": 12, "in_channels": 8, "mlp_ratio": 4.0, "theta": 10000, "qkv_bias": True, "guidance_embed": False, "patch_size": 2,
        "latent": {"channels": 8, "scale": 0.7, "shift": 0.1, "downsample": 8}, "sampling_shift_mu": 0.5,
    },
    "vae": {
        "in_channels": 3, "out_channels": 3, "latent_channels": 4, "sample_size": 64, "norm_num_groups": 4, "layers_per_block": 1,
        "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [32, 32, 32, 32], "use_quant_conv": False, "use_post_quant_conv": False,
    },
    "text_encoder": {
        "t5": {"d_model": 12, "d_kv": 4, "d_ff": 16, "num_heads": 3, "num_layers": 2, "vocab_size": 5, "feed_forward_proj": "gated-gelu",
               "relative_attention_num_buckets": 32, "dropout_rate": 0.0, "pad_token_id": 0, "eos_token_id": 1},
        "vocabulary": ["<pad>", "</s>", "<unk>", "a", "red"], "length": 7,
    },
}  # fmt: skip
KINDS = ("adapter", "editor_t5", "editor_llm", *TOWERS, *BASE, "embedding")


def write(kind: str, path: Path) -> None:
    """A small whole file of one kind, by the writers that training and the nodes use."""
    torch.manual_seed(0)
    if kind == "embedding":
        embedding_file.save(path, SemanticEmbedding(
            torch.randn(2, 3, 8), torch.tensor([[0, 0, 1, 1], [0, 0, 0.5, 1], [0.5, 0, 1, 1.0]]), torch.tensor([0, 1, 1]),
            torch.tensor([0.0, -1.0, -torch.inf]), torch.randn(2, 5), {"adapter": "a.safetensors", "pooled_width": 5, "edits": ["x"]},
            torch.rand(1, MASK_SIDE, MASK_SIDE), torch.tensor([0, -1, 0])), b"jpeg", {"workflow": "{}"})  # fmt: skip
    elif kind in BASE:
        shapes = base_files.CONFIGS[kind](**BASE[kind]).shapes()
        checkpoint.save(
            path,
            {name: torch.randn(shape) for name, shape in shapes.items()},
            kind,
            BASE[kind],
            dtype=torch.int8,
            step=3,
        )
    elif kind in TOWERS:
        tower = TOWERS[kind]
        checkpoint.save(
            path, build_tower(tower).model.state_dict(), "vision_tower", tower.to_json(), dtype=torch.float16, step=3
        )
    elif kind == "adapter":
        config = AdapterConfig(
            TABLE, (TOWERS["open_clip"], TOWERS["dinov2"]), width=16, heads=2, layers=1, out_dim=12, pooled_dim=6
        )
        checkpoint.save(path, Adapter(config).state_dict(), kind, config.to_json(), dtype=torch.int8, hierarchy=TABLE,
                        widths={"text": 12, "pooled": 6})  # fmt: skip
    else:
        llm = {"model_type": "qwen3", "intermediate_size": 24, "num_key_value_heads": 1, "head_dim": 8, **TRANSFORMER}
        config = (T5EditDecoderConfig(12, 12, TABLE, width=16, heads=2, layers=1) if kind == "editor_t5"
                  else LLMEditDecoderConfig(12, 12, TABLE, llm))  # fmt: skip
        decoder = build_edit_decoder(config)
        checkpoint.save(
            path, decoder.state_dict(), "edit_decoder", decoder.config.to_json(), dtype=torch.float16, hierarchy=TABLE
        )


@dataclass(frozen=True)
class Loaded:
    """What a loader made of a file: names with dtypes and shapes, the hash of the numbers, and what the record said."""

    structure: dict[str, tuple]
    numbers: str
    words: str


def describe(tensors: dict[str, torch.Tensor], words: Any) -> Loaded:
    hashed = hashlib.sha256()
    for name in sorted(tensors):
        hashed.update(tensors[name].detach().float().contiguous().numpy().tobytes())
    structure = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    return Loaded(structure, hashed.hexdigest(), json.dumps(words, sort_keys=True, default=str))


def _module(read: Callable) -> Callable[[Path], Loaded]:
    def load(path: Path) -> Loaded:
        module, record = read(path)
        return describe(module.state_dict(), [module.config.to_json(), record.get("widths")])

    return load


def _embedding(path: Path) -> Loaded:
    made, _ = embedding_file.load(path)
    return describe({name: value for name, value in vars(made).items() if isinstance(value, torch.Tensor)}, made.source)


def _base(kind: str) -> Callable[[Path], Loaded]:
    def load(path: Path) -> Loaded:
        tensors, record = base_files.load(path, kind)
        return describe(tensors, record["config"])

    return load


LOADERS: dict[str, Callable[[Path], Loaded]] = {
    "adapter": _module(read_adapter),
    "editor_t5": _module(read_edit_decoder),
    "editor_llm": _module(read_edit_decoder),
    **dict.fromkeys(TOWERS, _module(load_tower_file)),
    **{kind: _base(kind) for kind in BASE},
    "embedding": _embedding,
}


def through_core(folder: str | None = None) -> dict[str, Callable[[Path], Loaded]]:
    """LOADERS, with core building the base's networks. folder: of a ComfyUI, for a process that has none yet."""
    if folder is not None:
        sys.path.insert(0, folder)
        import comfy.cli_args

        comfy.cli_args.args.cpu = True  # before anything looks for a device
    from semantic_diffusion_adapter.nodes.host import miniature, text_encoder

    makers = {"flux": (miniature.load_flux, lambda model: model.model), "vae": (miniature.load_vae, lambda vae: vae.first_stage_model),
              "text_encoder": (text_encoder.load_clip, lambda clip: clip.cond_stage_model)}  # fmt: skip

    def loader(kind: str) -> Callable[[Path], Loaded]:
        make, network = makers[kind]
        return lambda path: describe(
            network(make(str(path))).state_dict(), checkpoint.read_header(path, kind)["config"]
        )

    return LOADERS | {kind: loader(kind) for kind in makers}


class Hang(BaseException):
    """A load that took more than SECONDS."""


@contextlib.contextmanager
def patience() -> Iterator[None]:
    def ring(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


OUTCOMES = ("refused", "unchanged", "other words", "other numbers", "other structure", "traceback", "hang")


def outcome(load: Callable[[Path], Loaded], path: Path, original: Loaded) -> tuple[str, str]:
    """(one of OUTCOMES, what was said)."""
    try:
        with patience():
            loaded = load(path)
    except Hang:
        return "hang", ""
    except Exception as error:
        text = str(error)
        sentence = type(error) is ValueError and text.endswith(".") and text.isprintable() and len(text) < 700
        return ("refused" if sentence else "traceback"), f"{type(error).__name__}: {text}"
    if loaded.structure != original.structure:
        return "other structure", ""
    if loaded.numbers != original.numbers:
        return "other numbers", ""
    return ("unchanged" if loaded.words == original.words else "other words"), ""


def faults(seal: str, mutation: str, found: str) -> bool:
    """Whether an outcome is a fault. What no digest speaks for may have other numbers, but none read in another dtype; who seals a
    file anew may choose the dtype."""
    if found in ("traceback", "hang"):
        return True
    if found == "other structure":
        return (seal, mutation) != ("new", "retyped")
    if seal == "kept":
        return found in ("other words", "other numbers")
    return seal == "none" and mutation == "retyped" and found == "other numbers"


@dataclass
class File:
    """A safetensors file taken apart. tensors: name -> [dtype, shape, bytes]."""

    record: Any
    tensors: dict[str, list]
    metadata: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, path: Path) -> File:
        data = path.read_bytes()
        start = 8 + struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8:start])
        metadata = header.pop("__metadata__")
        tensors = {name: [e["dtype"], e["shape"], data[start + e["data_offsets"][0] : start + e["data_offsets"][1]]]
                   for name, e in header.items()}  # fmt: skip
        return cls(json.loads(metadata.pop("sda")), tensors, metadata)

    def seal(self, how: str) -> None:
        if how == "kept" or not isinstance(self.record, dict):
            return
        self.record.pop("digest", None)
        if how == "new":
            table = sorted([name, dtype, *shape] for name, (dtype, shape, _) in self.tensors.items())
            layout = json.dumps([self.record, table], sort_keys=True).encode()
            content = b"".join(self.tensors[name][2] for name in sorted(self.tensors))
            hashes = [hashlib.blake2b(data, digest_size=16).hexdigest() for data in (layout, content)]
            self.record["digest"] = dict(zip(("layout", "content"), hashes))

    def header(self) -> dict[str, Any]:
        made, at = {"__metadata__": {**self.metadata, "sda": json.dumps(self.record)}}, 0
        for name, (dtype, shape, data) in self.tensors.items():
            made[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at := at + len(data)]}
        return made

    def data(self) -> bytes:
        return b"".join(data for _, _, data in self.tensors.values())
