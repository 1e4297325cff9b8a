"""Which route is taken, what is refused, and that nothing masked is the host's own function bit for bit."""

from __future__ import annotations

import pytest
import torch
from semantic_diffusion_adapter.kernels.attention import Regions, choose, masked_attention, merge
from semantic_diffusion_adapter.kernels.hierarchy import hierarchy
from semantic_diffusion_adapter.kernels.visibility import region_bias
from torch._subclasses.fake_tensor import FakeTensorMode

INF = float("inf")
TREE = hierarchy("tree64")


def regions(strength=0.0, grid=(5, 6)):
    return Regions(region_bias(TREE.boxes(), torch.full((64,), strength), grid, text=66))


def qkv(dtype=torch.float32, length=96, **kwargs):
    return [torch.randn(2, 2, length, 16, dtype=torch.float64).to(dtype).requires_grad_(**kwargs) for _ in range(3)]


def test_routes_on_a_cpu():
    inputs, trained = qkv(requires_grad=False), qkv(requires_grad=True)
    assert choose(*inputs, regions()) == "merge"
    assert choose(*trained, regions()) == "merge"
    assert choose(*inputs, regions(-1.0)) == "merge"
    assert choose(*qkv(torch.float64), regions()) == "dense"
    assert choose(*inputs, regions(), keep_plain=True) == "partition"
    assert choose(*inputs, regions(-INF), keep_plain=True) == "partition"
    assert choose(*inputs, regions(-1.0), keep_plain=True) == "merge"
    assert choose(*trained, regions(), keep_plain=True) == "merge"
    with torch.no_grad():
        assert choose(*trained, regions(), keep_plain=True) == "partition"


def test_too_many_groups_are_not_partitioned():
    corners = torch.rand(40, 2) * 0.7
    boxes = torch.cat([corners, corners + 0.3], dim=1)
    made = Regions(region_bias(boxes, torch.zeros(40), (16, 16), text=40))
    assert sum(map(len, made.groups())) > 64
    assert choose(*qkv(length=296, requires_grad=False), made, keep_plain=True) == "merge"


def test_devices_without_a_fitting_kernel():
    inputs = [torch.empty(2, 2, 96, 16, device="meta") for _ in range(3)]
    assert choose(*inputs, regions()) == "partition"
    assert choose(*inputs, regions(-1.0)) == "dense"
    with pytest.raises(ValueError, match="partition or dense"):
        merge.merge_attention(*inputs, regions())


def test_nothing_masked_is_the_host_s_function_itself():
    inputs = qkv(requires_grad=False)
    made = Regions(torch.zeros(96, 64))
    assert choose(*inputs, made) == "plain"
    answer = torch.randn(2, 2, 96, 16)
    for route in ("auto", "merge", "partition", "flex", "dense"):
        assert masked_attention(*inputs, made, route, plain=lambda q, k, v: answer) is answer
    plain = torch.nn.functional.scaled_dot_product_attention(*inputs)
    assert torch.equal(masked_attention(*inputs, made), plain)
    assert torch.equal(masked_attention(*inputs, Regions(torch.zeros(96, 0))), plain)


def test_partition_asks_only_the_host_s_function_and_only_for_what_is_seen():
    seen = []

    def plain(q, k, v):
        seen.append((q.shape[2], k.shape[2]))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    made = Regions(region_bias(TREE.boxes(), torch.zeros(64), (4, 8), text=64))
    inputs = qkv(requires_grad=False)
    out = masked_attention(*inputs, made, keep_plain=True, plain=plain)
    assert sorted(seen) == [(2, 16 + 4 + 2 + 32)] * 16 + [(64, 64 + 32)]
    torch.testing.assert_close(out, masked_attention(*inputs, made, "dense"))


@pytest.mark.parametrize("kernel", ["flash", "efficient", "cudnn"])
def test_cuda_kernels_take_the_arguments_of_the_merge(kernel):
    """Shapes and signatures only, on tensors without values: holds where no GPU is at hand."""
    with FakeTensorMode():
        q = torch.empty(2, 24, 1037, 128, dtype=torch.bfloat16, device="cuda")
        part = torch.empty(2, 24, 1037, 112, dtype=torch.bfloat16, device="cuda")
        shift = torch.empty(1, 1, 1037, device="cuda")
        source = torch.empty(2, 24, 901, 128, dtype=torch.bfloat16, device="cuda")
        chosen = merge.Kernels(kernel, "efficient")
        parts = merge._parts(q, q, q, source, source, part, shift, shift, shift, (136, 1037), chosen)
        out, joined, results = merge._forward(parts, q)
        assert out.shape == q.shape and joined.shape == q.shape[:3]
        for (name, keys, _, bias, _), result in zip(parts, results):
            lse = merge._lse(result, q)
            assert lse.shape == q.shape[:3]
            grads = merge._backward(name, out, q, keys, keys, bias, out, lse, result[1:])
            assert [grad.shape for grad in grads] == [q.shape, keys.shape, keys.shape]


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: masked_attention(*qkv(), regions(), "fast"), "'fast'"),
        (lambda: masked_attention(*qkv(length=95), regions()), "prepare the regions for this latent"),
        (lambda: masked_attention(*qkv()[:2], qkv(length=95)[0], regions()), "k, v .B, H, L, d. with L above 64"),
        (lambda: masked_attention(qkv()[0], *qkv(length=64)[:2], regions()), "L above 64"),
        (lambda: masked_attention(*qkv(), regions(-1.0), "partition"), "knows no strengths"),
        (lambda: Regions(torch.zeros(5)), r"\[S, T\]"),
        (lambda: Regions(torch.zeros(5, 5)), "sequence longer"),
        (lambda: Regions(torch.full((5, 2), float("nan"))), "NaN"),
        (lambda: Regions(torch.zeros(5, 2, requires_grad=True)), "detach"),
    ],
)
def test_wrong_arguments_are_refused_in_one_sentence(call, words):
    with pytest.raises(ValueError, match=words):
        call()
