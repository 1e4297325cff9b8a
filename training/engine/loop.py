"""The training loop. Its whole state is a counter, the trainables, the optimizer and their average."""
from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch

from ...kernels.precision import autocast, resolve
from ..config import RunConfig
from .checkpoints import Checkpoints, settle
from .compiling import check_compiler
from .dry import dry_run
from .learner import Learner
from .lock import alone, check_folder
from .pace import Pace
from .run_folder import RunFolder
from .stage import Stage, Step
from .world import World

SKIPS = 5  # this many steps in a row may be skipped as not finite before the run gives up


class Signals:
    """Note SIGTERM, Ctrl-C and a closing terminal, so that the work can end and be saved. A second Ctrl-C stops at
    once, by KeyboardInterrupt. A second SIGTERM does not, because SLURM and torchrun both send one.

    notice: printed at the first signal, "" for nothing.
    """

    def __init__(self, notice: str = ""):
        self.notice = notice

    def __enter__(self) -> Signals:
        self.seen, self.interrupted = False, False
        numbers = [signal.SIGTERM, signal.SIGINT]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup ignores SIGHUP
            numbers.append(signal.SIGHUP)
        self.previous = {n: signal.signal(n, self.note) for n in numbers}
        return self

    def note(self, number, frame) -> None:
        if number == signal.SIGINT and self.interrupted:
            raise KeyboardInterrupt
        if not self.seen and self.notice:
            with suppress(OSError):  # print() is not reentrant, and the terminal may be gone
                os.write(2, f"{self.notice}\n".encode())
        self.seen, self.interrupted = True, self.interrupted or number == signal.SIGINT

    def __exit__(self, *error) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def check(stage: Stage, run: RunConfig, world: World) -> None:
    """Refuse what the stage cannot do."""
    if getattr(stage, "whole_batch", False) and len(world.share(run.batch, run.micro)[0]) != run.batch:
        raise ValueError(f"The loss of '{stage.name}' compares the samples of a batch with one another; "
                         f"run it in one process with --run.micro 0.")


@torch.no_grad()
def blame(stage: Stage, steps: list[Step], run: RunConfig, world: World) -> str:
    """Names of the samples whose loss is not finite; each is computed alone. Where only the gradient is not finite, the
    names of the whole batch."""
    found: dict[str, bool] = {}
    for step in steps:
        # Every process computes all of its samples, so that none waits for another's shard of the base.
        alone = ([step] if getattr(stage, "whole_batch", False)
                 else [replace(step, positions=range(p, p + 1)) for p in step.positions])
        for each in alone:
            with autocast(step.device, run.precision):
                value = stage.loss(each)[0]
            names = stage.describe(each) if hasattr(stage, "describe") else [f"number {p} of the batch" for p in each.positions]
            found |= dict.fromkeys(names, bool(value.isfinite()))
    gathered = {name: finite for part in world.gathered(found) for name, finite in part.items()}
    return ", ".join([name for name, finite in gathered.items() if not finite] or gathered)


def train(stage: Stage, config: Any, world: World) -> bool:
    """Run the stage from its last checkpoint (or from the start) to `config.run.max_steps`, then export.

    Ctrl-C, SIGTERM and SIGHUP may reach any process. All processes then finish the micro-batch, save and return False.
    A finished run returns True. The resumed run repeats a step whose micro-batches did not all finish.
    """
    run = config.run
    check(stage, run, world)
    learner = Learner(stage, run, world)
    checkpoints = Checkpoints(learner, config)
    start = saved = checkpoints.start()
    pace = Pace(run.max_steps, run.validate_every, run.save_every, getattr(stage, "effort", lambda number: 1.0))
    folder = RunFolder(config, stage.name, start, world.main, world.device, pace)

    def save(step: int) -> None:
        nonlocal saved
        if step > saved:
            folder.secure()
            checkpoints.save(step)
            folder.saved()
            saved = step

    def validate(step: int) -> None:
        save(step)  # the grace period of a signal may end before a validation does
        clock = time.perf_counter()
        learner.average.swap()
        stage.trainables.eval()
        with torch.no_grad():
            figures = stage.validate()
            pictures = stage.pictures() if hasattr(stage, "pictures") else {}
        stage.trainables.train()
        learner.average.swap()
        folder.validation(step, figures, pictures, time.perf_counter() - clock)

    def check_disk() -> None:
        if problem := world.broadcast(folder.problem):
            raise OSError(f"{problem}. {checkpoints.comfort()}.")

    if world.main and start:
        print(f"resumed {stage.name} at step {start}", flush=True)
    elif world.main and hasattr(stage, "report"):
        print(stage.report(), flush=True)
    validated = world.broadcast(folder.validated)
    skipped, stopped = 0, False
    with Signals("stopping: what is learnt is saved; Ctrl-C again stops at once" if world.main else "") as signals:
        stage.trainables.train()
        for number in range(start, run.max_steps):
            if number % run.validate_every == 0 and number != validated:
                validate(number)
            learner.set_rates(number)
            steps, done = learner.steps(number), number
            found = learner.gradients(steps, lambda: world.any(signals.seen))
            stopped = found is None
            if not stopped:
                parts, norm = found
                # One exchange per step: the mean loss, whether anything is not finite, a signal to any process, a disk
                # that refuses.
                *means, stopped, refused = world.mean([*parts.values(), float(signals.seen),
                                                       float(bool(folder.problem))])
                parts = dict(zip(parts, means))
                if refused:
                    check_disk()
                if math.isfinite(parts["loss"]) and math.isfinite(norm):
                    learner.step()
                    skipped = 0
                else:
                    skipped += 1
                    words = f"The loss or the gradient of step {number} is not finite; samples: {blame(stage, steps, run, world)}."
                    if run.on_nonfinite == "stop" or skipped > SKIPS:
                        raise FloatingPointError(f"{words} {checkpoints.comfort()}; --run.on-nonfinite skip passes "
                                                 f"over up to {SKIPS} such steps in a row.")
                    if world.main:
                        print(f"{words} The step is skipped.", flush=True)
                learner.clear()
                done = number + 1
                folder.step(done, parts, norm, learner.rates(), skipped)
            if done % run.save_every == 0 or done == run.max_steps or stopped:
                save(done)
            if stopped:
                if world.main:
                    print(f"stopped by a signal; step {done} is saved in {checkpoints.folder}" if saved else
                          "stopped by a signal before the first step had ended", flush=True)
                break
        else:
            last = max(start, run.max_steps)
            validate(last)  # a finished run is validated too: its export carries the figures
            learner.average.swap()
            stage.trainables.eval()
            if world.main:
                stage.export(last)
    folder.close()
    check_disk()
    return not stopped


def chosen(precision: str, device: torch.device) -> str:
    """A line about the precision of a run and, where the device has a faster one, why it is not used."""
    fast = resolve("auto", device)
    why = "" if precision == fast else f", though it computes {fast} faster: so the run began, or was told to"
    return f"computes in {precision} on {device.type}{why}"


def launch(stage: Callable[[Any, torch.device], Stage], config: Any) -> bool:
    """Make the stage of a configuration (with a `run`) on its device and train it. False where it was stopped."""
    run = config.run
    if run.compile:
        check_compiler()
    if run.threads:
        torch.set_num_threads(run.threads)
    world = World.start(run.device)
    world.share(run.batch, run.micro)
    if not run.dry_run:
        check_folder(run.out)
    torch.manual_seed(run.seed)
    config = world.broadcast(settle(config, world.device))
    if world.main:
        print(chosen(config.run.precision, world.device), flush=True)
    made = stage(config, world.device)
    if run.dry_run:
        ended = dry_run(made, config, world)
    else:
        with alone(run.out, world):
            ended = train(made, config, world)
    world.leave()
    return ended
