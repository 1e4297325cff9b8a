"""Ten thousand damaged and hostile files, and what the loaders make of them.

    python3 run.py bench files [--mutants 10000] [--seed 0]

Small files of every kind, each changed in one way, are loaded as the nodes load them. Core builds the base's networks.
tests/kernels/fuzz.py changes, seals and judges them. A run of the default number replaces benchmarks/files.md.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import sys
import tempfile
import time
from collections import Counter
from datetime import date
from pathlib import Path

from ..tests.kernels import fuzz
from ..tests.kernels.mutations import NAMES, mutant
from ..training.miniature.evaluation import table

PAGE = Path(__file__).with_suffix(".md")
MUTANTS = 10_000


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="run.py bench files", description=__doc__.split("\n\n")[0])
    parser.add_argument("--mutants", type=int, default=MUTANTS)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    logging.disable(logging.WARNING)  # core and transformers comment on every network
    rng, loaders = random.Random(options.seed), fuzz.through_core(os.environ["COMFYUI_PATH"])
    found: Counter = Counter()
    wrong, slowest = [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        changed = Path(folder, "changed.safetensors")
        paths = {kind: Path(folder, f"{kind}.safetensors") for kind in fuzz.KINDS}
        for kind, path in paths.items():
            fuzz.write(kind, path)
        originals = {kind: loaders[kind](path) for kind, path in paths.items()}
        for number in range(options.mutants):
            kind, name = fuzz.KINDS[number % len(fuzz.KINDS)], NAMES[number // len(fuzz.KINDS) % len(NAMES)]
            seal = rng.choice(fuzz.SEALS)
            changed.write_bytes(mutant(fuzz.File.of(paths[kind]), name, seal, rng))
            start = time.perf_counter()
            outcome, said = fuzz.outcome(loaders[kind], changed, originals[kind])
            slowest = max(slowest, time.perf_counter() - start)
            found[kind, name, seal, outcome] += 1
            if fuzz.faults(seal, name, outcome):
                wrong.append(f"{kind}, {name}, seal {seal}: {outcome} {said[:200]}")
            if number % 1000 == 999:
                print(f"{number + 1} files, {len(wrong)} faults", file=sys.stderr, flush=True)

    def rows(head: str, place: int, names: tuple[str, ...]) -> list[str]:
        def count(*wanted: str) -> int:
            return sum(times for key, times in found.items() if (key[place], key[3]) == wanted)

        return table.rows(
            [head, *fuzz.OUTCOMES],
            [[name, *(str(count(name, outcome)) for outcome in fuzz.OUTCOMES)] for name in names],
        )

    page = "\n".join([
        "# What becomes of a damaged or hostile file",
        "",
        f"{table.machine()}; {date.today()}; `python3 run.py bench files --mutants {options.mutants} --seed "
        f"{options.seed}`",
        "",
        f"{options.mutants} files, each changed in one way; faults: **{len(wrong)}**; the slowest load took "
        f"{slowest:.1f} s.",
        "",
        "*refused* is one sentence. *unchanged* is the same network with the same numbers. *other words* and *other "
        "numbers* is a network of the same tensors under another record, or with other numbers in them. A fault is "
        f"any other structure, a traceback, a load of over {fuzz.SECONDS} s; under the seal as it was saved also "
        f"other words or numbers; without a seal also a tensor that is read in another dtype.",
        "",
        "The seal is the digest in the record: *kept* as it was saved (damage), *none* (files from before there were "
        "digests), *new*, made after the change (a stranger's own file: its words and numbers, and the dtype in which "
        "it stores them, are his to choose).",
        "",
        *rows("seal", 2, fuzz.SEALS),
        "",
        *rows("change", 1, NAMES),
        "",
        *rows("file", 0, fuzz.KINDS),
        "",
    ])  # fmt: skip
    print(page)
    print(*wrong[:20], sep="\n", file=sys.stderr)
    if options.mutants == MUTANTS:
        PAGE.write_text(page, encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
