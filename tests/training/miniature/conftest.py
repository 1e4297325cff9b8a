"""A whole miniature of random weights, made by the stages' own code at toy width."""
from __future__ import annotations

import hashlib
import io
import tarfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def few_scenes():
    """The statistics that a stage takes of its outputs are those of a few scenes."""
    if find_spec("diffusers") is None:  # without which no stage is tested
        yield
        return
    from semantic_diffusion_adapter.training.miniature import editor, vae

    with pytest.MonkeyPatch.context() as patch:
        for stage in (editor, vae):
            patch.setattr(stage, "MEASURED", 32)
        yield


@pytest.fixture(scope="session")
def toy_assets(tmp_path_factory) -> Path:
    """A folder like assets/miniature: every stage is built on the one before and exports its untrained weights."""
    pytest.importorskip("diffusers", reason="diffusers is not installed: pip install -e '.[training]'")
    pytest.importorskip("open_clip", reason="open_clip is not installed: pip install -r requirements.txt")

    from semantic_diffusion_adapter.training.config import RunConfig
    from semantic_diffusion_adapter.training.miniature import adapter, base, clip, dinov2, editor, gate, reader, text, vae
    from semantic_diffusion_adapter.training.miniature.evaluation.system import ADAPTERS
    from semantic_diffusion_adapter.training.objectives.reconstruct import AdapterTraining

    torch.manual_seed(0)
    device, root = torch.device("cpu"), tmp_path_factory.mktemp("miniature")
    assets, cache, dino = root / "assets", root / "cache", root / "dinov2.safetensors"
    run = RunConfig(root / "run", max_steps=1, batch=2)
    run.out.mkdir()

    def file(name: str) -> Path:
        return assets / f"{name}.safetensors"

    vae_file, flux, t5 = file("vae/miniature_vae"), file("diffusion_models/miniature_flux"), file("text_encoders/miniature_t5")
    clip_file = file("clip_vision/miniature_clip")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(vae.ARCHITECTURE, "block_out_channels", [32, 32, 32, 32])
        for key, value in dict(d_model=48, d_kv=16, d_ff=64, num_layers=1, num_heads=2).items():
            patch.setitem(text.ARCHITECTURE, key, value)
        for key, value in dict(hidden_size=48, num_heads=2, axes_dim=[8, 8, 8], depth=1, depth_single_blocks=2,
                               context_in_dim=48, vec_in_dim=48).items():
            patch.setitem(base.FLUX, key, value)
        vae.VaeStage(vae.Config(run, vae_file), device).export(0)
        words = run.out / "text.safetensors"
        reader.ReaderStage(reader.Config(run, words, cache, scenes=32), device).export(0)
        stage = base.BaseStage(base.Config(run, vae_file, words, flux, t5, cache, scenes=32), device)
        for parameter in stage.flux.parameters():  # an untrained one is silenced by zeros on purpose
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
        stage.export(0)
        clip.ClipStage(clip.Config(run, clip_file, cache, scenes=32), device).export(0)
        dinov2.Dinov2Stage(dinov2.Config(run, dino, cache, scenes=32), device).export(0)
        for name, table, masked in (("tree128", "tree128", True), ("global64", "global64", True), ("tree64_unmasked", "tree64", False)):
            own, tower, _ = ADAPTERS[name]
            adapter.AdapterStage(adapter.Config(
                run, flux, t5, vae_file, (clip_file, dino), file(own), file(tower), cache, table, table, width=32,
                heads=2, layers=1, scenes=32, objective=AdapterTraining(masked=masked)), device).export(0)
        gate.GateStage(gate.Config(
            run, flux, vae_file, file("semantic_adapters/miniature_tree128"), (clip_file, file("clip_vision/miniature_dinov2")),
            file("loras/miniature_gate"), cache, scenes=32), device).export(0)
        stage = editor.EditorStage(editor.Config(
            run, t5, file("semantic_adapters/miniature_tree128"), (clip_file, file("clip_vision/miniature_dinov2")),
            file("edit_decoders/miniature_editor"), cache, scenes=32, width=32, heads=2, layers=1), device)
        torch.nn.init.normal_(stage.decoder.out.weight, std=0.5)  # an untrained one copies
        stage.export(0)
    return assets


@pytest.fixture
def few_steps(monkeypatch):
    """What random weights paint in three steps is no worse than in twenty."""
    from semantic_diffusion_adapter.training.miniature.evaluation import system

    monkeypatch.setattr(system, "STEPS", 3)


EDITS = 30


@pytest.fixture(scope="session")
def edits(tmp_path_factory) -> Path:
    """A prepared set of edits: every scene twice, under two instructions."""
    pytest.importorskip("diffusers", reason="diffusers is not installed: pip install -e '.[training]'")
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image
    from semantic_diffusion_adapter.training.data import index as index_module
    from semantic_diffusion_adapter.training.miniature.editor import change_of
    from semantic_diffusion_adapter.training.miniature.scenes import render

    def png(scene) -> bytes:
        stream = io.BytesIO()
        Image.fromarray(render(scene)).save(stream, "PNG")
        return stream.getvalue()

    folder = tmp_path_factory.mktemp("edits")
    (folder / "shards").mkdir()
    rows = {name: [] for name in index_module.schema(index_module.EDITS, (128,)).names}
    with tarfile.open(folder / "shards" / "000000.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        def put(name: str, data: bytes) -> tuple[int, int]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            start = tar.offset + 512
            tar.addfile(info, io.BytesIO(data))
            return start, len(data)

        for i in range(EDITS):
            change = change_of("train", i // 2, operation=("remove", "recolour")[i % 2])
            pictures = {"": png(change.source), "target_": png(change.target)}
            for prefix, data in pictures.items():
                offset, length = put(f"{i:09}.{prefix or 'source_'}png", data)
                for column, value in (("offset", offset), ("length", length), ("sha256", hashlib.sha256(data).digest())):
                    rows[f"{prefix}{column}"].append(value)
            for column, value in dict(key=f"{i:09}", origin=f"{i}.png", shard="shards/000000.tar", width=128, height=128,
                                      caption=change.instruction, mask_offset=0, mask_length=0, source_caption="", target_caption="",
                                      bucket_128=[128, 128]).items():
                rows[column].append(value)
    schema = index_module.schema(index_module.EDITS, (128,))
    pq.write_table(pa.table([pa.array(rows[f.name], f.type) for f in schema], schema=schema), folder / index_module.NAME)
    return folder
