"""The third part of the attention, a source read by gates, against a dense softmax in float64, forward and backward."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from semantic_diffusion_adapter.kernels.attention import Regions, Source, masked_attention

ROUTES = ["merge", "partition", "dense"]


def oracle(q, k, v, source_k, source_v, bias, gate, instead=None):
    gate = gate.double() if gate.dim() == 2 else gate.double()[None]
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if bias is not None:
        bias = bias.double() if bias.dim() == 3 else bias.double()[None]
        scores = torch.cat([scores[..., : bias.shape[-1]] + bias[:, None], scores[..., bias.shape[-1] :]], dim=-1)
    if instead is not None:
        towards = torch.zeros_like(scores)
        towards[..., instead[0] : instead[1]] = (1 - gate).clamp(min=0).log()[:, None, :, None]
        scores = scores + towards
    read = q @ source_k.transpose(-1, -2) / q.shape[-1] ** 0.5 + gate.log()[:, None, :, None]
    return torch.softmax(torch.cat([scores, read], dim=-1), dim=-1) @ torch.cat([v, source_v], dim=2)


def results(inputs, grad, attend):
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    out = attend(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(out.dtype), allow_unused=True)]


@st.composite
def cases(draw, hard):
    """bias or None, gate, which keys the source stands in for or None, and q, k, v, source keys, source values and the
    output's gradient in float64."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    length, tokens, keys = draw(st.integers(8, 40)), draw(st.integers(0, 7)), draw(st.integers(1, 50))
    bias = None
    if tokens:
        bias = torch.zeros(draw(st.sampled_from([(length, tokens), (2, length, tokens)])))
        bias += 0 if hard else 2 * torch.randn(bias.shape, generator=generator)
        bias[torch.rand(bias.shape, generator=generator) < 0.4] = -torch.inf
    gate = 2 * torch.rand(draw(st.sampled_from([(length,), (2, length)])), generator=generator)
    gate = (gate > 1).float() if hard else gate.masked_fill(gate < 0.5, 0)
    sizes = [length, length, length, keys, keys, length]
    instead = None
    if draw(st.booleans()):
        first = draw(st.integers(tokens, length - 1))
        instead = first, draw(st.integers(first + 1, length))
    return bias, gate, instead, [torch.randn(2, 2, n, 16, generator=generator, dtype=torch.float64) for n in sizes]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("route", ROUTES)
def test_a_source_equals_the_oracle(route, dtype):
    @given(cases(hard=route == "partition"))
    @settings(max_examples=15, deadline=None)
    def run(case):
        bias, gate, instead, tensors = case
        *inputs, grad = [tensor.to(dtype) for tensor in tensors]
        regions = None if bias is None else Regions(bias)
        attend = lambda q, k, v, *read: masked_attention(q, k, v, regions, route, source=Source(*read, gate, instead))  # noqa: E731
        expected = results([t.double() for t in inputs], grad.double(), lambda *x: oracle(*x, bias, gate, instead))
        for got, wanted in zip(results(inputs, grad, attend), expected):
            got = torch.zeros_like(wanted) if got is None else got.double()
            limit = torch.finfo(dtype).eps * (16 if dtype == torch.bfloat16 else 128)
            bound = limit * max(1.0, wanted.abs().max().item()) * 4
            torch.testing.assert_close(got, wanted, rtol=0, atol=bound)

    run()


@pytest.mark.parametrize("regions", [True, False])
@pytest.mark.parametrize("route", ROUTES)
def test_gate_0_reads_exactly_nothing(route, regions):
    """All 0: bit for bit the attention without a source. Some 0: those queries do not depend on the source, bit for bit,
    and give it exactly no gradient."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, read, values = (torch.randn(1, 2, 40, 16, generator=generator) for _ in range(5))
    bias = torch.zeros(40, 8).masked_fill(torch.rand(40, 8, generator=generator) < 0.5, -torch.inf)
    prepared = Regions(bias) if regions else None
    without = masked_attention(q, k, v, prepared, route)
    shut = masked_attention(q, k, v, prepared, route, source=Source(read, values, torch.zeros(40)))
    assert torch.equal(shut, without)
    gate = torch.ones(40)
    gate[::3] = 0
    one = masked_attention(q, k, v, prepared, route, source=Source(read, values, gate))
    other = masked_attention(q, k, v, prepared, route, source=Source(read * 3, values - 1, gate))
    assert torch.equal(one[:, :, ::3], other[:, :, ::3]) and not torch.equal(one, other)
    if route == "merge":
        assert torch.equal(one[:, :, ::3], without[:, :, ::3])
    grad = torch.zeros_like(q)
    grad[:, :, ::3] = 1
    attend = lambda q, k, v, *r: masked_attention(q, k, v, prepared, route, source=Source(*r, gate))  # noqa: E731
    *_, keys, weights = results([q, k, v, read, values], grad, attend)
    assert not keys.any() and not weights.any()


@pytest.mark.parametrize("gate", [-0.1, 2.1, float("nan")])
def test_a_gate_outside_its_range_is_refused(gate):
    with pytest.raises(ValueError, match="gate lies between"):
        Source(torch.zeros(1, 1, 3, 8), torch.zeros(1, 1, 3, 8), torch.full((4,), gate))


@pytest.mark.parametrize("route", ROUTES)
def test_a_source_that_says_the_same_changes_nothing(route):
    """It stands instead of the keys that it repeats, at whatever gate up to 1."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 40, 16, generator=generator) for _ in range(3))
    bias = torch.zeros(40, 8).masked_fill(torch.rand(40, 8, generator=generator) < 0.5, -torch.inf)
    gate = torch.rand(40, generator=generator)
    if route == "partition":
        gate = gate.round()
    for regions in (None, Regions(bias)):
        read = masked_attention(q, k, v, regions, route, source=Source(k[:, :, 12:], v[:, :, 12:], gate, (12, 40)))
        torch.testing.assert_close(read, masked_attention(q, k, v, regions, route), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="stands instead of keys"):
        masked_attention(q, k, v, Regions(bias), route, source=Source(k, v, gate, (4, 40)))
