"""The training loop: one explicit loop whose whole state is a counter, the trainables, the optimizer and their average."""
from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ...kernels.precision import autocast, resolve
from ..config import RunConfig
from .checkpoints import Checkpoints, settle
from .compiling import check_compiler
from .dry import dry_run
from .learner import Learner
from .lock import alone
from .run_folder import RunFolder
from .stage import Stage, Step
from .world import World

SKIPS = 5  # steps in a row whose loss or gradient may be not finite before a run that skips them gives up


class Signals:
    """Notes SIGTERM, Ctrl-C and a terminal that closes while it is open, so that a step can end and be saved."""

    def __enter__(self) -> Signals:
        self.seen = False
        numbers = [signal.SIGTERM, signal.SIGINT]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup leaves it
            numbers.append(signal.SIGHUP)
        self.previous = {n: signal.signal(n, self.note) for n in numbers}
        return self

    def note(self, number, frame) -> None:
        self.seen = True

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
    """Names of the samples whose loss is not finite, each asked alone; of the whole batch where only the gradient is not."""
    found: dict[str, bool] = {}
    for step in steps:
        # Every process asks for all of its samples, so that none waits for another's share of a base.
        alone = [step] if getattr(stage, "whole_batch", False) else [replace(step, positions=range(p, p + 1)) for p in step.positions]
        for each in alone:
            with autocast(step.device, run.precision):
                value = stage.loss(each)[0]
            names = stage.describe(each) if hasattr(stage, "describe") else [f"number {p} of the batch" for p in each.positions]
            found |= dict.fromkeys(names, bool(value.isfinite()))
    told = {name: finite for part in world.gathered(found) for name, finite in part.items()}
    return ", ".join([name for name, finite in told.items() if not finite] or told)


def train(stage: Stage, config: Any, world: World) -> bool:
    """Run the stage from its last checkpoint (or from the start) to `config.run.max_steps`, then export.

    Ctrl-C, SIGTERM and SIGHUP, to whichever process, let the step end in all, save and return False; a finished run returns True.
    """
    run = config.run
    check(stage, run, world)
    learner = Learner(stage, run, world)
    checkpoints = Checkpoints(learner, config)
    start = checkpoints.start()
    folder = RunFolder(config, stage.name, start, world.main, world.device)

    def validate(step: int) -> None:
        clock = time.perf_counter()
        learner.average.swap()
        stage.trainables.eval()
        with torch.no_grad():
            figures = stage.validate()
            pictures = stage.pictures() if hasattr(stage, "pictures") else {}
        stage.trainables.train()
        learner.average.swap()
        folder.validation(step, figures, pictures, time.perf_counter() - clock)
        folder.restart_clock()

    if world.main and start:
        print(f"resumed {stage.name} at step {start}", flush=True)
    elif world.main and hasattr(stage, "report"):
        print(stage.report(), flush=True)
    validated = world.said_by_main(folder.validated)
    skipped, ended = 0, True
    with Signals() as signals:
        stage.trainables.train()
        for number in range(start, run.max_steps):
            if number % run.validate_every == 0 and number != validated:
                validate(number)
            learner.set_rates(number)
            steps = learner.steps(number)
            parts, norm = learner.gradients(steps)
            # One exchange a step: the mean loss, whether anything is not finite, whether a signal came to any process.
            *means, stop = world.mean([*parts.values(), float(signals.seen)])
            parts = dict(zip(parts, means))
            if math.isfinite(parts["loss"]) and math.isfinite(norm):
                learner.step()
                skipped = 0
            else:
                skipped += 1
                words = f"The loss or the gradient of step {number} is not finite; samples: {blame(stage, steps, run, world)}."
                if run.on_nonfinite == "stop" or skipped > SKIPS:
                    raise FloatingPointError(f"{words} The last checkpoint in {checkpoints.folder} is good; --run.on-nonfinite skip "
                                             f"passes over up to {SKIPS} such steps in a row.")
                if world.main:
                    print(f"{words} The step is skipped.", flush=True)
            learner.clear()
            folder.step(number + 1, parts, norm, learner.rates(), skipped)
            if (number + 1) % run.save_every == 0 or number + 1 == run.max_steps or stop:
                folder.secure()
                checkpoints.save(number + 1)
                folder.restart_clock()
            if stop:
                if world.main:
                    print(f"stopped by a signal; step {number + 1} is saved in {checkpoints.folder}", flush=True)
                ended = False
                break
        else:
            last = max(start, run.max_steps)
            validate(last)  # also for a run that had ended: what is exported carries its figures
            learner.average.swap()
            stage.trainables.eval()
            if world.main:
                stage.export(last)
    folder.close()
    return ended


def chosen(precision: str, device: torch.device) -> str:
    """What a run computes in and, where the device has something faster, why not in that."""
    fast = resolve("auto", device)
    why = "" if precision == fast else f", though it computes {fast} faster: so the run began, or was told to"
    return f"computes in {precision} on {device.type}{why}"


def launch(stage: Callable[[Any, torch.device], Stage], config: Any) -> bool:
    """Make the stage of a configuration (with a `run`) on its device and train it; False if it was stopped."""
    run = config.run
    if run.compile:
        check_compiler()
    if run.threads:
        torch.set_num_threads(run.threads)
    world = World.start(run.device)
    world.share(run.batch, run.micro)
    torch.manual_seed(run.seed)
    config = world.said_by_main(settle(config, world.device))
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
