"""The adapter through a toy Flux by one process, by two, and by two that share the base's weights: one and the same training."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install -e '.[training]'")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks processes")

from safetensors.torch import load_file  # noqa: E402

HERE = Path(__file__).parent
CASES = ("ddp", "sharded", "small")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    subprocess.run([sys.executable, str(HERE / "ranks.py"), str(folder)], check=True, timeout=300)
    return folder


def told(root: Path, case: str, rank: int = 0) -> dict:
    return json.loads((root / f"{case}.{rank}.json").read_text())


def losses(root: Path, case: str) -> list[tuple]:
    lines = [json.loads(line) for line in (root / case / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["flow"], line["gradient_norm"]) for line in lines if "loss" in line]


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_one_process(root, case):
    """Before growth and unlock (step 0) and after both (step 7)."""
    alone, found = (load_file(root / f"{name}.safetensors") for name in ("alone", case))
    assert alone.keys() == found.keys()
    a, b = (torch.cat([grads[k].double().flatten() for k in sorted(grads)]) for grads in (alone, found))
    cosine = float(torch.nn.functional.cosine_similarity(a, b, dim=0))
    error = float((a - b).abs().max() / a.abs().max())
    print(f"{case}: cosine {cosine:.12f}, largest error {error:.1e} of the largest gradient")
    # In micro-batches of one size there is one sum of two, in whatever process: to the last bit.
    assert torch.equal(a, b) if case != "small" else (cosine > 1 - 1e-10 and error < 1e-5)


def test_growth_and_unlock_change_who_learns_and_nobody_waits(root):
    alone = load_file(root / "alone.safetensors")
    early, late = ({k[2:] for k in alone if k.startswith(f"{number}.")} for number in (0, 7))
    assert late - early == {k for k in late if k.startswith("tuned.")} and late > early
    rows = [(alone[f"{number}.adapter.queries"].abs().sum(-1) > 0).sum() for number in (0, 7)]
    assert rows[0] == 16 < rows[1]
    assert all(told(root, case, rank)["ended"] for case, rank in (("alone", 0), ("ddp", 0), ("ddp", 1)))


@pytest.mark.parametrize("case", ["ddp", "moved"])
def test_the_curve_is_that_of_one_process_to_the_last_digit(root, case):
    """`moved` is stopped after three steps on one process, and goes on with two, its base sharded and checkpointed."""
    assert len(losses(root, case)) == 8 and losses(root, case) == losses(root, "alone")


@pytest.mark.parametrize("case", ["alone", *CASES])
def test_the_base_is_untouched_bit_for_bit(root, case):
    assert all(told(root, case, rank)["untouched"] for rank in range(1 if case == "alone" else 2))


def test_a_sharded_base_holds_half_and_is_gathered_but_never_reduced(root):
    """Collectives of one step, as the profiler sees them: a gather for each block and the root in the forward, for each block
    again in the backward, and the adapter's own all-reduces; not one reduce-scatter."""
    whole = told(root, "alone")["base_numbers"]
    for number in ("0", "7"):
        plain, sharded = (told(root, case)["counts"][number] for case in ("ddp", "sharded"))
        print(f"step {number}: replicated {plain}, sharded {sharded}")
        blocks = told(root, "sharded")["blocks"]
        assert sharded == {**plain, "_allgather_base_": 2 * blocks + 1}
    assert [told(root, "sharded", rank)["base_numbers"] for rank in (0, 1)] == [whole // 2] * 2


def test_the_first_process_alone_writes(root):
    assert [step for step, *_ in losses(root, "ddp")] == list(range(1, 9))
    assert (root / "ddp" / "exports").read_text() == "once\n"
    assert len(list((root / "ddp").glob("events.out.tfevents.*"))) == 1
