"""Checkpoints: whole or passed over, of the same run or refused."""
from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

try:
    import resource
except ModuleNotFoundError:  # Windows
    resource = None

pytest.importorskip("tensorboard", reason="tensorboard is not installed: pip install -e '.[training]'")

from semantic_diffusion_adapter.kernels import precision  # noqa: E402
from semantic_diffusion_adapter.training.config import from_toml  # noqa: E402
from semantic_diffusion_adapter.training.engine import launch  # noqa: E402
from semantic_diffusion_adapter.training.engine.checkpoints import settle  # noqa: E402
from semantic_diffusion_adapter.training.engine.sealed import write_record, write_tensors  # noqa: E402
from semantic_diffusion_adapter.training.files import file_hash  # noqa: E402
from toys import Config, Toy, go, read, same, settings  # noqa: E402


def test_a_crash_goes_on_from_the_last_checkpoint(tmp_path, straight):
    def crash():
        raise KeyboardInterrupt

    run = settings(tmp_path / "crash")
    with pytest.raises(KeyboardInterrupt):
        go(Toy(at={4: crash}), run)
    # What a run that is killed while writing leaves behind must not be taken for a checkpoint.
    checkpoints = run.out / "checkpoints"
    for name in (".writing_00000005", "step_00000005"):
        (checkpoints / name).mkdir()
        (checkpoints / name / "trainables.safetensors").write_bytes(b"half")
    second = go(Toy(init=9), run)
    assert second.seen == straight.seen[3:]
    assert same(second.exported, straight.exported)


def test_a_finished_run_only_exports_again(tmp_path, straight):
    again = go(Toy(init=9), settings(tmp_path / "straight"))
    assert again.seen == [] and same(again.exported, straight.exported)


def test_a_plateau_can_be_extended(tmp_path):
    run = settings(tmp_path / "longer", decay=0.5)
    go(Toy(), run)
    assert [step for step, _ in go(Toy(), settings(tmp_path / "longer", decay=0.5, max_steps=9)).seen] == [6, 7, 8]


def test_a_run_folder_belongs_to_one_stage(tmp_path, straight):
    other = Toy()
    other.name = "other"
    with pytest.raises(ValueError, match="holds a run of 'toy', not of 'other'"):
        go(other, settings(tmp_path / "straight"))
    with pytest.raises(ValueError, match="already holds checkpoints"):
        go(Toy(), settings(tmp_path / "straight", resume="never"))


def damage_last(out, change) -> str:
    last = sorted((out / "checkpoints").glob("step_*"))[-1]
    change(last)
    return last.name


def flip(folder) -> None:
    data = bytearray((folder / "average.safetensors").read_bytes())
    data[-3] ^= 1
    (folder / "average.safetensors").write_bytes(data)


@pytest.mark.parametrize("change, words", [
    (lambda folder: os.truncate(folder / "optimizer.safetensors", 100), "optimizer.safetensors has 100 of"),
    (flip, "average.safetensors is not what was written"),
    (lambda folder: (folder / "trainables.safetensors").unlink(), "trainables.safetensors is missing"),
    (lambda folder: (folder / "complete.json").write_text('{"step": 6, '), "complete.json cannot be read"),
])
def test_a_damaged_checkpoint_is_passed_over_and_said(tmp_path, straight, capsys, change, words):
    name = damage_last(straight.out, change)
    again = go(Toy(init=9), settings(straight.out))
    said = capsys.readouterr().out
    assert f"{name} is passed over: {words}" in said
    assert [step for step, _ in again.seen] == [3, 4, 5] and same(again.exported, straight.exported)


def altered(folder, **fields) -> None:
    record = json.loads((folder / "complete.json").read_text())
    (folder / "complete.json").write_text(json.dumps(record | fields))


def resealed(folder, **fields) -> None:
    write_record(folder, json.loads((folder / "complete.json").read_text()) | fields)


@pytest.mark.parametrize("change, words", [
    (lambda folder: altered(folder, average_count=9), "complete.json is not what was written"),
    (lambda folder: altered(folder, identity={"base": "xyz"}), "complete.json is not what was written"),
    (lambda folder: (folder / "complete.json").write_text("[1]"), "it was written by another version"),
    (lambda folder: resealed(folder, step=3), "complete.json is of step 3"),
])
def test_the_record_of_a_checkpoint_is_sealed_and_of_its_step(straight, capsys, change, words):
    name = damage_last(straight.out, change)
    assert [step for step, _ in go(Toy(init=9), settings(straight.out)).seen] == [3, 4, 5]
    assert f"{name} is passed over: {words}" in capsys.readouterr().out


def test_what_has_another_name_is_left_alone(tmp_path):
    """Neither loaded, nor removed, nor a reason to refuse: copies by hand, notes, folders of other tools."""
    run = settings(tmp_path, save_every=1, keep=1)
    checkpoints = run.out / "checkpoints"
    others = {"step_00000004_best", "step_9", "step_latest", "step_", "notes.txt"}
    checkpoints.mkdir()
    for name in others - {"notes.txt"}:
        (checkpoints / name).mkdir()
    (checkpoints / "notes.txt").write_text("the fourth was the best")
    assert [step for step, _ in go(Toy(), settings(tmp_path, save_every=1, keep=1, resume="never")).seen] == list(range(6))
    assert {p.name for p in checkpoints.iterdir()} == others | {"step_00000006"}
    shutil.copytree(checkpoints / "step_00000006", checkpoints / "step_00000009_copy")
    assert go(Toy(), run).seen == [] and (checkpoints / "step_00000009_copy").is_dir()


def test_a_file_of_tensors_is_what_safetensors_writes_and_its_hash_is_known_at_once(tmp_path):
    torch.manual_seed(0)
    tied = torch.randn(3, 5)
    tensors = {"a": tied, "tied": tied, "half": torch.randn(7).bfloat16(),
               "last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
               "count": torch.tensor(3.0), "whole": torch.arange(4), "none": torch.zeros(0, 3), "turned": torch.randn(4, 6).T}
    told = write_tensors(tmp_path / "x.safetensors", tensors.items())
    assert told == {"bytes": (tmp_path / "x.safetensors").stat().st_size, "sha256": file_hash(tmp_path / "x.safetensors")}
    assert same(load_file(tmp_path / "x.safetensors"), tensors)


def test_where_no_checkpoint_is_whole_nothing_starts_anew(straight):
    for folder in (straight.out / "checkpoints").iterdir():
        flip(folder)
    with pytest.raises(ValueError, match="No checkpoint in .* is whole"):
        go(Toy(), settings(straight.out))


def test_another_base_or_another_setting_is_refused_key_by_key(straight):
    other = Toy()
    other.identity = {"base": "xyz", "plan": {"rows": 7}}
    with pytest.raises(ValueError, match="base: abc -> xyz; plan.rows: None -> 7"):
        go(other, settings(straight.out))
    with pytest.raises(ValueError, match=r"run.lr: 0.001 -> 0.1; run.seed: 0 -> 4"):
        go(Toy(), settings(straight.out, lr=0.1, seed=4))


def test_what_changes_nothing_may_change(tmp_path, straight, capsys):
    moved = straight.out.rename(tmp_path / "elsewhere")
    go(Toy(), settings(moved, log_every=3, micro=1, keep=5, max_steps=7, save_every=7))
    assert "run.max_steps: 6 -> 7" in capsys.readouterr().out and read(moved)[-1]["step"] == 7


def test_more_steps_extend_the_last_phase(tmp_path):
    """Growth and unlocking are shares of the steps that a run began with, also once it has more of them."""
    def config(steps: int) -> Config:
        return Config(settings(tmp_path, max_steps=steps))

    seen = []

    def toy(config: Config, device) -> Toy:
        made = Toy()
        made.loss, plain = lambda step: (seen.append((step.number, step.progress)), plain(step))[1], made.loss
        return made

    assert launch(toy, config(6)) and launch(toy, config(9))
    assert dict(seen) == {number: number / 6 for number in range(9)}
    assert settle(config(100), torch.device("cpu")).run.plan_steps == 6


def test_a_run_keeps_the_precision_that_it_began_in(tmp_path, monkeypatch, capsys):
    """Decided once, by the machine that begins; on another machine it goes on, says so, and refuses another one."""
    def go_on(steps: int, fast: torch.dtype, **fields) -> str:
        monkeypatch.setattr(precision, "fast_dtype", lambda device: fast)
        assert launch(lambda config, device: Toy(), Config(settings(tmp_path, max_steps=steps, **fields)))
        return capsys.readouterr().out

    def recorded() -> str:
        return from_toml(Config, tmp_path / "config.toml").run.precision

    assert go_on(3, torch.bfloat16).startswith("computes in bf16 on cpu\n") and recorded() == "bf16"
    out = go_on(6, torch.float32)
    assert out.startswith("computes in bf16 on cpu, though it computes fp32 faster") and "resumed toy at step 3" in out
    assert recorded() == "bf16" and "run.precision" not in out
    with pytest.raises(ValueError, match="run of other settings.*run.precision: bf16 -> fp32"):
        go_on(9, torch.float32, precision="fp32")


@pytest.mark.parametrize("fast, name", [(torch.bfloat16, "bf16"), (torch.float16, "fp32"), (torch.float32, "fp32")])
def test_a_new_run_computes_in_what_is_fast(tmp_path, monkeypatch, capsys, fast, name):
    """float16 would need a loss scaler, so that a GPU before Ampere trains in float32."""
    monkeypatch.setattr(precision, "fast_dtype", lambda device: fast)
    seen = []
    toy = Toy(at={0: lambda: seen.append(torch.is_autocast_enabled("cpu"))})
    assert launch(lambda config, device: toy, Config(settings(tmp_path)))
    assert seen == [name == "bf16"] and from_toml(Config, tmp_path / "config.toml").run.precision == name
    assert capsys.readouterr().out.startswith(f"computes in {name} on cpu\n")


def test_a_key_that_an_older_checkpoint_does_not_know_was_at_its_default(straight):
    for folder in (straight.out / "checkpoints").iterdir():
        record = json.loads((folder / "complete.json").read_text())
        del record["config"]["run"]["ema"], record["sha256"]  # nor was the record sealed then
        (folder / "complete.json").write_text(json.dumps(record))
    assert go(Toy(), settings(straight.out)).seen == []
    with pytest.raises(ValueError, match="run.ema: 0.999 -> 0.5"):
        go(Toy(), settings(straight.out, ema=0.5))


def test_the_newest_checkpoints_and_the_periodic_ones_stay(tmp_path):
    go(Toy(), settings(tmp_path, save_every=1, keep=2, keep_every=3, max_steps=8))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [f"step_{n:08d}" for n in (3, 6, 7, 8)]


@pytest.mark.skipif(resource is None, reason="no limit on the size of files here")
def test_a_full_disk_leaves_the_checkpoints_that_were_there(tmp_path):
    """A limit on the size of files stands in for the end of the disk: writing fails in the same place, with an error of the
    system."""
    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, hard))

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OSError, match="Step 2 could not be saved .* There is no checkpoint yet"):
            go(Toy(at={1: fill}), settings(tmp_path / "new", log_every=100, save_every=2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    try:
        with pytest.raises(OSError, match="Step 6 could not be saved .*; make room in .*checkpoints"):
            go(Toy(at={5: fill}), settings(tmp_path, log_every=100))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000003"]
    assert [step for step, _ in go(Toy(), settings(tmp_path)).seen] == [3, 4, 5]
