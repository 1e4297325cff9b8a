"""`sda cache`: latents and features as the encoders give them, found by content, complete or refused."""
from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

for package in ("diffusers", "open_clip", "pyarrow"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install -e '.[training]'")

import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
from semantic_diffusion_adapter.kernels import checkpoint  # noqa: E402
from semantic_diffusion_adapter.training.data import fill_cache as command  # noqa: E402
from semantic_diffusion_adapter.training.data import prepare_edits  # noqa: E402
from semantic_diffusion_adapter.training.data.batches import Plan  # noqa: E402
from semantic_diffusion_adapter.training.data.choice import ranges  # noqa: E402
from semantic_diffusion_adapter.training.data.decode import decode, send  # noqa: E402
from semantic_diffusion_adapter.training.data.index import Index  # noqa: E402
from semantic_diffusion_adapter.training.data.pool import Pool  # noqa: E402
from semantic_diffusion_adapter.training.data.read_cache import Cache, Part  # noqa: E402
from semantic_diffusion_adapter.training.frozen.base import base_sha256  # noqa: E402
from semantic_diffusion_adapter.training.frozen.encoders import load_towers, load_vae  # noqa: E402

from .conftest import jpeg, table_of  # noqa: E402

CPU = torch.device("cpu")
SIZES = ((64, 64), (70, 64), (64, 128), (96, 96), (100, 200), (130, 128))


@pytest.fixture(scope="module")
def encoders(miniature) -> dict[str, Path]:
    return {"vae": miniature / "vae/miniature_vae.safetensors", "clip": miniature / "clip_vision/miniature_clip.safetensors",
            "dino": miniature / "clip_vision/miniature_dinov2.safetensors"}


@pytest.fixture(scope="module")
def pool():
    """One worker process for all tests here: it is slow to start."""
    made = Pool(1)
    yield made
    made.close()


@pytest.fixture(scope="module")
def fill(pool):
    """fill(configuration): what `sda cache` does."""
    return lambda config: command.fill_all(pool, config)


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


def asked_by_hand(index: Index, resolutions) -> dict[tuple[int, int], dict[bytes, tuple[int, bool]]]:
    """{bucket: {content: (row, whether it is the target)}}, row by row."""
    found: dict = {}
    for resolution in resolutions:
        for prefix in ("", "target_") if index.kind == "edits" else ("",):
            for number, row in enumerate(index):
                bucket = tuple(row[f"bucket_{resolution}"])
                if bucket != (0, 0):
                    found.setdefault(bucket, {}).setdefault(row[f"{prefix}sha256"], (number, bool(prefix)))
    return found


SIDES = st.sampled_from((48, 64, 70, 96, 128, 200))
EMPTY = {name: 0 for name in ("target_offset", "target_length", "mask_offset", "mask_length")} | {
    name: "" for name in ("source_caption", "target_caption")}


@given(st.lists(st.tuples(SIDES, SIDES, st.integers(0, 5), st.integers(0, 5)), max_size=30), st.booleans(),
       st.integers(1, 4), st.randoms(use_true_random=False))
def test_entries_are_numbered_by_the_index_alone(samples, edits, most, random):
    sizes, count = [sample[:2] for sample in samples], len(samples)
    shas, targets = ([bytes([sample[at]]) * 32 for sample in samples] for at in (2, 3))
    more = {name: [value] * count for name, value in EMPTY.items()} | {"target_sha256": targets} if edits else {}
    index = Index("memory://set", table_of(sizes, (64, 96), "edits" if edits else "pictures", sha256=shas, **more))
    entries, by_hand = command.wanted(index, (96, 64)), asked_by_hand(index, (96, 64))
    found: dict = {}
    for number, key in enumerate(entries.keys.to_pylist()):
        of_bucket = found.setdefault(entries.bucket(number), {})
        of_bucket[key[:32]] = int(entries.rows[number]), bool(entries.targets[number])
    assert found == by_hand and list(found) == sorted(by_hand)
    in_order = [list(by_hand[bucket]) for bucket in found]
    assert [list(part) for part in found.values()] == in_order
    missing = np.array([n for n in range(len(entries.rows)) if random.random() < 0.7], np.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "SHARD", most)
        shards = list(entries.cut(missing))
    assert [n for shard in shards for n in shard.tolist()] == missing.tolist()
    assert all(len(shard) <= most and len({entries.bucket(n) for n in shard}) == 1 for shard in shards)
    assert all(command.spread(ranges(shard)).tolist() == shard.tolist() for shard in shards)


class Watched:
    """Workers of which the tasks are seen."""

    def __init__(self, workers: Pool):
        self.workers, self.tasks = workers, []

    def run(self, work, tasks, setup):
        self.tasks += tasks
        return self.workers.run(work, tasks, setup)


def test_a_task_is_ranges_of_numbers(pool, filled, encoders, tmp_path):
    config, watched = command.Config(filled[2].data, str(tmp_path), encoders["vae"]), Watched(pool)
    command.fill_all(watched, config)
    assert all(set(task) == {"runs", "shard", "about", "size"} and len(task["runs"]) == 1 for task in watched.tasks)
    assert sum(task["size"] for task in watched.tasks) == 9
    command.fill_all(watched, config)
    assert sum(task["size"] for task in watched.tasks) == 9  # Nothing is missing, so nothing is given out.


OTHER = [(64, 64, 9), *((*size, seed) for seed, size in enumerate(SIZES[1:], 1))]


@pytest.mark.parametrize("now", [OTHER, [(64, 64, 0)]], ids=["another picture", "fewer pictures"])
def test_a_worker_that_numbers_another_set_refuses(now, pool, filled, encoders, written, tmp_path):
    watched = Watched(pool)
    command.fill_all(watched, command.Config(filled[2].data, str(tmp_path / "cache"), encoders["vae"]))
    written(str(tmp_path / "set"), [jpeg(*picture) for picture in now], (64, 96))
    (part, load), = command.parts_of(command.Config("", "", encoders["vae"]))
    worker = command.Fill(str(tmp_path / "set"), str(tmp_path / "cache"), (64, 96), 2, asdict(part), load)
    with pytest.raises(ValueError, match="set has changed while it was being cached; leave the set alone"):
        for task in watched.tasks:
            worker(task)


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
