"""Whatever is done to a file, a loader gives the network that it was, or one sentence."""

from __future__ import annotations

import os
import random

import pytest
from semantic_diffusion_adapter.tests.kernels import fuzz
from semantic_diffusion_adapter.tests.kernels.mutations import NAMES, mutant

pytestmark = pytest.mark.skipif(os.name == "nt", reason="a load is given up by SIGALRM")


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_no_change_to_a_file_does_harm(kind, tmp_path):
    """Two of every kind of change, under one seal each; `python3 run.py bench files` tries thousands."""
    rng, path, changed = random.Random(kind), tmp_path / "whole.safetensors", tmp_path / "changed.safetensors"
    fuzz.write(kind, path)
    original, found = fuzz.LOADERS[kind](path), set()
    for name in (*NAMES, *NAMES):
        seal = rng.choice(fuzz.SEALS)
        changed.write_bytes(mutant(fuzz.File.of(path), name, seal, rng))
        outcome, said = fuzz.outcome(fuzz.LOADERS[kind], changed, original)
        assert not fuzz.faults(seal, name, outcome), (name, seal, outcome, said)
        found.add(outcome)
    assert "refused" in found


def test_what_is_not_changed_is_not_refused(tmp_path):
    """Under every seal, so that nothing above is refused for the fuzzer's own mistakes."""
    for kind in fuzz.KINDS:
        path, again = tmp_path / f"{kind}.safetensors", tmp_path / "again.safetensors"
        fuzz.write(kind, path)
        for seal in fuzz.SEALS:
            again.write_bytes(mutant(fuzz.File.of(path), "nothing", seal, random.Random(0)))
            assert fuzz.outcome(fuzz.LOADERS[kind], again, fuzz.LOADERS[kind](path)) == ("unchanged", ""), (kind, seal)


def test_the_fuzzer_knows_a_fault_when_it_sees_one(tmp_path):
    path = tmp_path / "a.safetensors"
    fuzz.write("embedding", path)
    original = fuzz.LOADERS["embedding"](path)

    def raises(error):
        def load(path):
            raise error

        return load

    for error in (
        KeyError("x"),
        RecursionError("x."),
        UnicodeDecodeError("utf-8", b"", 0, 1, "x."),
        ValueError("two\nlines."),
        ValueError(""),
    ):
        assert fuzz.outcome(raises(error), path, original)[0] == "traceback"
    assert fuzz.outcome(raises(ValueError("A sentence.")), path, original)[0] == "refused"
    assert fuzz.outcome(raises(fuzz.Hang()), path, original)[0] == "hang"
    other = fuzz.Loaded(original.structure | {"x": ()}, original.numbers, original.words)
    assert fuzz.outcome(lambda path: other, path, original)[0] == "other structure"
