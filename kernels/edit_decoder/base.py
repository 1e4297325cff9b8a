"""What every edit decoder is: a residual on the source tokens, in units of the embedding space's own statistics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import schema
from ..hierarchy import Hierarchy
from .places import TokenPlaces

MODES = ("parallel", "autoregressive")


@dataclass(frozen=True)
class EditDecoderConfig:
    """dim: width of the embedding (4096 for FLUX.1); text_dim: width of the instruction encoding (4096 for its T5);
    hierarchy: the query table of the adapter, ((rows, cols, tokens), ...)."""

    __pydantic_config__ = schema.CLOSED
    architecture: ClassVar[str]

    dim: schema.Width
    text_dim: schema.Width
    hierarchy: schema.Levels

    def __post_init__(self):
        object.__setattr__(self, "hierarchy", tuple(tuple(level) for level in self.hierarchy))
        Hierarchy.from_json(self.hierarchy)

    def to_json(self) -> dict[str, Any]:
        hierarchy = [list(level) for level in self.hierarchy]
        return {"architecture": self.architecture, **asdict(self), "hierarchy": hierarchy}


class EditDecoder(nn.Module):
    """Source embedding and instruction -> edited embedding of the same boxes and levels.

    A subclass has an `out` layer [width -> dim], zero at the start so that an untrained decoder copies the source, says
    in `modes` which of MODES it can write in, and has its transformer blocks in `blocks`.
    """

    modes: tuple[str, ...]
    out: nn.Linear
    blocks: nn.ModuleList

    def __init__(self, config: EditDecoderConfig, width: int):
        """width: of the decoder's own stream."""
        super().__init__()
        self.config = config
        self.places = TokenPlaces(Hierarchy.from_json(config.hierarchy), width)
        self.register_buffer("token_mean", torch.zeros(config.dim))
        self.register_buffer("token_std", torch.ones(config.dim))

    def set_token_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Mean and standard deviation per channel, [dim] each, of the adapter's tokens over real images."""
        if mean.shape != self.token_mean.shape or std.shape != self.token_std.shape or not (std > 0).all():
            raise ValueError(f"Token statistics need [{self.config.dim}] means and as many positive deviations.")
        self.token_mean.copy_(mean)
        self.token_std.copy_(std)

    def normalise(self, tokens: Tensor) -> Tensor:
        """Tokens [..., dim] in units of the space's statistics, float32: errors of all channels weigh alike."""
        return (tokens.float() - self.token_mean.float()) / self.token_std.float()

    def check_mode(self, mode: str) -> None:
        """ValueError for a mode that this decoder cannot write in."""
        if mode not in MODES:
            raise ValueError(f"There is no edit mode '{mode}'; use one of {', '.join(MODES)}.")
        if mode not in self.modes:
            raise ValueError(
                f"This edit decoder ({self.config.architecture}) cannot write in the mode '{mode}': set the mode to "
                f"{' or '.join(self.modes)}."
            )

    def forward(
        self, source: Tensor, boxes: Tensor, levels: Tensor, instruction: Tensor, history: Tensor | None = None
    ) -> Tensor:
        """One pass over all tokens, for training.

        source [B, T, dim]; boxes [T, 4], levels [T] of its tokens, all in the hierarchy table; instruction
        [B, L, text_dim], the text encoder's output with its padding as Flux would see it.
        history: None for parallel mode; for the autoregressive mode the tokens [B, T, dim] to be read as those
        written so far (token i reads history[:, i - 1]): the target for teacher forcing, or a corrupted target.
        Returns the edited tokens [B, T, dim] float32. ValueError where shapes or places do not fit.
        """
        raise NotImplementedError

    @torch.no_grad()
    def generate(
        self,
        source: Tensor,
        boxes: Tensor,
        levels: Tensor,
        instruction: Tensor,
        mode: str = "parallel",
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """The edited tokens [B, T, dim] float32, deterministically; arguments as for `forward`.

        progress(done, total) is called after every token (once for all in parallel mode); what it raises ends the work.
        """
        self.check_mode(mode)
        progress = progress or (lambda done, total: None)
        if mode == "autoregressive":
            return self._one_by_one(source, boxes, levels, instruction, progress)
        tokens = self(source, boxes, levels, instruction)
        progress(source.shape[1], source.shape[1])
        return tokens

    def _one_by_one(self, source: Tensor, boxes: Tensor, levels: Tensor, instruction: Tensor, progress: Callable) -> Tensor:
        """`generate` in autoregressive mode, for a decoder that has it."""
        raise NotImplementedError

    def _check(self, source: Tensor, boxes: Tensor, instruction: Tensor) -> None:
        if source.ndim != 3 or source.shape[-1] != self.config.dim or source.shape[1] != len(boxes):
            raise ValueError(
                f"The embedding to edit has tokens {list(source.shape)} and {len(boxes)} boxes, but this edit decoder takes "
                f"[batch, boxes, {self.config.dim}]; use the adapter that it was trained with."
            )
        if instruction.ndim != 3 or instruction.shape[-1] != self.config.text_dim or len(instruction) != len(source):
            raise ValueError(
                f"The instruction encoding {list(instruction.shape)} does not fit; this edit decoder takes "
                f"[{len(source)}, length, {self.config.text_dim}] from the text encoder that it was trained with."
            )

    def _finish(self, normed: Tensor, hidden: Tensor) -> Tensor:
        edited = normed + self.out(hidden).float()
        return edited * self.token_std.float() + self.token_mean.float()

    def _cast(self, x: Tensor) -> Tensor:
        return x.to(self.out.weight.dtype)
