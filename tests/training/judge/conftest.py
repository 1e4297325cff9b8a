"""Real encoders at toy width, in the folders in which their libraries publish them, and sample photographs."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

pytest.importorskip("torchmetrics", reason="torchmetrics is not installed: pip install -e '.[training]'")


def photographs() -> dict[str, np.ndarray]:
    """Photographs [H, W, 3] uint8 that lie inside the packages themselves."""
    import skimage
    import sklearn.datasets

    here = Path(skimage.__file__).parent / "data"
    found = {name: np.asarray(Image.open(here / f"{name}.png").convert("RGB")) for name in ("astronaut", "chelsea", "coffee")}
    return found | {name: sklearn.datasets.load_sample_image(f"{name}.jpg") for name in ("china", "flower")}


@pytest.fixture(scope="session")
def photos() -> dict[str, np.ndarray]:
    return photographs()


@pytest.fixture(scope="session")
def encoders(tmp_path_factory) -> dict[str, Path]:
    """{"dino": transformers' ViT, "clip": transformers' CLIP, "open_clip": open_clip's CLIP} with random weights."""
    import open_clip
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer, ViTConfig, ViTImageProcessor, ViTModel

    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("encoders")
    folders = {name: root / name for name in ("dino", "clip", "open_clip")}
    ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=64,
                       patch_size=16)).save_pretrained(folders["dino"])
    ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folders["dino"])

    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 49408,
            "max_position_embeddings": 16, "eos_token_id": 49407, "bos_token_id": 49406}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32,
              "patch_size": 16}
    words = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    vocabulary = {w: n for n, w in enumerate([*words, *(f"{w}</w>" for w in words)])}
    vocabulary |= {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folders["clip"])
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folders["clip"])
    CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folders["clip"])

    architecture = {"embed_dim": 16, "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
                    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}}
    folders["open_clip"].mkdir()
    record = {"model_cfg": architecture, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (folders["open_clip"] / "open_clip_config.json").write_text(json.dumps(record), encoding="utf-8")
    weights = open_clip.CLIP(**architecture).state_dict()
    save_file({k: v.contiguous() for k, v in weights.items()}, folders["open_clip"] / "open_clip_model.safetensors")
    return folders


@pytest.fixture(scope="session")
def miniature_files() -> Path:
    """The folder of the shipped weights."""
    folder = Path(__file__).resolve().parents[3] / "assets" / "miniature"
    if not (folder / "semantic_adapters" / "miniature_tree128.safetensors").is_file():
        pytest.skip("the miniature's weights are not in assets/miniature")
    return folder


@pytest.fixture
def prepared_edits():
    """prepared_edits(folder, [(source, target, instruction)], **columns): a set as `sda prepare-edits` leaves it, at 128 px."""
    from semantic_diffusion_adapter.training.data import index

    def png(picture: np.ndarray) -> bytes:
        stream = io.BytesIO()
        Image.fromarray(picture).save(stream, "PNG")
        return stream.getvalue()

    def prepare(folder: Path, edits: list[tuple[np.ndarray, np.ndarray, str]], **columns) -> Path:
        (folder / "shards").mkdir(parents=True)
        rows = []
        with tarfile.open(folder / "shards" / "000000.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for place, (source, target, instruction) in enumerate(edits):
                row = {"key": f"{place:09}", "origin": f"edit {place}", "shard": "shards/000000.tar", "caption": instruction,
                       "height": source.shape[0], "width": source.shape[1], "mask_offset": 0, "mask_length": 0,
                       "source_caption": "", "target_caption": "", "bucket_128": index.bucket_of(*source.shape[:2], 128)}
                for prefix, picture in (("", source), ("target_", target)):
                    data = png(picture)
                    info = tarfile.TarInfo(f"{place:09}.{prefix}png")
                    info.size = len(data)
                    row |= {f"{prefix}offset": tar.offset + 512, f"{prefix}length": len(data),
                            f"{prefix}sha256": hashlib.sha256(data).digest()}
                    tar.addfile(info, io.BytesIO(data))
                rows.append(row | {name: values[place] for name, values in columns.items()})
        pq.write_table(pa.Table.from_pylist(rows, index.schema(index.EDITS, [128])), folder / index.NAME)
        return folder

    return prepare
