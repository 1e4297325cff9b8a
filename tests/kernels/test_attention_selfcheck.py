"""A kernel that is wrong on purpose: *merge* is not taken, the log says so once, and the result is right."""

from __future__ import annotations

import logging

import pytest
import torch
from semantic_diffusion_adapter.kernels.attention import Regions, Source, choose, masked_attention, merge, selfcheck
from semantic_diffusion_adapter.kernels.hierarchy import hierarchy
from semantic_diffusion_adapter.kernels.visibility import region_bias
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

BIAS = region_bias(hierarchy("tree64").boxes(), torch.zeros(64), (5, 6), text=66)
REGIONS = Regions(BIAS)
SOFT = Regions(region_bias(hierarchy("tree64").boxes(), torch.linspace(-1, 1, 64), (5, 6), text=66))
CPU = merge.Kernels("cpu", "cpu")


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(selfcheck, "_verdicts", {})


def qkv(gradients=False, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 2, 96, 16, generator=generator).to(dtype).requires_grad_(gradients) for _ in range(3)]


def forgets_to_say_how_much_it_saw(monkeypatch):
    """As the CPU's kernel does for a query that sees nothing: a log-sum-exp of 0."""
    attend = merge._attend
    monkeypatch.setattr(merge, "_attend", lambda *inputs: (lambda out, lse, *more: (out, lse * 0, *more))(*attend(*inputs)))


def ignores_the_joined_softmax_backward(monkeypatch):
    """As plain autograd through the two parts does: right forward, wrong backward."""
    backward = merge._backward
    monkeypatch.setattr(merge, "_backward", lambda *inputs: backward(*inputs[:7], inputs[8][0], inputs[8]))


def is_not_in_this_build(monkeypatch):
    def attend(*inputs):
        raise NotImplementedError("Could not run 'aten::_flash_attention'\nwith arguments from the 'Toaster' backend")

    monkeypatch.setattr(merge, "_attend", attend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("width", [8, 64, 128])
def test_the_kernels_of_this_machine_agree(dtype, gradients, width, caplog):
    assert selfcheck.agrees(CPU, torch.empty(1, 1, 1, width, dtype=dtype), gradients)
    assert not caplog.records


@pytest.mark.parametrize("fault", [forgets_to_say_how_much_it_saw, is_not_in_this_build])
@pytest.mark.parametrize("regions, route", [(REGIONS, "partition"), (SOFT, "dense")])
def test_a_wrong_kernel_is_not_taken_and_named_once(fault, regions, route, monkeypatch, caplog):
    fault(monkeypatch)
    inputs = qkv()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert choose(*inputs, regions) == route
            torch.testing.assert_close(masked_attention(*inputs, regions), masked_attention(*inputs, regions, "dense"))
    assert len(caplog.records) == 1
    said = caplog.records[0].getMessage()
    assert "cpu+cpu on cpu in float32" in said and "\n" not in said
    assert "Could not run" in said if fault is is_not_in_this_build else "output differs" in said


def test_a_wrong_backward_counts_where_there_are_gradients(monkeypatch, caplog):
    ignores_the_joined_softmax_backward(monkeypatch)
    trained = qkv(gradients=True)
    with torch.no_grad():
        assert choose(*trained, REGIONS) == "merge"
    assert choose(*trained, REGIONS) == choose(*trained, REGIONS) == "partition"
    assert [record.getMessage().count("dq differs") for record in caplog.records] == [1]


def test_the_check_is_one_for_each_kernel_and_dtype(monkeypatch):
    compared = []
    monkeypatch.setattr(selfcheck, "_compare", lambda *key: compared.append(key))
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        choose(*qkv(dtype=dtype), REGIONS)
        choose(*qkv(dtype=dtype), SOFT)
    assert [key[2] for key in compared] == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("around", [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_the_caller_s_modes_do_not_reach_it(around, monkeypatch):
    """It compares in float32 under autocast, and inference mode takes nothing from later gradients."""
    seen = []
    compare = selfcheck._compare

    def spy(*key):
        seen.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")))
        return compare(*key)

    monkeypatch.setattr(selfcheck, "_compare", spy)
    with around():
        masked_attention(*qkv(), Regions(BIAS))
    assert seen == [(True, False, False)], "once, and as in a thread that has just begun"
    inputs = qkv(gradients=True)
    masked_attention(*inputs, Regions(BIAS)).sum().backward()
    assert all(tensor.grad.any() for tensor in inputs[1:]) and set(selfcheck._verdicts.values()) == {True}


def test_the_first_use_may_be_under_gradient_checkpointing():
    """Whose hooks on saved tensors would otherwise take the check's own for the block's."""
    state = torch.random.get_rng_state()
    inputs = qkv(gradients=True)
    checkpoint(masked_attention, *inputs, REGIONS, use_reentrant=False).square().sum().backward()
    got = [tensor.grad for tensor in inputs]
    expected = qkv(gradients=True)
    masked_attention(*expected, REGIONS, "dense").square().sum().backward()
    for one, other in zip(got, expected):
        torch.testing.assert_close(one, other.grad)
    assert torch.equal(torch.random.get_rng_state(), state), "nobody's noise may change"


def test_a_source_read_wrongly_is_noticed(monkeypatch, caplog):
    right = Source.shift
    monkeypatch.setattr(Source, "shift", lambda self, dtype: right(self, dtype) + (dtype != torch.float64))
    assert choose(*qkv(), REGIONS) != "merge"
    assert "output differs" in caplog.text


def test_tensors_without_values_are_not_compared():
    with FakeTensorMode():
        assert selfcheck.agrees(merge.Kernels("flash", "efficient"), torch.empty(1, 1, 1, 64, device="cuda"), True)
    assert not selfcheck._verdicts
