"""The hooks that steer one forward of core's Flux, on the projections, norms and modulations of its own modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from ...kernels.steering import Steering


@contextmanager
def hooked(network: nn.Module, steering: Steering | None, shift: Tensor | None, kinds: list[int]) -> Iterator[None]:
    """The hooks, as long as the context lasts.

    steering: None where no attention is steered, and no companion is there. shift [rows, hidden]: added to what modulates
    the text of double blocks, or None. kinds: the batch's `cond_or_uncond` without companions.
    """

    def without_companions(_, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        options = kwargs.get("transformer_options")
        if options and "cond_or_uncond" in options:
            options["cond_or_uncond"] = kinds
        return tuple(map(steering.own, args)), {key: steering.own(value) for key, value in kwargs.items()}

    with ExitStack() as stack:

        def hook(handle) -> None:
            stack.callback(handle.remove)

        for index, block in enumerate(network.double_blocks):
            if shift is not None:
                hook(block.txt_mod.register_forward_pre_hook(lambda _, args: (args[0] + shift.to(args[0]), *args[1:])))
            if steering is not None:
                hook(block.img_attn.norm.register_forward_hook(lambda _, args, out: steering.hear(out[0])))
                hook(block.txt_attn.norm.register_forward_hook(lambda _, args, out: steering.say(out[1])))
                hook(block.img_attn.proj.register_forward_hook(lambda _, args, out, index=index: steering.steer(index, out)))
        if steering is not None:
            for module in (*network.single_blocks, network.final_layer):
                hook(module.register_forward_pre_hook(without_companions, with_kwargs=True))
        yield
