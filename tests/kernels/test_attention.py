"""Every route against a dense softmax written out in float64, forward and backward."""

from __future__ import annotations

import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from semantic_diffusion_adapter.kernels.attention import ROUTES, Regions, masked_attention, merge
from semantic_diffusion_adapter.kernels.hierarchy import hierarchy
from semantic_diffusion_adapter.kernels.visibility import region_bias
from torch.utils.checkpoint import checkpoint

INF = float("inf")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def oracle(q, k, v, bias):
    q, k, v, bias = q.double(), k.double(), v.double(), bias.double()
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    tokens = bias.shape[-1]
    bias = bias.unsqueeze(-3) if bias.dim() == 3 else bias
    scores = torch.cat([scores[..., :tokens] + bias, scores[..., tokens:]], dim=-1)
    return torch.softmax(scores, dim=-1) @ v


def joint(bias, dtype=torch.float64, batch=2, heads=2, width=16, seed=0, device="cpu"):
    """q, k, v and a gradient for the result, random, of the dtype."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, bias.shape[-2], width)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for _ in range(4)]


def assert_close(got, expected, dtype, factor=1):
    """Within a few roundings of the dtype: 8 where a number has only 8 to 11 bits, 64 where sums decide."""
    assert got.dtype == dtype and got.shape == expected.shape
    rounding = torch.finfo(dtype).eps * (8 if dtype.itemsize == 2 else 64)
    torch.testing.assert_close(
        got.double(), expected.double(), rtol=0, atol=factor * rounding * max(1.0, expected.abs().max().item())
    )


def gradients(q, k, v, grad, attend):
    inputs = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
    out = attend(*inputs)
    return out.detach(), torch.autograd.grad(out, inputs, grad.to(out.dtype))


def check(bias, route, dtype, tolerant=False, cached=0, **sizes):
    """cached: how many keys there are beyond those of the queries."""
    q, k, v, grad = joint(bias, dtype, **sizes)
    if cached:
        k, v = (torch.cat([tensor, tensor[:, :, :cached] * 2], dim=2) for tensor in (k, v))
    regions = Regions(bias)
    expected, expected_grads = gradients(q, k, v, grad, lambda *x: oracle(*x, bias))
    # A logit of size n is rounded to n eps, and so is the weight made of it.
    size = 1 + bias.abs().masked_fill(bias.abs() > 2e3, 0).amax().item() / 16 if tolerant else 1
    assert_close(masked_attention(q, k, v, regions, route), expected, dtype, size)
    if route != "flex":  # flex has no backward on a CPU
        out, grads = gradients(q, k, v, grad, lambda *x: masked_attention(*x, regions, route))
        assert_close(out, expected, dtype, size)
        # partition adds a key's gradient up over its groups in the dtype itself.
        for got, wanted in zip(grads, expected_grads):
            assert_close(got, wanted, dtype, factor=size * (4 if route == "partition" else 2))


@st.composite
def biases(draw, hard):
    """A bias [S, T] or [2, S, T] of a random hierarchy on a random grid, at times with queries that see no token."""
    levels = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
    made = hierarchy(draw(st.lists(levels, min_size=1, max_size=3, unique_by=lambda x: x[:2])))
    tokens = made.token_count
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    strengths = torch.zeros(draw(st.sampled_from([(tokens,), (2, tokens)])))
    if not hard:
        kind = draw(st.sampled_from(["one", "each", "large", "tiny"]))
        noise = torch.randn(strengths.shape, generator=generator)
        strengths = {"one": strengths - 2.3, "each": 3 * noise, "large": 400 * noise, "tiny": -3e4 + noise}[kind]
    if draw(st.booleans()):
        strengths[torch.rand(strengths.shape, generator=generator) < 0.3] = -INF
    bias = region_bias(
        made.boxes(),
        strengths,
        draw(st.tuples(st.integers(1, 9), st.integers(1, 9))),
        text=tokens + draw(st.integers(0, 5)),
        references=draw(st.integers(0, 4)),
        mixing=draw(st.sampled_from(["all", "overlap"])),
    )
    if draw(st.booleans()):
        bias[..., torch.rand(bias.shape[-2], generator=generator) < 0.2, :] = -INF
    return bias


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("route", ROUTES)
def test_hard_visibility_equals_the_oracle(route, dtype):
    @given(biases(hard=True))
    @settings(max_examples=15, deadline=None)
    def run(bias):
        check(bias, route, dtype)

    run()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("route", ["merge", "flex", "dense"])
def test_strengths_equal_the_oracle(route, dtype):
    @given(biases(hard=False))
    @settings(max_examples=15, deadline=None)
    def run(bias):
        check(bias, route, dtype, tolerant=True)

    run()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("strength", [-4e4, -2.345, 5.4321])
def test_one_strength_for_all_tokens_is_exact_in_half_precision(dtype, strength):
    made = hierarchy("quad64")
    check(region_bias(made.boxes(), torch.full((64,), strength), (5, 7), 70), "merge", dtype)


def test_merge_is_exact_where_the_first_block_of_keys_is_hidden():
    """Kernels walk over the keys in blocks; one that is hidden as a whole is where -inf becomes NaN."""
    bias = torch.zeros(1700, 1600)
    bias[:50, :1500] = -INF
    bias[50:60] = -INF
    for route in ("merge", "dense", "partition"):
        check(bias, route, torch.float32, batch=1, heads=1)


@pytest.mark.parametrize("route", ROUTES)
def test_keys_without_queries_are_seen_by_all(route):
    """Keys that the host kept from an earlier step."""
    bias = region_bias(hierarchy("tree64").boxes(), torch.zeros(64), (5, 5), text=70)
    check(bias, route, torch.float32, cached=13)


@pytest.mark.parametrize("route", ROUTES)
def test_strength_of_minus_infinity_is_deletion(route):
    made = hierarchy("tree64")
    gone = (made.level_ids() == 1) & (made.cells() == 2)
    strengths = torch.zeros(64).masked_fill(gone, -INF)
    bias = region_bias(made.boxes(), strengths, (5, 5), text=70)
    q, k, v, _ = joint(bias, torch.float32)
    kept = torch.cat([~gone, torch.ones(bias.shape[0] - 64, dtype=torch.bool)])
    without = region_bias(made.boxes()[~gone], strengths[~gone], (5, 5), text=70 - int(gone.sum()))
    out = masked_attention(q, k, v, Regions(bias), route)[:, :, kept]
    smaller = masked_attention(q[:, :, kept], k[:, :, kept], v[:, :, kept], Regions(without), route)
    assert_close(out, smaller, torch.float32)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_merge_with_gradients_for_some_inputs_only(wanted):
    bias = region_bias(hierarchy("tree64").boxes(), torch.zeros(64), (5, 5), text=64)
    *inputs, grad = joint(bias)
    for index in wanted:
        inputs[index].requires_grad_()
    leaves = [inputs[index] for index in wanted]
    got = torch.autograd.grad(masked_attention(*inputs, Regions(bias), "merge"), leaves, grad)
    expected = torch.autograd.grad(oracle(*inputs, bias), leaves, grad)
    for one, other in zip(got, expected):
        assert_close(one, other, torch.float64)


def test_gradient_checkpointing_keeps_nothing_of_the_merge(monkeypatch):
    made = []
    attend = merge._attend

    def spy(*inputs):
        result = attend(*inputs)
        made.append(weakref.ref(result[1]))
        return result

    monkeypatch.setattr(merge, "_attend", spy)
    bias = region_bias(hierarchy("tree64").boxes(), torch.zeros(64), (5, 5), text=64)
    q, k, v, _ = joint(bias, torch.float32)
    out = checkpoint(masked_attention, q.requires_grad_(), k, v, Regions(bias), "merge", use_reentrant=False)
    assert len(made) == 2 and all(ref() is None for ref in made)
    out.sum().backward()
    assert q.grad.any()


def test_merge_under_gradient_checkpointing_and_autocast():
    bias = region_bias(hierarchy("tree64").boxes(), torch.zeros(64), (5, 5), text=64)
    q, k, v, grad = joint(bias, torch.bfloat16)
    regions = Regions(bias)
    expected, expected_grads = gradients(q, k, v, grad, lambda *x: oracle(*x, bias))

    def attend(q, k, v):
        with torch.autocast("cpu", torch.bfloat16):
            return checkpoint(masked_attention, q, k, v, regions, use_reentrant=False)

    out, grads = gradients(q.float(), k.float(), v, grad, attend)
    assert_close(out, expected, torch.bfloat16)
    for got, wanted in zip(grads, expected_grads):
        assert_close(got.bfloat16(), wanted, torch.bfloat16, factor=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("route", ["merge", "partition", "dense"])
def test_a_token_gets_exactly_no_gradient_from_patches_outside_its_box(route, dtype):
    """Also where patches of an odd grid see two cells."""
    bias = region_bias(hierarchy("tree64").boxes(), torch.zeros(64), (7, 9), text=64)
    q, k, v, grad = joint(bias, dtype)
    for token in (17, 40, 63):
        outside = torch.isinf(bias[:, token])
        assert 0 < outside.sum() < 63 and not outside[:64].any()
        _, (_, keys, values) = gradients(q, k, v, grad * outside[:, None], lambda *x: masked_attention(*x, Regions(bias), route))
        assert (keys[:, :, token] == 0).all() and (values[:, :, token] == 0).all()
        assert keys[:, :, 0].any() and values[:, :, 0].any(), "the whole image's tokens are seen from everywhere"


def test_a_compiled_model_stays_one_graph():
    bias = region_bias(hierarchy("tree64").boxes(), torch.zeros(64), (5, 5), text=64)
    q, k, v, grad = joint(bias, torch.float32)
    regions = Regions(bias)
    compiled = torch.compile(lambda *x: masked_attention(*x, regions), fullgraph=True, backend="aot_eager")
    out, grads = gradients(q, k, v, grad, compiled)
    expected, expected_grads = gradients(q, k, v, grad, lambda *x: oracle(*x, bias))
    assert_close(out, expected, torch.float32)
    for got, wanted in zip(grads, expected_grads):
        assert_close(got, wanted, torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnCuda:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("route", [*ROUTES, "auto"])
    @pytest.mark.parametrize("strength", [0.0, 1.5])
    def test_routes(self, route, dtype, strength):
        if route == "partition" and strength:
            pytest.skip("partition knows no strengths")
        made = hierarchy("tree112")
        bias = region_bias(made.boxes(), torch.full((112,), strength), (17, 23), text=130, references=9).cuda()
        bias[130:140] = -INF
        self.check(bias, route, dtype)

    @pytest.mark.parametrize("backend", ["FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"])
    def test_merge_with_each_kernel_for_the_unmasked_part(self, backend):
        bias = region_bias(hierarchy("tree64").boxes(), torch.zeros(64), (17, 23), text=70).cuda()
        probe = joint(bias, torch.bfloat16, width=128, device="cuda")[:3]
        with torch.nn.attention.sdpa_kernel(getattr(torch.nn.attention.SDPBackend, backend)):
            if torch._fused_sdp_choice(*probe) == torch.nn.attention.SDPBackend.MATH.value:
                pytest.skip(f"this device has no {backend}")
            self.check(bias, "merge", torch.bfloat16)

    def check(self, bias, route, dtype):
        q, k, v, grad = joint(bias, dtype, width=128, device="cuda")
        regions = Regions(bias)
        expected, expected_grads = gradients(q, k, v, grad, lambda *x: oracle(*x, bias))
        out, grads = gradients(q, k, v, grad, lambda *x: masked_attention(*x, regions, route))
        factor = 64 if dtype == torch.float32 else 1  # a GPU may multiply float32 in TF32
        assert_close(out, expected, dtype, factor)
        for got, wanted in zip(grads, expected_grads):
            assert_close(got, wanted, dtype, 4 * factor)
