"""Training the edit decoder: from (source embedding, instruction) to the adapter's embedding of the true edited image.

Every step trains all modes that the decoder has. With clean teacher forcing a decoder drifts when it later reads its
own output. So the history of the autoregressive mode is the target with noise, and part of it is replaced by the
source's tokens.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...kernels.edit_decoder import EditDecoder, read_edit_decoder
from ..engine.stage import Step


@dataclass(frozen=True)
class EditorTraining:
    noise: float = 0.3
    """Standard deviation of the noise on the history, in units of the space's own deviations."""
    replaced: float = 0.2
    """Share of the history replaced by source tokens."""
    changed: float = 4.0
    """Weight of a fully changed token above that of an unchanged one."""


def load_editor(path: Path, device: torch.device) -> tuple[EditDecoder, dict]:
    """A frozen edit decoder of either architecture in float32, and its record."""
    editor, record = read_edit_decoder(path)
    return editor.to(device).eval().requires_grad_(False), record


def corrupt(target: Tensor, source: Tensor, std: Tensor, settings: EditorTraining, step: Step) -> Tensor:
    """A history [B, T, D] as the decoder itself might have written it."""
    noise = step.randn(*target.shape[1:]) * std * settings.noise
    swap = step.rand(target.shape[1]) < settings.replaced
    return torch.where(swap[..., None], source, target) + noise


def editor_loss(decoder: EditDecoder, source: Tensor, target: Tensor, boxes: Tensor, levels: Tensor,
                instruction: Tensor,
                settings: EditorTraining, step: Step, flow: Callable[[Tensor], Tensor] | None = None,
                flow_weight: float = 0.0
                ) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean squared error on normalised tokens, summed over the decoder's modes; tokens that change weigh more.

    source, target [B, T, D]; boxes [T, 4], levels [T]; instruction [B, L, text_dim]. flow: a further loss on the tokens
    that are written in one pass, weighted by flow_weight. The parts are the error of each mode, `copy` (the error of
    the unedited source) and `flow`.
    """
    truth, before = decoder.normalise(target), decoder.normalise(source)
    change = (truth - before).square().mean(-1)
    weight = 1 + settings.changed * (change / change.amax(1, keepdim=True).clamp(min=1e-6))
    weight = weight / weight.mean(1, keepdim=True)

    def error(predicted: Tensor) -> Tensor:
        return ((decoder.normalise(predicted) - truth).square().mean(-1) * weight).mean()

    written = decoder(source, boxes, levels, instruction)
    parts = {"parallel": error(written)}
    if "autoregressive" in decoder.modes:
        history = corrupt(target, source, decoder.token_std, settings, step)
        parts["autoregressive"] = error(decoder(source, boxes, levels, instruction, history))
    total, parts["copy"] = sum(parts.values()), (change * weight).mean()
    if flow is not None:
        parts["flow"] = flow(written)
        total = total + flow_weight * parts["flow"]
    return total, parts
