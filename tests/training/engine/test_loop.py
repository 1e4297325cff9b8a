"""The loop on a toy stage: the real optimizer, checkpoints, averages and signals."""
from __future__ import annotations

import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

pytest.importorskip("tensorboard", reason="tensorboard is not installed: pip install -e '.[training]'")

from semantic_diffusion_adapter.training.engine import Step, World, check_sharding, launch, learning_rate, train  # noqa: E402
from semantic_diffusion_adapter.training.engine.dry import dry_run  # noqa: E402
from semantic_diffusion_adapter.training.engine.lock import alone  # noqa: E402
from toys import Config, Toy, go, read, same, settings  # noqa: E402


def stop_at(step: int, number: int = signal.SIGTERM) -> dict:
    return {step: lambda: os.kill(os.getpid(), number)}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_and_the_resumed_run_is_the_same_bit_for_bit(tmp_path, straight, number):
    run = settings(tmp_path / "cut", save_every=100)
    handler = signal.getsignal(number)
    first = go(Toy(at=stop_at(1, number)), run)
    assert signal.getsignal(number) == handler
    assert [step for step, _ in first.seen] == [0, 1] and first.exported is None
    assert [p.name for p in (run.out / "checkpoints").iterdir()] == ["step_00000002"]
    second = go(Toy(init=9), run)
    assert first.seen + second.seen == straight.seen
    assert same(second.trainables.state_dict(), straight.trainables.state_dict())
    assert same(second.exported, straight.exported)


def test_a_signal_between_micro_batches_ends_the_step_and_the_one_before_is_saved(tmp_path):
    """A step may take longer than the grace that a cluster gives; no more than a micro-batch is waited for."""
    run = dict(batch=6, micro=2, save_every=100)
    whole = go(Toy(), settings(tmp_path / "whole", **run))
    first = Toy(at=stop_at(3))
    go(first, settings(tmp_path / "cut", **run))
    assert [step for step, _ in first.seen] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]
    assert [p.name for p in (tmp_path / "cut" / "checkpoints").iterdir()] == ["step_00000003"]
    assert [line["step"] for line in read(tmp_path / "cut")] == [0, 1, 2, 3]
    second = go(Toy(init=9), settings(tmp_path / "cut", **run))
    assert second.seen == whole.seen[9:] and same(second.exported, whole.exported)


def test_a_signal_in_a_validation_has_nothing_to_lose(tmp_path):
    """Its checkpoint comes first, since a validation may take longer than the grace."""
    def killed():
        assert (tmp_path / "checkpoints" / "step_00000004" / "complete.json").is_file()
        os.kill(os.getpid(), signal.SIGTERM)
        return {"weight": 0.0}

    stage = Toy()
    stage.validate = lambda: killed() if len(stage.seen) == 4 else {"weight": 1.0}
    assert not train(stage, Config(settings(tmp_path, validate_every=4)), World.start("cpu"))
    assert [step for step, _ in stage.seen] == [0, 1, 2, 3] and read(tmp_path)[-1]["step"] == 4


def test_a_signal_before_the_first_step_saves_nothing(tmp_path, capsys):
    stage = Toy()
    stage.validate = lambda: os.kill(os.getpid(), signal.SIGTERM) or {}
    assert not train(stage, Config(settings(tmp_path)), World.start("cpu"))
    assert stage.seen == [] and not (tmp_path / "checkpoints").exists()
    assert "stopped by a signal before the first step had ended" in capsys.readouterr().out


def test_a_second_ctrl_c_stops_at_once_and_a_second_sigterm_does_not(tmp_path):
    """SLURM sends a SIGTERM to every process of a job, and torchrun another one to those that it started."""
    def twice(number: int) -> dict:
        return {1: lambda: [os.kill(os.getpid(), number) for _ in range(2)]}

    stage, handler = Toy(at=twice(signal.SIGINT)), signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        go(stage, settings(tmp_path / "int"))
    assert [step for step, _ in stage.seen] == [0] and signal.getsignal(signal.SIGINT) == handler
    go(Toy(at=twice(signal.SIGTERM)), settings(tmp_path / "term"))
    assert [p.name for p in (tmp_path / "term" / "checkpoints").iterdir()] == ["step_00000002"]


def test_export_and_validation_see_the_averaged_weights(straight):
    live = straight.trainables.state_dict()  # the engine leaves the averaged weights in place after the export
    assert same(live, straight.exported)


def test_a_gradient_that_is_not_finite_ends_the_run_with_good_weights(tmp_path):
    stage = Toy()
    stage.at[4] = lambda: stage.trainables["head"][1].bias.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="step 4"):
        go(stage, settings(tmp_path / "nan"))
    assert go(Toy(), settings(tmp_path / "nan")).seen[0][0] == 3


class Poisoned(Toy):
    """A stage one of whose samples is broken in some steps."""

    bad: dict[int, int] = {}  # step -> position

    def loss(self, step: Step):
        loss, parts = super().loss(step)
        return loss * (float("nan") if self.bad.get(step.number) in step.positions else 1.0), parts

    def describe(self, step: Step):
        return [f"picture_{step.number}_{p}.jpg" for p in step.positions]


def test_a_loss_that_is_not_finite_names_the_sample(tmp_path):
    stage = Poisoned()
    stage.bad = {4: 2}
    with pytest.raises(FloatingPointError, match=r"step 4 is not finite; samples: picture_4_2.jpg\. The last checkpoint in .*checkpoints"):
        go(stage, settings(tmp_path, batch=4, micro=2))
    stage = Poisoned()
    stage.bad = {1: 0}
    with pytest.raises(FloatingPointError, match=r"picture_1_0.jpg\. There is no checkpoint yet;"):
        go(stage, settings(tmp_path / "early", batch=4, micro=2))


def test_steps_that_are_not_finite_can_be_left_out_but_not_for_ever(tmp_path, capsys):
    stage = Poisoned()
    stage.bad = {2: 0, 3: 1}
    go(stage, settings(tmp_path / "some", on_nonfinite="skip"))
    assert all(v.isfinite().all() for v in stage.exported.values())
    lines = read(tmp_path / "some")
    assert [(line["step"], line["loss"]) for line in lines if line.get("skipped")] == [(3, None), (4, None)]
    assert "picture_2_0.jpg. The step is skipped" in capsys.readouterr().out
    stage = Poisoned()
    stage.bad = dict.fromkeys(range(1, 20), 0)
    with pytest.raises(FloatingPointError, match="step 6"):
        go(stage, settings(tmp_path / "all", on_nonfinite="skip", max_steps=20))


def test_after_a_crash_the_figures_neither_repeat_nor_contradict_themselves(tmp_path, straight):
    def crash():
        raise KeyboardInterrupt

    run = settings(tmp_path / "crash", validate_every=3)
    with pytest.raises(KeyboardInterrupt):
        go(Toy(at={5: crash}), run)
    assert [line["step"] for line in read(run.out)] == [0, 1, 2, 3, 3, 4, 5]
    with open(run.out / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "sam')  # torn by a kill
    go(Toy(init=9), run)
    lines = read(run.out)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 3, 4, 5, 6, 6]
    assert [line["loss"] for line in lines if "loss" in line] == [line["loss"] for line in read(straight.out) if "loss" in line]


def test_a_damaged_line_of_the_figures_is_put_aside_and_the_later_ones_stay(tmp_path, straight, capsys):
    path = straight.out / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    bad = [b'{"step": 2, "loss": 0.\x00\xff\n', b"[3]\n"]
    path.write_bytes(b"".join([*lines[:2], *bad, *lines[3:]]))
    go(Toy(), settings(straight.out))
    assert "2 lines of" in (said := capsys.readouterr().out) and "metrics.damaged.jsonl" in said
    assert (straight.out / "metrics.damaged.jsonl").read_bytes() == b"".join(bad)
    assert path.read_bytes() == b"".join([*lines[:2], *lines[3:]])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no limit on the size of files here")
def test_a_disk_that_is_full_for_the_figures_is_one_sentence(tmp_path):
    """A limit on the size of files stands in for the end of the disk."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    stage = Toy(at={3: lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (400, hard))})
    try:
        with pytest.raises(OSError, match=r"metrics.jsonl could not be written \(.*\); make room in .* There is no checkpoint yet\.$"):
            go(stage, settings(tmp_path, save_every=100, log_every=100))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("inside", ["", "deeper/run"])
def test_a_run_folder_that_can_be_none_is_refused_before_anything_is_made(tmp_path, inside):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is a file; give a folder with --out"):
        launch(lambda config, device: pytest.fail("the stage was made"), Config(settings(tmp_path / "file" / inside)))


def test_a_validation_that_a_kill_prevented_is_made_up_for(tmp_path):
    """The checkpoint of a step is older than its validation."""
    def crash():
        raise KeyboardInterrupt

    stage, run = Toy(), settings(tmp_path, validate_every=3)
    real, stage.validate = stage.validate, lambda: real() if len(stage.seen) < 3 else crash()
    with pytest.raises(KeyboardInterrupt):
        go(stage, run)
    go(Toy(), run)
    assert [line["step"] for line in read(tmp_path) if "validation/weight" in line] == [0, 3, 6]


def test_pictures_of_a_validation_lie_in_their_folder(tmp_path):
    stage = Toy()
    stage.pictures = lambda: {"grid": np.full((4, 6, 3), 200, np.uint8)}
    go(stage, settings(tmp_path, validate_every=3))
    assert sorted(p.name for p in (tmp_path / "validation").iterdir()) == [f"{n:08d}_grid.png" for n in (0, 3, 6)]
    assert (np.asarray(Image.open(tmp_path / "validation" / "00000003_grid.png")) == 200).all()


def test_a_child_whose_share_of_the_rate_is_zero_does_not_learn_until_it_does(tmp_path):
    stage = Toy()
    stage.scales = lambda step: {"conv": 1.0 if step >= 3 else 0.0}
    before, weights = stage.trainables["conv"].weight.detach().clone(), {}
    for step in (3, 5):
        stage.at[step] = lambda step=step: weights.update({step: stage.trainables["conv"].weight.detach().clone()})
    go(stage, settings(tmp_path))
    assert torch.equal(weights[3], before) and not torch.equal(weights[5], before)


def test_micro_batches_add_up_to_the_batch(tmp_path):
    for micro in (0, 1, 2):
        go(Toy(), settings(tmp_path / str(micro), batch=4, micro=micro, max_steps=1, precision="fp32"))
    # The first step's figures: from the second on, Adam makes the sign of a last digit into a whole step of a weight.
    whole, one, two = ([(line["loss"], line["gradient_norm"]) for line in read(tmp_path / str(m)) if "loss" in line][0]
                       for m in (0, 1, 2))
    assert one == pytest.approx(whole, rel=1e-5) and two == pytest.approx(whole, rel=1e-5)


def test_a_batch_that_cannot_be_shared_is_refused_with_what_would_work():
    world = World(0, 5, 0, 5, torch.device("cpu"))
    with pytest.raises(ValueError, match="run.batch 12 cannot be shared by 5 processes; 1, 2, 3, 4, 6, 12 would work"):
        world.share(12)
    with pytest.raises(ValueError, match="by 5 processes with run.micro 2; 1, 2, 3, 6 would work"):
        world.share(12, 2)
    with pytest.raises(ValueError, match="run.batch 12 is not a multiple of run.micro 5"):
        world.share(12, 5)


def test_what_cannot_be_sharded_is_refused():
    pair = World(0, 2, 0, 2, torch.device("cpu"))
    for precision in ("int8", "nf4"):
        with pytest.raises(ValueError, match=f"A base in {precision} cannot be sharded"):
            check_sharding(precision, pair)
    check_sharding("bf16", pair)
    with pytest.raises(ValueError, match="nothing to shard over"):
        check_sharding("bf16", World(0, 2, 0, 1, torch.device("cpu")))


def test_a_dry_run_shows_settings_parts_and_a_step_and_writes_nothing(tmp_path, capsys):
    stage = Toy()
    stage.frozen, stage.report = {"base": nn.Linear(1000, 100).requires_grad_(False)}, lambda: "bucket 512 x 512: 7 samples"
    assert dry_run(stage, Config(settings(tmp_path / "none", batch=4, micro=2)), World.start("cpu"))
    said = capsys.readouterr().out
    assert not (tmp_path / "none").exists() and [step for step, _ in stage.seen] == [0, 0]
    for words in ("batch = 4", "conv", "112", "base", "100,100", "bucket 512 x 512: 7 samples", "loss 0.", "2 micro-batches"):
        assert words in said, words


def test_without_a_compiler_compile_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ValueError, match="C\\+\\+ compiler .*--run.no-compile"):
        launch(lambda config, device: pytest.fail("the stage was made"), Config(settings(tmp_path / "c", compile=True)))


def test_metrics_are_written_per_step(tmp_path, straight):
    lines = read(straight.out)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5, 6, 6]
    assert lines[1].keys() >= {"samples", "loss", "error", "lr/conv", "lr/head", "gradient_norm", "samples_per_second", "memory_gib"}
    assert lines[3]["lr/conv"] == lines[3]["lr/head"] / 2 > 0 and lines[3]["samples"] == 6
    assert "validation/weight" in lines[0] and "validation/weight" in lines[-1]
    assert list((tmp_path / "straight").glob("events.out.tfevents.*"))


def test_the_learning_rate_warms_up_stays_and_falls_to_zero(tmp_path):
    run = settings(tmp_path, max_steps=100, warmup=10, decay=0.2, lr=1.0)
    rates = [learning_rate(run, step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[9:80] == pytest.approx([1.0] * 71)
    assert rates[90] == pytest.approx(0.5) and rates[100] == 0 and rates[99] > 0


def test_a_run_folder_takes_one_run_at_a_time(tmp_path):
    world = World.start("cpu")
    with alone(tmp_path / "run", world):
        with pytest.raises(ValueError, match="Another run is writing"), alone(tmp_path / "run", world):
            pass
    with alone(tmp_path / "run", world):  # let go of at the end
        pass
