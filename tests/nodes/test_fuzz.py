"""As tests/kernels/test_fuzz.py, with core building the networks of the base."""

from __future__ import annotations

import os
import random

import pytest
from semantic_diffusion_adapter.tests.kernels import fuzz
from semantic_diffusion_adapter.tests.kernels.mutations import NAMES, mutant

pytest.importorskip("comfy")
pytestmark = pytest.mark.skipif(os.name == "nt", reason="a load is given up by SIGALRM")


@pytest.mark.parametrize("kind", fuzz.BASE)
def test_no_change_to_a_file_of_the_base_does_harm(kind, tmp_path):
    rng, path, changed = random.Random(kind), tmp_path / "whole.safetensors", tmp_path / "changed.safetensors"
    fuzz.write(kind, path)
    load = fuzz.through_core()[kind]
    original = load(path)
    for name in NAMES:
        seal = rng.choice(fuzz.SEALS)
        changed.write_bytes(mutant(fuzz.File.of(path), name, seal, rng))
        outcome, said = fuzz.outcome(load, changed, original)
        assert not fuzz.faults(seal, name, outcome), (name, seal, outcome, said)
