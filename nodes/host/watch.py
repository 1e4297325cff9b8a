"""Whether the boxes, or a gate, reach every block of Flux, watched while a forward runs.

The attention override reaches a block only through core's `transformer_options`, and some packs replace core's forward
by one that does not pass them on. So hooks on the blocks check that every block that ran asked the override. A block
that did not run (Skip Layer Guidance, a cached step) need not ask. A compiled model is not watched: hooks would be
compiled into it or left out of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import comfy.ldm.flux.layers
import torch
from comfy.patcher_extension import WrappersMP
from torch import nn

from ...kernels.blocks import Blocks

WATCH_KEY = "sda_watch"
CORE_COMPILES = "torch.compile"  # the key of core's own wrapper that swaps compiled modules in
_FORWARDS = ("forward", "_forward", "forward_orig")
_KINDS = (
    ("double", "double_blocks", comfy.ldm.flux.layers.DoubleStreamBlock),
    ("single", "single_blocks", comfy.ldm.flux.layers.SingleStreamBlock),
)


class Missed(NamedTuple):
    """What is missed where the override is not asked, and what to remove to paint without it, as a sentence says them."""

    what: str
    without: str


BOXES = Missed("The boxes do", "Masked Attention to paint without boxes")


class Watch:
    """Whether the attention of the block that runs now has come to the override."""

    def __init__(self, network: nn.Module, transformer_options: dict, masks: Callable[[], bool], missed: Missed = BOXES) -> None:
        self._network, self._options, self._masks, self._missed = network, transformer_options, masks, missed
        self._waiting = False
        self._sizes: tuple[int, int] | None = None

    def record_attention(self, unfit: tuple[int, int] | None) -> None:
        """An attention has come.

        unfit: its (queries, keys) where our tokens cannot be found in it, None where it is masked.
        """
        self._waiting = self._waiting and unfit is not None
        self._sizes = unfit

    def enter(self, *_) -> None:
        self._waiting, self._sizes = True, None

    def leave(self, *_) -> None:
        if self._waiting and not torch.compiler.is_compiling() and self._masks():
            raise ValueError(self._sentence())
        self._waiting = False

    def _sentence(self) -> str:
        names = packs(self._network, self._options)
        if self._sizes is not None:
            return unfit_sentence(*self._sizes, names)
        who = names or "another node (such as TeaCache or PuLID)"
        return (
            f"{self._missed.what} not reach this model's attention, because {who} runs its blocks past ComfyUI's hooks: remove "
            f"that node, or {self._missed.without}."
        )


def unfit_sentence(queries: int, keys: int, names: str) -> str:
    return (
        f"The boxes cannot be placed in this model's attention ({queries} queries, {keys} keys), because another node "
        f"changes its sequence: remove {names or 'that node'}, or Masked Attention to paint without boxes."
    )


@contextmanager
def watched(
    network: nn.Module, blocks: Blocks | None, transformer_options: dict, masks: Callable[[], bool], missed: Missed = BOXES
) -> Iterator[Watch]:
    """Hooks on the chosen blocks of a Flux network for as long as the context lasts.

    masks: whether the layout masks anything at all, or the gate lets anything be read. It is asked before an error is raised.
    """
    watch, handles = Watch(network, transformer_options, masks, missed), []
    try:
        for where, block in _blocks(network):
            if blocks is None or where in blocks:
                handles.append(block.register_forward_pre_hook(watch.enter))
                handles.append(block.register_forward_hook(watch.leave))
        yield watch
    finally:
        for handle in handles:
            handle.remove()


def compiled(network: nn.Module, transformer_options: dict) -> bool:
    """Whether the user compiled the network or blocks of it, in any of the known ways."""
    if CORE_COMPILES in transformer_options.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {}):
        return True
    modules = [network, *network.double_blocks, *network.single_blocks]
    return any(
        hasattr(module, "_orig_mod")
        or module._compiled_call_impl is not None
        or any(hasattr(getattr(module, name, None), "_torchdynamo_orig_callable") for name in _FORWARDS)
        for module in modules
    )


def packs(network: nn.Module, transformer_options: dict) -> str:
    """The custom nodes whose functions run within this network, by the folders they were loaded from; "" if none."""
    modules = [network, *(block for _, block in _blocks(network))]
    running = [*(getattr(module, name, None) for module in modules for name in _FORWARDS), *map(type, modules)]
    for kind in ("post_input", "attn1_patch"):
        for patch in transformer_options.get("patches", {}).get(kind, ()):
            running += [patch, type(patch)]
    places = (getattr(each, "__module__", None) or "" for each in running)
    found = (re.search(r"custom_nodes[/\\.]([^/\\.]+)", place) for place in places)
    # Core writes a dot in a folder's name as _x_.
    return ", ".join(dict.fromkeys(match[1].replace("_x_", ".") for match in found if match))


def _blocks(network: nn.Module) -> Iterator[tuple[tuple[str, int], nn.Module]]:
    """((kind, index), block) of every block, also where a pack has wrapped several of them into one module."""
    for kind, name, block_class in _KINDS:
        blocks: list[nn.Module] = []
        for child in getattr(network, name):
            blocks += [module for module in child.modules() if isinstance(module, block_class)] or [child]
        yield from (((kind, index), block) for index, block in enumerate(blocks))
