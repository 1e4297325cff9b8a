"""All that `sda train adapter` reads, at toy width: a base, its VAE, two towers, text statistics and prepared pictures."""
from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

TOWERS = {"clip": ("open_clip", {"embed_dim": 16, "vision_cfg": {"image_size": 28, "layers": 1, "width": 16, "head_width": 8,
                                                                 "patch_size": 14}}),
          "dino": ("dinov2", {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
                              "mlp_ratio": 2})}
FLUX = dict(hidden_size=48, num_heads=2, depth=1, depth_single_blocks=1, axes_dim=[8, 8, 8], context_in_dim=20, vec_in_dim=6,
            in_channels=4, patch_size=2, guidance_embed=True)


def write_index(folder: Path, sizes: list[tuple[int, int]], resolutions=(64,)) -> None:
    """Pictures of noise of these (height, width) in one shard, with their index."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image
    from semantic_diffusion_adapter.training.data import index

    (folder / "shards").mkdir(parents=True)
    draw, rows = np.random.default_rng(0), []
    with tarfile.open(folder / "shards" / "000000.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for i, (height, width) in enumerate(sizes):
            coarse = draw.integers(0, 256, (4, 4, 3), np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(coarse).resize((width, height)).save(buffer, "JPEG")
            data = buffer.getvalue()
            info = tarfile.TarInfo(f"{i:09}.jpg")
            info.size = len(data)
            rows.append({"key": f"{i:09}", "origin": f"picture {i}", "shard": "shards/000000.tar", "offset": tar.offset + 512,
                         "length": len(data), "sha256": hashlib.sha256(data).digest(), "width": width, "height": height,
                         "caption": f"picture {i}", **{f"bucket_{r}": index.bucket_of(height, width, r) for r in resolutions}})
            tar.addfile(info, io.BytesIO(data))
    pq.write_table(pa.Table.from_pylist(rows, index.schema(index.PICTURES, resolutions)), folder / index.NAME)


def write_parts(folder: Path, flux: dict, base: bool = True) -> Path:
    """Base (where it is wanted), VAE, towers and text statistics of random weights, in our files."""
    from diffusers import AutoencoderKL
    from semantic_diffusion_adapter.kernels import checkpoint
    from semantic_diffusion_adapter.kernels.vision.towers import TowerConfig, build_tower
    from semantic_diffusion_adapter.training.frozen.flux import build_flux, to_bfl

    torch.manual_seed(0)
    if base:
        checkpoint.save(folder / "flux.safetensors", to_bfl(build_flux(flux).state_dict()), "flux", flux)
    architecture = dict(in_channels=3, out_channels=3, latent_channels=flux["in_channels"], layers_per_block=1, norm_num_groups=4,
                        block_out_channels=[8, 8, 8, 8], down_block_types=["DownEncoderBlock2D"] * 4,
                        up_block_types=["UpDecoderBlock2D"] * 4, use_quant_conv=False, use_post_quant_conv=False)
    checkpoint.save(folder / "vae.safetensors", AutoencoderKL(**architecture).state_dict(), "vae", architecture)
    for name, (kind, architecture) in TOWERS.items():
        config = TowerConfig(name, kind, architecture, 28, 14, 16, (0.5,) * 3, (0.5,) * 3)
        checkpoint.save(folder / f"{name}.safetensors", build_tower(config).model.state_dict(), "vision_tower", config.to_json())
    width = flux["context_in_dim"]
    save_file({"text_mean": torch.linspace(-0.1, 0.1, width), "text_std": torch.linspace(0.1, 0.3, width)}, folder / "text.safetensors")
    write_index(folder / "photos", [(64, 64)] * 8 + [(70, 100)] * 8 + [(130, 64)] * 3)
    return folder


@pytest.fixture(scope="session")
def parts(tmp_path_factory) -> Path:
    pytest.importorskip("diffusers", reason="diffusers is not installed: pip install -e '.[training]'")
    pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install -e '.[training]'")
    return write_parts(tmp_path_factory.mktemp("parts"), FLUX)


@pytest.fixture(scope="session")
def toy_parts():
    """toy_parts(folder) adds to a FLUX.1-wide base in this folder all else that a training reads."""
    return lambda folder: write_parts(folder, {**FLUX, "in_channels": 16, "context_in_dim": 4096}, base=False)


@pytest.fixture
def toml(parts, tmp_path):
    """toml(**tables) -> the file of a run over the toy parts; a table's keys are added to the defaults. extra: keys of none."""
    def make(**changes) -> Path:
        from semantic_diffusion_adapter.training.config import RunConfig, write_toml
        from semantic_diffusion_adapter.training.objectives.reconstruct import AdapterTraining
        from semantic_diffusion_adapter.training.stages import settings as s

        growth = ((0.5, "global16"), (1.0, "tree64", "tree128"))
        tables = {"run": dict(out=tmp_path / "toy", max_steps=4, batch=4, micro=2, warmup=1, save_every=2, validate_every=2, log_every=1,
                              precision="fp32", device="cpu"),
                  "base": dict(flux=parts / "flux.safetensors", vae=parts / "vae.safetensors", text=parts / "text.safetensors",
                               precision="fp32"),
                  "vision": dict(files=(parts / "clip.safetensors", parts / "dino.safetensors")),
                  "data": dict(index=str(parts / "photos"), resolutions=((1.0, 64),), held_out=4),
                  "adapter": dict(width=32, heads=2, layers=1),
                  "objective": dict(growth=growth, mu="resolution", unlock=0.5),
                  "validation": dict(resolution=64, pictures=3, steps=2, times=(0.5, 0.9))}
        kinds = {"run": RunConfig, "base": s.Base, "vision": s.Vision, "data": s.Data, "adapter": s.Shape,
                 "objective": AdapterTraining, "validation": s.Validation}
        config = s.Config(**{k: kinds[k](**{**v, **changes.get(k, {})}) for k, v in tables.items()}, **changes.get("extra", {}))
        write_toml(config, tmp_path / "toy.toml")
        return tmp_path / "toy.toml"
    return make


@pytest.fixture
def both_routes(monkeypatch):
    """both_routes(run) -> (run() as it is for short sequences on a CPU, run() by the route that a GPU trains on, *merge*).

    run trains: the attention must come to *merge* with gradients, in the second run only.
    """
    from semantic_diffusion_adapter.kernels.attention import merge
    from semantic_diffusion_adapter.training.frozen import region_attention

    trained = []
    apply = merge._Merge.apply
    monkeypatch.setattr(merge._Merge, "apply", lambda *inputs: trained.append(0) or apply(*inputs))

    def run_both(run):
        short = run()
        assert not trained
        monkeypatch.setattr(region_attention, "SHORT", 0)
        long = run()
        assert trained
        return short, long

    return run_both
