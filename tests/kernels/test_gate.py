from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from semantic_diffusion_adapter.kernels.gate import gate, sequence_gate


@given(st.floats(0, 2, width=32, allow_subnormal=False), st.floats(0, 0.9), st.floats(0.01, 1))
def test_the_gate_falls_with_the_change_between_its_exact_ends(strength, lo, width):
    hi = min(1.0, lo + width)
    gates = gate(torch.linspace(0, 1, 101).view(1, 1, -1), strength, lo, hi)[0, 0]
    assert (gates.diff() <= 1e-6).all()
    assert gates[0] == torch.tensor(strength) and gates[-1] == 0 and (gates <= 2).all()


def test_halfway_is_half():
    assert gate(torch.full((1, 1, 1), 0.5), 1.5, 0.25, 0.75).item() == 0.75


def test_the_sequence_is_text_patches_references():
    made = sequence_gate(torch.arange(4.0).view(1, 2, 2) / 2, 3, 0.25, 2)
    assert made.tolist() == [[0.25] * 3 + [0, 0.5, 1, 1.5] + [0, 0]]


@pytest.mark.parametrize("strength, lo, hi", [(2.1, 0, 1), (-1, 0, 1), (1, 0.5, 0.5), (1, 0.2, 1.2), (float("nan"), 0, 1)])
def test_what_is_out_of_range_is_refused(strength, lo, hi):
    with pytest.raises(ValueError, match="lies between|opens from"):
        gate(torch.zeros(1, 1, 1), strength, lo, hi)
    with pytest.raises(ValueError, match="gate of the text"):
        sequence_gate(torch.zeros(1, 1, 1), 1, 3.0)
