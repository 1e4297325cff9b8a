"""`sda train adapter` and `sda export` at toy width, through the command line."""
from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install -e '.[training]'")
pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install -e '.[training]'")

from semantic_diffusion_adapter.kernels import checkpoint, weights  # noqa: E402
from semantic_diffusion_adapter.kernels.adapter import Adapter, AdapterConfig  # noqa: E402
from semantic_diffusion_adapter.training import cli  # noqa: E402
from semantic_diffusion_adapter.training.config import from_toml  # noqa: E402
from semantic_diffusion_adapter.training.engine import Step  # noqa: E402
from semantic_diffusion_adapter.training.files import file_hash  # noqa: E402
from semantic_diffusion_adapter.training.stages import settings  # noqa: E402
from semantic_diffusion_adapter.training.stages.adapter import AdapterStage, grid_of  # noqa: E402

CPU = torch.device("cpu")


def train(toml, *flags: str) -> int:
    return cli.main(["train", "adapter", "--config", str(toml), *flags])


@pytest.fixture
def stage(toml):
    return lambda **changes: AdapterStage(from_toml(settings.Config, toml(**changes)), CPU)


def step(number: int, positions=range(4), total: int = 4) -> Step:
    return Step(number, total, 0, "adapter", CPU, positions, 4)


def pictures(made: AdapterStage, at: Step) -> torch.Tensor:
    return torch.stack([sample["image"] for sample in made.feed.samples(at)])


def test_a_run_ends_with_files_that_the_nodes_load(toml, parts, tmp_path, capsys):
    assert train(toml()) == 0
    out = tmp_path / "toy"
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 2, 3, 4, 4]
    assert {"validation/flow", "validation/flow_0.5", "validation/flow_0.9"} <= lines[0].keys()
    assert lines[1]["lr/tuned"] == 0 < lines[4]["lr/tuned"], "DINOv2 learns from the middle of the run"
    grid = np.array(Image.open(out / "validation" / "00000004_reconstructions.png"))
    assert grid.ndim == 3 and len(grid) >= 128

    path = out / "export" / "semantic_adapters" / "toy.safetensors"
    state, record = checkpoint.load(path, "adapter")
    adapter = Adapter(AdapterConfig.from_json(record["config"]))
    weights.fill(adapter, state, path)
    assert record["base_sha256"] == file_hash(parts / "flux.safetensors") and record["step"] == 4 and record["guidance_embeds"]
    assert record["widths"] == {"text": 20, "pooled": 6} and record["hierarchy"] == [[1, 1, 32], [2, 2, 8], [4, 4, 4]]
    assert record["presets"] == ["global16", "tree128", "tree64"] and record["growth_phase"] == [2, 2] and record["code"]
    assert all(v.dtype == torch.float16 for v in state.values())
    tower, tower_record = checkpoint.load(out / "export" / "clip_vision" / "toy_dino.safetensors", "vision_tower")
    before = checkpoint.load(parts / "dino.safetensors", "vision_tower")[0]
    changed = {k for k in before if not torch.equal(tower[k], before[k].half())}
    assert changed and all(".layer.1." in k for k in changed), "only the last block was tuned"
    assert tower_record["tuned_from_sha256"] == file_hash(parts / "dino.safetensors")

    # The command makes the same files from the checkpoint as the run's own end made from memory: the averaged weights.
    shutil.move(out / "export", tmp_path / "first")
    assert cli.main(["export", str(out)]) == 0
    for name in ("semantic_adapters/toy.safetensors", "clip_vision/toy_dino.safetensors"):
        again, once = load_file(out / "export" / name), load_file(tmp_path / "first" / name)
        assert again.keys() == once.keys() and all(torch.equal(again[k], once[k]) for k in once)
    assert cli.main(["export", str(out), "--to", str(tmp_path / "models"), "--dtype", "fp32"]) == 0
    full, _ = checkpoint.load(tmp_path / "models" / "semantic_adapters" / "toy.safetensors", "adapter")
    live = load_file(out / "checkpoints" / "step_00000004" / "trainables.safetensors")
    assert full["queries"].dtype == torch.float32 and not torch.equal(full["queries"], live["adapter.queries"])


def test_export_says_what_it_cannot_do(tmp_path, capsys):
    assert cli.main(["export", str(tmp_path)]) == 1
    assert "There is no checkpoint in" in capsys.readouterr().err


def test_micro_batches_and_processes_change_nothing(stage):
    """Two halves of the batch mean what the whole means, and the gradient of the queries too."""
    made = stage()

    def gradient(shares) -> torch.Tensor:
        made.trainables.zero_grad()
        for positions in shares:
            (made.loss(step(3, positions))[0] / len(shares)).backward()
        return made.adapter.queries.grad.clone()

    whole, halves = gradient([range(4)]), gradient([range(2), range(2, 4)])
    torch.testing.assert_close(halves, whole, rtol=1e-4, atol=1e-7)
    assert whole.abs().sum() > 0


def test_precision_and_memory_savers_keep_the_loss(stage):
    found = {}
    for name, base in {"plain": dict(checkpointing=False), "checkpointed": {}, "bf16": dict(precision="bf16"),
                       "int8": dict(precision="int8"), "nf4": dict(precision="nf4")}.items():
        if name in ("int8", "nf4"):
            pytest.importorskip({"int8": "torchao", "nf4": "bitsandbytes"}[name])
        made = stage(base=base)
        torch.manual_seed(0)
        for parameter in made.trainables.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        loss = made.loss(step(3))[0]
        loss.backward()
        found[name] = (loss.item(), made.adapter.queries.grad.flatten())
        assert not any(p.requires_grad for p in made.objective.flux.parameters())
    assert found["plain"][0] == found["checkpointed"][0] and torch.equal(found["plain"][1], found["checkpointed"][1])
    for name, least in (("bf16", 0.995), ("int8", 0.99), ("nf4", 0.95)):
        assert found[name][0] == pytest.approx(found["plain"][0], rel=0.02), name
        assert torch.cosine_similarity(found[name][1], found["plain"][1], dim=0) > least, name


def test_pictures_held_out_are_never_trained_on(stage):
    made = stage()
    held = {made.held[i]["origin"] for i in range(len(made.held))}
    rest = {made.plan.index[i]["origin"] for i in range(len(made.plan.index))}
    assert len(held) == 4 and len(rest) == 15 and not held & rest
    assert made.validate() == made.validate(), "the same noise every time"
    assert "4 pictures held out" in made.report() and "row " in made.describe(step(0))[0]


def test_resolutions_and_buckets_go_by_their_phases(stage, parts):
    made = stage(data=dict(resolutions=((0.5, 64), (1.0, 64))))
    assert [made.feed.phase(n) for n in range(4)] == ["0", "0", "1", "1"]
    for number in range(4):
        images = pictures(made, step(number))
        _, bucket, _ = made.plan.at(made.feed.phase(number), number)
        assert images.shape == (4, 3, *bucket)
        assert torch.equal(pictures(made, step(number, range(2))), images[:2])
    made.feed.close()


def test_a_corrupt_picture_stops_or_is_replaced(stage, parts, tmp_path, capsys):
    shutil.copytree(parts / "photos", tmp_path / "photos")
    shard = tmp_path / "photos" / "shards" / "000000.tar"
    clean = stage(data=dict(index=str(tmp_path / "photos")))
    _, bucket, rows = clean.plan.at("0", 0)
    row = clean.plan.index[rows[1]]
    data = bytearray(shard.read_bytes())
    data[row["offset"] + 20] ^= 255
    shard.write_bytes(data)
    from semantic_diffusion_adapter.training.data.decode import CorruptSample

    stopping = stage(data=dict(index=str(tmp_path / "photos")))
    with pytest.raises(CorruptSample, match=f"from {row['origin']}"):
        stopping.feed.samples(step(0))
    skipping = stage(data=dict(index=str(tmp_path / "photos"), on_corrupt="skip"))
    assert pictures(skipping, step(0)).shape == (4, 3, *bucket)
    assert row["origin"] in capsys.readouterr().out


def test_a_corrupt_held_out_picture_stops_or_is_left_out(stage, parts, tmp_path, capsys):
    """The figures are then those of the others, at every validation, and the picture is named once."""
    from semantic_diffusion_adapter.training.data.decode import CorruptSample

    shutil.copytree(parts / "photos", tmp_path / "photos")
    shard, data = tmp_path / "photos" / "shards" / "000000.tar", dict(index=str(tmp_path / "photos"))
    clean = stage(data=data)
    expected = {}
    for row in range(4):  # each on its own: the noise is of the picture, not of its batch
        clean.validation.lost = set(range(4)) - {row}
        expected[row] = clean.validate()["flow"]
    rows = [clean.held[row] for row in range(4)]
    whole = bytearray(shard.read_bytes())

    def spoil(*which: int) -> None:
        spoiled = bytearray(whole)
        for row in which:
            spoiled[rows[row]["offset"] + 20] ^= 255
        shard.write_bytes(spoiled)

    spoil(1)
    with pytest.raises(CorruptSample, match=f"from {rows[1]['origin']}"):
        stage(data=data).validate()
    skipping = stage(data={**data, "on_corrupt": "skip"})
    skipping.trainables.load_state_dict(clean.trainables.state_dict())
    capsys.readouterr()
    figures = [skipping.validate()["flow"] for _ in range(2)]
    assert figures == [pytest.approx(sum(expected[row] for row in (0, 2, 3)) / 3, rel=1e-4)] * 2
    assert skipping.pictures()["reconstructions"].size
    said = capsys.readouterr().out
    assert said.count(f"from {rows[1]['origin']}") == said.count("The validation goes on without it.") == 1
    spoil(*range(4))
    with pytest.raises(ValueError, match="None of the 4 held-out samples of .*photos can be read any more; restore its shards"):
        skipping.validate()


def test_a_resume_with_another_validation_resolution_names_it(toml, parts, tmp_path, capsys):
    """It decides which pictures are held out, so a run cannot change it on its way."""
    import pyarrow.parquet as pq

    shutil.copytree(parts / "photos", tmp_path / "photos")
    table = pq.read_table(tmp_path / "photos" / "index.parquet")
    pq.write_table(table.append_column("bucket_32", table["bucket_64"]), tmp_path / "photos" / "index.parquet")
    assert train(toml(data=dict(index=str(tmp_path / "photos"))), "--run.max-steps", "1") == 0
    assert train(tmp_path / "toy.toml", "--validation.resolution", "32") == 1
    assert "validation.resolution: 64 -> 32" in capsys.readouterr().err


def test_the_cache_gives_the_loss_of_the_encoders(stage, parts, tmp_path):
    """Latents, the features of one tower and the hidden state that enters DINOv2's unlocked block; no picture is read."""
    from semantic_diffusion_adapter.training.data import fill_cache

    online = stage()
    config = fill_cache.Config(str(parts / "photos"), str(tmp_path / "cache"), parts / "vae.safetensors",
                               (parts / "clip.safetensors", parts / "dino.safetensors"), unlock_blocks=1, workers=1)
    assert fill_cache.run(config)
    cached = stage(data=dict(cache=str(tmp_path / "cache")))
    assert list(cached.reader.caches) == ["vae", "clip", "dino"] and cached.reader.whole
    assert "image" not in cached.feed.samples(step(3))[0]
    cached.trainables.load_state_dict(online.trainables.state_dict())
    losses = []
    for made in (online, cached):
        loss = made.loss(step(3))[0]
        loss.backward()
        losses.append((loss.item(), torch.cat([p.grad.flatten() for p in made.trainables["tuned"]])))
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-3)
    assert torch.cosine_similarity(losses[0][1], losses[1][1], dim=0) > 0.99 and losses[0][1].norm() > 0
    with pytest.raises(ValueError, match="holds nothing of vae with these weights"):
        stage(data=dict(cache=str(tmp_path / "nowhere")))


@pytest.mark.parametrize(("changes", "words"), [
    (dict(base=dict(sharded=True, precision="nf4")), "A base in nf4 cannot be sharded"),
    (dict(base=dict(sharded=True)), "nothing to shard over"),
    (dict(base=dict(precision="nf4"), run=dict(compile=True)), "torch.compile cannot train through a base in nf4"),
    (dict(base=dict(vae="nowhere/ae.safetensors")), "base.vae: there is no nowhere/ae.safetensors"),
    (dict(run=dict(batch=4, micro=3)), "run.batch 4"),
    (dict(objective=dict(growth=((0.5, "tree64"),))), "objective.growth is a list of"),
    (dict(objective=dict(growth=((1.0, 64),))), "and a name for each choice, not [[1.0, 64]]"),
    (dict(data=dict(resolutions=((1.0, "64"),))), "and pixels for each choice, not [[1.0, '64']]"),
    (dict(data=dict(resolutions=(("1.0", 64),))), "data.resolutions is a list of"),
    (dict(data=dict(resolutions=((0.5, 64), (0.4, 64), (1.0, 64)))), "data.resolutions is a list of"),
    (dict(adapter=dict(table="tree64")), "is not in the query table"),
    (dict(data=dict(held_out=500)), "none is left beside 500 held out"),
    (dict(data=dict(held_out=0)), "data.held_out must be at least 1"),
])
def test_what_cannot_be_is_refused_before_the_base_is_loaded(toml, capsys, monkeypatch, changes, words):
    from semantic_diffusion_adapter.training.stages import adapter

    monkeypatch.setattr(adapter, "load_flux", lambda *a: pytest.fail("the base was loaded"))
    assert train(toml(**changes)) == 1
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def unfit(parts, tmp_path) -> dict[str, tuple[dict, str]]:
    """What each file of a training may be instead of itself, and the words."""
    state, record = checkpoint.load(parts / "vae.safetensors", "vae")
    checkpoint.save(tmp_path / "cut.safetensors", dict(list(state.items())[1:]), "vae", record["config"])
    save_file({"text_mean": torch.zeros(7), "text_std": torch.ones(7)}, tmp_path / "narrow.safetensors")
    save_file({"x": torch.zeros(7)}, tmp_path / "none.safetensors")
    (tmp_path / "torn.safetensors").write_bytes((parts / "dino.safetensors").read_bytes()[:-9])
    return {"flux": (dict(base=dict(flux=parts / "vae.safetensors")), "kind 'vae' where 'flux' is needed"),
            "vae": (dict(base=dict(vae=tmp_path / "cut.safetensors")), "does not fit the VAE it says it is"),
            "text of another base": (dict(base=dict(text=tmp_path / "narrow.safetensors")),
                                     "has texts of 7 channels and the base reads 20"),
            "no text": (dict(base=dict(text=tmp_path / "none.safetensors")), "no plain T5 v1.1 encoder"),
            "tower": (dict(vision=dict(files=(parts / "clip.safetensors", tmp_path / "torn.safetensors"))),
                      "torn.safetensors is cut short"),
            "another tower": (dict(vision=dict(files=(parts / "dino.safetensors",), ids=("dinov2-reg-large-378",))), "it lacks"),
            "twice": (dict(vision=dict(files=(parts / "dino.safetensors",) * 2)), "is listed twice"),
            "no DINOv2": (dict(vision=dict(files=(parts / "clip.safetensors",))), "There is no DINOv2 among the vision towers")}


UNFIT = ("flux", "vae", "text of another base", "no text", "tower", "another tower", "twice", "no DINOv2")


@pytest.mark.parametrize("what", UNFIT)
def test_a_file_that_does_not_do_is_refused_before_the_base_is_read_and_by_the_plan_too(toml, parts, tmp_path, capsys, monkeypatch, what):
    from semantic_diffusion_adapter.training.stages import adapter

    for name in ("load_flux", "base_sha256", "load_towers"):
        monkeypatch.setattr(adapter, name, lambda *a: pytest.fail("something large was read"))
    changes, words = unfit(parts, tmp_path)[what]
    file, said = toml(**changes), []
    for command in (["train", "adapter"], ["plan"]):
        assert cli.main([*command, "--config", str(file)]) == 1
        said.append(capsys.readouterr().err)
    assert words in said[0] and said[0].count("\n") == 1 and said[0] == said[1]


@pytest.mark.parametrize(("changes", "words"), [
    (dict(run=dict(batch=4, micro=3)), "run.batch 4"), (dict(data=dict(held_out=500)), "none is left beside 500 held out"),
    (dict(run=dict(batch=16)), "No bucket at 64 px fills a batch of 16"),
    (dict(data=dict(resolutions=((1.0, 96),))), "no buckets at 96 px"),
    (dict(base=dict(sharded=True)), "nothing to shard over"), (dict(base=dict(precision="nf4"), run=dict(compile=True)), "torch.compile"),
    (dict(adapter=dict(table="tree64")), "is not in the query table")])
def test_what_the_training_refuses_the_plan_refuses_in_the_same_words(toml, capsys, changes, words):
    file, said = toml(**changes), []
    for command in (["train", "adapter"], ["plan"]):
        assert cli.main([*command, "--config", str(file)]) == 1
        said.append(capsys.readouterr().err)
    assert words in said[0] and said[0] == said[1]


def test_the_text_encoder_is_read_once_on_the_cpu_and_not_by_a_run_that_goes_on(toml, parts, tmp_path, monkeypatch):
    from semantic_diffusion_adapter.training.stages import adapter

    read = []
    monkeypatch.setattr(adapter, "text_statistics",
                        lambda path, captions: read.append(captions) or (torch.full((20,), 0.5), torch.ones(20)))
    assert train(toml(), "--run.max-steps", "2") == 0 and train(tmp_path / "toy.toml") == 0
    assert len(read) == 1 and set(read[0]) <= {f"picture {i}" for i in range(19)} and len(read[0]) == 15
    state = load_file(tmp_path / "toy" / "checkpoints" / "step_00000004" / "trainables.safetensors")
    assert (state["adapter.text_mean"] == 0.5).all()


def test_a_run_goes_on_only_over_the_same_base_and_data(toml, parts, tmp_path, capsys):
    assert train(toml(), "--run.max-steps", "2") == 0
    assert train(tmp_path / "toy.toml", "--data.ahead", "2") == 0, "what decides nothing may change"
    state, record = checkpoint.load(parts / "flux.safetensors", "flux")
    checkpoint.save(tmp_path / "other.safetensors", state | {"img_in.bias": state["img_in.bias"] + 1}, "flux", record["config"])
    assert train(tmp_path / "toy.toml", "--base.flux", str(tmp_path / "other.safetensors"), "--run.max-steps", "6") == 1
    assert "base: " in capsys.readouterr().err


def test_columns_of_many_sizes_make_one_grid():
    grid = grid_of([np.zeros((2000, 100, 3), np.uint8), np.full((30, 50, 3), 7, np.uint8)])
    assert grid.shape == (768, 38 + 4 + 50 + 4, 3) and (grid[40:, 42:] == 255).all() and (grid[:30, 42:92] == 7).all()
