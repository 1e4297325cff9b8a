"""Gradients through core's own Flux against finite differences of its unchanged forward."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("comfy.sd", reason="no ComfyUI here: set COMFYUI_PATH, or `python3 run.py test` makes one")

import comfy.model_management  # noqa: E402
import comfy.ops  # noqa: E402
from comfy.patcher_extension import WrappersMP  # noqa: E402
from semantic_diffusion_adapter.nodes.host import gradients  # noqa: E402
from semantic_diffusion_adapter.nodes.host.override import OVERRIDE_KEY  # noqa: E402
from semantic_diffusion_adapter.nodes.host.watch import CORE_COMPILES  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

both_ways = pytest.mark.parametrize("recompute", [True, False], ids=["recomputed", "kept"])


class Case:
    """A loss of a network in its tokens."""

    def __init__(self, network, dtype: torch.dtype = torch.float64):
        generator = torch.Generator().manual_seed(1)
        shapes = ((1, 8, 6, 8), (1, 12, 24), (1, 24), (1, 8, 6, 8))
        self.x, self.tokens, self.y, self.target = (torch.randn(s, generator=generator).to(dtype) for s in shapes)
        self.network = network.to(dtype).requires_grad_(False) if dtype == torch.float64 else network
        self.t = torch.tensor([0.6], dtype=dtype)

    def loss(self, tokens, options):
        found = self.network(self.x, self.t, tokens, self.y, None, transformer_options=dict(options))
        return (found - self.target).square().mean()

    def gradient(self, loss):
        tokens = self.tokens.clone().requires_grad_()
        return torch.autograd.grad(loss(tokens), tokens)[0]

    def ours(self, recompute: bool, **options):
        with gradients.differentiable():
            inner = gradients.differentiable_options({"transformer_options": options}, self.network, recompute)["transformer_options"]
            return self.gradient(lambda tokens: self.loss(tokens, inner))

    def differs(self, gradient, step: float = 1e-3, **options) -> float:
        """By what share a gradient is off, along itself and along three random directions."""
        generator, scale, worst = torch.Generator().manual_seed(2), gradient.norm(), 0.0
        others = [torch.randn(gradient.shape, generator=generator, dtype=gradient.dtype) for _ in range(3)]
        for direction in (gradient, *others):
            direction = direction / direction.norm()
            # Core's rotary embeddings of newer cores take float64 only where it trains.
            with gradients.differentiable(), torch.no_grad():
                up, down = (self.loss(self.tokens + sign * step * direction, options) for sign in (1, -1))
            worst = max(worst, abs((gradient * direction).sum() - (up - down) / (2 * step)) / scale)
        return float(worst)


@both_ways
def test_gradients_are_finite_differences(toy, recompute):
    case = Case(toy.network)
    assert case.differs(case.ours(recompute)) < 1e-4


def test_the_known_wrong_way_is_wrong(toy):
    """Why all this is needed: core's forward under a checkpoint of the whole model runs without a word."""
    case = Case(toy.network)
    wrong = whole_model_checkpoint(case)
    assert case.differs(wrong) > 0.1


def whole_model_checkpoint(case):
    core = comfy.model_management
    told = getattr(core, "in_training", None)
    try:
        if told is not None:
            core.in_training = True
        return case.gradient(lambda tokens: checkpoint(case.loss, tokens, {}, use_reentrant=False))
    finally:
        if told is not None:
            core.in_training = told


@both_ways
def test_through_weights_that_were_loaded_in_inference_mode(toy, recompute):
    expected = Case(toy.make()).ours(recompute).float()
    with torch.inference_mode():
        network = toy.make()
        for module in network.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = torch.nn.Parameter(parameter.clone(), requires_grad=False)
    assert next(network.parameters()).is_inference()
    case = Case(network, torch.float32)
    assert torch.allclose(case.ours(recompute), expected, rtol=1e-4, atol=1e-5 * expected.abs().max())


@pytest.mark.skipif(not hasattr(torch, "float8_e4m3fn"), reason="this PyTorch has no fp8")
@both_ways
def test_through_fp8_weights_that_core_casts(toy, recompute):
    network = toy.make()
    for module in network.modules():
        if isinstance(module, comfy.ops.manual_cast.Linear):
            with torch.inference_mode():
                module.weight = torch.nn.Parameter(module.weight.to(torch.float8_e4m3fn), requires_grad=False)
    stored, case = copy.deepcopy(network), Case(network, torch.float32)
    for module in stored.modules():
        if isinstance(module, comfy.ops.manual_cast.Linear):
            module.weight = torch.nn.Parameter(module.weight.double(), requires_grad=False)
    expected = Case(stored).ours(recompute).float()
    assert torch.allclose(case.ours(recompute), expected, rtol=1e-3, atol=1e-4 * expected.abs().max())


@both_ways
def test_another_packs_block_patch_is_called_inside(toy, recompute):
    """With its own block, and the block index that core gave it, also when the block runs again."""
    seen = []

    def patched(args, more):
        seen.append(args["transformer_options"]["block_index"])
        out = more["original_block"](args)
        return {**out, "img": 1.5 * out["img"]}

    options = {"patches_replace": {"dit": {("double_block", 0): patched, ("single_block", 0): patched}}}
    case = Case(toy.network)
    gradient = case.ours(recompute, **options)
    assert set(seen) == {0}
    assert case.differs(gradient, **options) < 1e-4
    assert case.differs(case.ours(recompute), **options) > 0.01


def test_a_lora_in_a_slice_of_a_weight_stays_in_place():
    """What takes part in no gradient is left alone: core adds a LoRA to a third of a fused weight in place."""
    weight = torch.zeros(6, 2)
    with gradients.differentiable():
        part = weight.narrow(0, 2, 2)
        part += torch.ones(2, 2)
    assert weight.sum() == 4


def test_the_users_attention_kernel_gives_way_to_one_with_a_backward(toy):
    def kernel(func, q, k, v, heads, **kwargs):  # as SageAttention: right, and without a gradient
        return func(q.detach(), k.detach(), v.detach(), heads, **kwargs)

    case = Case(toy.network)
    assert torch.equal(case.ours(True, **{OVERRIDE_KEY: kernel}), case.ours(True))


def test_what_is_given_is_not_changed_and_core_is_told_for_the_time(toy):
    options = {"transformer_options": {"patches_replace": {"dit": {}}, "wrappers": {WrappersMP.APPLY_MODEL: {CORE_COMPILES: [len]}}}}
    before = copy.deepcopy(options)
    told = getattr(comfy.model_management, "in_training", None)
    with pytest.raises(RuntimeError, match="stop"), gradients.differentiable():
        made = gradients.differentiable_options(options, toy.network)
        assert getattr(comfy.model_management, "in_training", None) == (told if told is None else True)
        raise RuntimeError("stop")
    assert options == before and getattr(comfy.model_management, "in_training", None) == told
    assert len(made["transformer_options"]["patches_replace"]["dit"]) == 4
    assert CORE_COMPILES not in made["transformer_options"]["wrappers"][WrappersMP.APPLY_MODEL]


def test_a_model_compiled_by_another_pack_is_refused(toy):
    toy.network.double_blocks[0]._orig_mod = None
    with pytest.raises(ValueError, match="from before the node that compiles"):
        gradients.differentiable_options({"transformer_options": {}}, toy.network)
