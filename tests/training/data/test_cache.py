"""`sda cache`: latents and features as the encoders give them, found by content, complete or refused."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch

for package in ("diffusers", "open_clip", "pyarrow"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install -e '.[training]'")

import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
from semantic_diffusion_adapter.kernels import checkpoint  # noqa: E402
from semantic_diffusion_adapter.training.data import fill_cache as command  # noqa: E402
from semantic_diffusion_adapter.training.data import prepare_edits  # noqa: E402
from semantic_diffusion_adapter.training.data.batches import Plan  # noqa: E402
from semantic_diffusion_adapter.training.data.decode import decode, send  # noqa: E402
from semantic_diffusion_adapter.training.data.index import Index  # noqa: E402
from semantic_diffusion_adapter.training.data.pool import Pool  # noqa: E402
from semantic_diffusion_adapter.training.data.read_cache import Cache, Part  # noqa: E402
from semantic_diffusion_adapter.training.frozen.base import base_sha256  # noqa: E402
from semantic_diffusion_adapter.training.frozen.encoders import load_towers, load_vae  # noqa: E402

from .conftest import jpeg  # noqa: E402

CPU = torch.device("cpu")
SIZES = ((64, 64), (70, 64), (64, 128), (96, 96), (100, 200), (130, 128))


@pytest.fixture(scope="module")
def encoders(miniature) -> dict[str, Path]:
    return {"vae": miniature / "vae/miniature_vae.safetensors", "clip": miniature / "clip_vision/miniature_clip.safetensors",
            "dino": miniature / "clip_vision/miniature_dinov2.safetensors"}


@pytest.fixture(scope="module")
def fill():
    """fill(configuration): what `sda cache` does, in one worker process for all tests here: it is slow to start."""
    pool = Pool(1)
    yield lambda config: command.fill_all(pool, config)
    pool.close()


@pytest.fixture(scope="module")
def filled(fill, encoders, written, tmp_path_factory):
    """(index, URL of its cache, configuration)"""
    folder = tmp_path_factory.mktemp("cache")
    index = written(str(folder / "set"), [jpeg(*size, seed) for seed, size in enumerate(SIZES)], (64, 96))
    config = command.Config(str(folder / "set"), str(folder / "cache"), encoders["vae"], (encoders["clip"], encoders["dino"]),
                            unlock_blocks=1, batch=2)
    fill(config)
    return index, str(folder / "cache"), config


def test_what_is_read_is_what_the_encoders_give(filled, encoders):
    index, url, _ = filled
    vae = load_vae(encoders["vae"], CPU)
    clip, dino = load_towers((encoders["clip"], encoders["dino"]), (), CPU, torch.float32).values()
    latents = Cache(url, index, Part("vae", base_sha256(encoders["vae"])), (64, 96))
    features = Cache(url, index, Part(clip.config.id, base_sha256(encoders["clip"])), (64, 96))
    hidden = Cache(url, index, Part(dino.config.id, base_sha256(encoders["dino"]), 1), (64, 96))
    plan = Plan(index, 1, 0, (64, 96))
    for step in range(12):
        resolution, bucket, rows = plan.at("any", step)
        for row in rows:
            image = send([decode(index, row, bucket)], CPU)
            mean, std = vae.moments(image)
            found = latents.read(row, resolution)
            assert found["mean"].dtype == torch.float16 and found["mean"].shape == (8, bucket[0] // 8, bucket[1] // 8)
            torch.testing.assert_close(found["mean"].float(), mean[0], atol=2e-3, rtol=2e-3)
            torch.testing.assert_close(found["std"].float(), std[0], atol=2e-3, rtol=2e-3)
            torch.testing.assert_close(features.read(row, resolution)["features"].float(), clip(image)[0], atol=1e-2, rtol=5e-3)
            kept = hidden.read(row, resolution)["hidden"].float()[None]
            torch.testing.assert_close(dino.after(kept, 1), dino(image), atol=2e-2, rtol=1e-2)
    with pytest.raises(ValueError, match="Row 0 of .* is smaller than 96 px"):
        latents.read(0, 96)


def test_a_part_of_the_set_finds_its_entries_by_content(filled, encoders):
    index, url, _ = filled
    part = Part("vae", base_sha256(encoders["vae"]))
    fewer = Index(index.url, index.table.take(pa.array([5, 3])))
    for row, old in enumerate((5, 3)):
        found, same = (Cache(url, i, part, (96,)).read(r, 96)["mean"] for i, r in ((fewer, row), (index, old)))
        assert torch.equal(found, same)


def test_only_what_is_missing_is_computed(fill, filled, encoders, written, tmp_path, capsys):
    index, _, config = filled
    config = command.Config(config.data, str(tmp_path / "cache"), encoders["vae"], resolutions=(64,))
    fill(config)
    assert "vae: 6 of 6 entries computed" in capsys.readouterr().out
    part = Part("vae", base_sha256(encoders["vae"]))
    with pytest.raises(ValueError, match="lacks 3 of 3 entries of vae at 96 px; run `sda cache`"):
        Cache(config.out, index, part, (64, 96))
    fill(command.Config(config.data, config.out, encoders["vae"]))
    assert "vae: 3 of 9 entries computed" in capsys.readouterr().out
    cache = Cache(config.out, index, part, (64, 96))
    shards = sorted((tmp_path / "cache" / part.folder / "shards").iterdir())
    shards[0].write_bytes(shards[0].read_bytes()[:-10])
    with pytest.raises(ValueError, match="1 shards of vae in .* are missing or cut short, such as"):
        Cache(config.out, index, part, (64, 96))
    fill(command.Config(config.data, config.out, encoders["vae"]))
    assert "of 9 entries computed" in capsys.readouterr().out and cache.read(5, 96)["mean"].isfinite().all()


def test_weights_that_do_not_fit_are_a_sentence(fill, filled, encoders, tmp_path):
    state, record = checkpoint.load(encoders["vae"], "vae")
    state.pop("encoder.conv_in.weight")
    checkpoint.save(tmp_path / "vae.safetensors", state, "vae", record["config"])
    with pytest.raises(ValueError, match="vae.safetensors does not fit the VAE it says it is"):
        fill(command.Config(filled[2].data, str(tmp_path / "cache"), tmp_path / "vae.safetensors"))


def test_both_pictures_of_an_edit_are_kept_and_each_content_once(fill, encoders, tmp_path):
    pictures = [{"bytes": jpeg(64, 64, seed), "path": None} for seed in range(3)]
    columns = {"source_img": [pictures[0], pictures[1]], "target_img": [pictures[1], pictures[2]], "instruction": ["a", "b"]}
    pq.write_table(pa.table(columns), tmp_path / "edits.parquet")
    assert prepare_edits.run(prepare_edits.Config(str(tmp_path / "edits.parquet"), str(tmp_path / "set"), (64,), workers=1))
    fill(command.Config(str(tmp_path / "set"), str(tmp_path / "cache"), encoders["vae"]))
    index, part, vae = Index.read(str(tmp_path / "set")), Part("vae", base_sha256(encoders["vae"])), load_vae(encoders["vae"], CPU)
    cache = Cache(str(tmp_path / "cache"), index, part, (64,))
    assert len(cache.entries) == 3
    for row in range(2):
        for member in ("", "target"):
            mean, _ = vae.moments(send([decode(index, row, (64, 64), member)], CPU))
            torch.testing.assert_close(cache.read(row, 64, member)["mean"].float(), mean[0], atol=2e-3, rtol=2e-3)


def test_other_weights_are_another_cache(filled, encoders):
    index, url, _ = filled
    with pytest.raises(ValueError, match="holds nothing of vae with these weights .*; run `sda cache`"):
        Cache(url, index, Part("vae", "0" * 64), (64,))
    with pytest.raises(ValueError, match="holds nothing of miniature-dinov2"):  # kept before its last block, not after it
        Cache(url, index, Part("miniature-dinov2", base_sha256(encoders["dino"])), (64,))


def test_a_corrupt_sample_ends_it_in_a_sentence(fill, encoders, written, tmp_path):
    index = written(str(tmp_path / "set"), [jpeg(64, 64, 0), jpeg(64, 64, 1)])
    tar = tmp_path / "set/shards/000000.tar"
    data = bytearray(tar.read_bytes())
    data[index[1]["offset"] + 99] ^= 1
    tar.write_bytes(data)
    with pytest.raises(ValueError, match=r"Row 1 of .* in shards/000000.tar .* bytes have changed"):
        fill(command.Config(str(tmp_path / "set"), str(tmp_path / "cache"), encoders["vae"]))


@pytest.mark.parametrize("settings, message", [
    ({}, "no encoder to cache; give --vae, --towers"),
    ({"vae": Path("nowhere.safetensors")}, "There is no nowhere.safetensors"),
    ({"towers": ("clip",), "tower_ids": ("a", "b")}, r"do not pair up \(1 and 2\)"),
])
def test_a_cache_that_cannot_be_says_why(settings, message, filled, encoders, tmp_path):
    if "towers" in settings:
        settings = settings | {"towers": (encoders["clip"],)}
    with pytest.raises(ValueError, match=message):
        command.run(command.Config(filled[2].data, str(tmp_path), **settings))


def test_a_disk_that_is_too_small_is_refused_first(filled, encoders, tmp_path, monkeypatch):
    import shutil
    from types import SimpleNamespace

    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match="GB free and the cache takes about .* encode online"):
        command.run(command.Config(filled[2].data, str(tmp_path / "cache"), encoders["vae"]))
    assert not list((tmp_path / "cache").iterdir())


def test_only_a_dinov2_keeps_the_state_before_its_last_blocks(encoders):
    clip, dino = load_towers((encoders["clip"], encoders["dino"]), (), CPU, torch.float32).values()
    x = torch.rand(2, 3, 64, 64)
    for last in (1, 4):
        assert torch.equal(dino.after(dino.before(x, last), last), dino(x))
    for tower, last in ((clip, 1), (dino, 5)):
        with pytest.raises(ValueError, match=f"before its last {last} blocks cannot be kept"):
            tower.before(x, last)
