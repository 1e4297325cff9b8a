"""Compare the edit decoders on the miniature: T5 token by token, T5 in one pass, and a causal LLM of the same size.

    python3 run.py bench decoders --train STEPS [--scenes N] [--json]
    python3 run.py bench decoders --t5 FILE --llm FILE [--scenes N] [--json]

--train trains both on the same samples, one after the other (stages `editor` and `editor-llm`), into runs/decoders. A
stopped run continues. Success and preservation are those of the evaluation, on scenes that no decoder was trained on.
Times are ratios to T5 in one pass: the decoders take turns, and the ratio is the median over the turns. A run over the
default scenes replaces benchmarks/decoders.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ..kernels import checkpoint
from ..kernels.edit_decoder import EditDecoder
from ..training import cli
from ..training.engine import pick_device
from ..training.engine.timing import ratios
from ..training.miniature.captions import OPERATIONS
from ..training.miniature.evaluation import editing, table
from ..training.miniature.evaluation.reconstruction import parse_all
from ..training.miniature.evaluation.system import ASSETS, Miniature
from ..training.miniature.scenes import render
from ..training.objectives.edit import load_editor

PAGE = Path(__file__).with_suffix(".md")
RUNS = Path("runs/decoders")
SCENES = 256
TURNS = 9
MANY = 32  # edits at once, beside one
PRESET = "tree128"
STAGES = {"t5": "editor", "llm": "editor-llm"}
# A compared way -> (its file, the mode it writes in). Times are ratios to the first.
WAYS = {
    "T5, parallel": ("t5", "parallel"),
    "T5, autoregressive": ("t5", "autoregressive"),
    "causal LLM, parallel": ("llm", "parallel"),
}


@dataclass(frozen=True)
class Trained:
    decoder: EditDecoder
    steps: int

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.decoder.parameters())


def train(steps: int) -> dict[str, Path]:
    """Train both decoders for so many steps. The program ends where a run was stopped."""
    files = {name: RUNS / f"{name}.safetensors" for name in STAGES}
    for name, stage in STAGES.items():
        flags = ["--run.max-steps", str(steps), "--run.out", str(RUNS / name), "--export", str(files[name])]
        code = cli.main(["miniature", stage, *flags])
        if code:
            raise SystemExit(code)
    return files


def read(path: Path, device: torch.device) -> Trained:
    decoder = load_editor(path, device)[0]
    return Trained(decoder, checkpoint.read_header(path, "edit_decoder")["step"])


def quality(system: Miniature, trained: dict[str, Trained], count: int, seed: int) -> tuple[dict, dict[str, int]]:
    """({way: {operation or "all": {"success", "preservation"}}}, edits by operation) over the first `count` test
    scenes.

    `oracle` is the adapter's embedding of the true edited picture, `copy` the unedited one.
    """
    changes = editing.instructions("test", count, seed)
    sources, targets = (np.stack([render(scene) for scene in scenes])
                        for scenes in ([c.source for c in changes], [c.target for c in changes]))
    noise, words = system.noise("test", range(count), seed), [change.instruction for change in changes]
    source, embeddings = system.embed(sources, PRESET), {}
    for way, (name, mode) in WAYS.items():
        system.editor = trained[name].decoder
        embeddings[way] = system.edit(source, words, mode)
    embeddings |= {"oracle": system.embed(targets, PRESET), "copy": source}
    figures = {way: editing.by_operation(changes, parse_all(system.paint(embedding, PRESET, noise)))
               for way, embedding in embeddings.items()}
    return figures, {op: sum(change.operation == op for change in changes) for op in OPERATIONS} | {"all": count}


def speed(system: Miniature, trained: dict[str, Trained], batch: int) -> dict[str, float]:
    """Time of `batch` edits at once, by way, as ratios."""
    changes = editing.instructions("test", batch, 0)
    source, words = system.embed([render(c.source) for c in changes], PRESET), [c.instruction for c in changes]

    def call(name: str, mode: str) -> Callable[[], object]:
        def edit():
            system.editor = trained[name].decoder
            return system.edit(source, words, mode)
        return edit

    return ratios({way: call(name, mode) for way, (name, mode) in WAYS.items()}, system.device.type, TURNS)


def page(results: dict, scenes: int, seed: int, command: str) -> str:
    operations = [f"{op} ({results['edits'][op]})" for op in (*OPERATIONS, "all")]
    quality_rows = [[way, *(f"{table.number(values[op]['success'])} / {table.number(values[op]['preservation'])}"
                            for op in (*OPERATIONS, "all"))] for way, values in results["quality"].items()]
    size_rows = [[way, f"{results['parameters'][name]:,}", f"{results['steps'][name]:,}",
                  f"{results['time_of_one'][way]:.2f}", f"{results['time_of_many'][way]:.2f}"]
                  for way, (name, _) in WAYS.items()]
    return "\n".join([
        "# The edit decoders, on the miniature",
        "",
        f"{table.machine()}; {date.today()}; `{command}`",
        "",
        f"{scenes} scenes of the test split (seed {seed}), never trained on; 20 Euler steps under `{PRESET}`. All "
        f"were trained with the same loss on the same samples in the same order; the steps stand in the second table.",
        "",
        "## What they do",
        "",
        "Success / preservation, by operation (number of edits). `oracle`: the embedding of the true edited picture; "
        "`copy`: the unedited embedding.",
        "",
        *table.rows(["", *operations], quality_rows),
        "",
        "## What they cost",
        "",
        f"Time per edit as a ratio to T5 in one pass, of one edit and of {MANY} at once: the median over "
        f"{TURNS} turns.",
        "",
        *table.rows(["", "parameters", "steps", "time, one edit", f"time, {MANY} at once"], size_rows),
        "",
    ])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="run.py bench decoders", description=__doc__.split("\n\n")[0])
    parser.add_argument("--train", type=int, metavar="STEPS", help="train both decoders for so many steps first")
    parser.add_argument("--t5", type=Path, help="a trained T5 edit decoder of the miniature")
    parser.add_argument("--llm", type=Path, help="a trained causal LLM as its edit decoder")
    parser.add_argument("--scenes", type=int, default=SCENES, help=f"test scenes, at least 2 (default: {SCENES})")
    parser.add_argument("--seed", type=int, default=0, help="another seed makes fresh scenes and noise (default: 0)")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--assets", type=Path, default=ASSETS,
                        help="folder of the other weights (default: the shipped ones)")
    options = parser.parse_args(argv)
    if options.scenes < 2 or options.seed < 0 or (options.train or 1) < 1:
        parser.error("--scenes is at least 2, --train at least 1 and --seed at least 0.")
    given = (options.t5, options.llm)
    if any(given) if options.train else not all(given):
        parser.error("Give either --train STEPS, or both --t5 FILE and --llm FILE.")
    try:
        files = train(options.train) if options.train else {"t5": options.t5, "llm": options.llm}
        with tqdm(total=(len(WAYS) + 2) * options.scenes, desc="painting", unit="picture", mininterval=1) as bar:
            system = Miniature(options.assets, pick_device("auto"), bar.update, adapters=(PRESET,))
            trained = {name: read(path, system.device) for name, path in files.items()}
            figures, edits = quality(system, trained, options.scenes, options.seed)
        results = {"quality": figures, "edits": edits, "steps": {name: each.steps for name, each in trained.items()},
                   "parameters": {name: each.parameters for name, each in trained.items()},
                   "time_of_one": speed(system, trained, 1), "time_of_many": speed(system, trained, MANY)}
    except (ValueError, OSError) as error:
        print(f"bench decoders: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench decoders: stopped", file=sys.stderr)
        return 130
    source = f"--train {options.train}" if options.train else f"--t5 {options.t5.name} --llm {options.llm.name}"
    command = f"python3 run.py bench decoders {source} --scenes {options.scenes} --seed {options.seed}"
    text = page(results, options.scenes, options.seed, command)
    print(text)
    if (options.scenes, options.seed, options.assets) == (SCENES, 0, ASSETS):
        PAGE.write_text(text, encoding="utf-8")
    if options.json:
        print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
