"""The edit decoder: a T5 decoder that reads a semantic embedding and an instruction and writes the edited embedding.

The stack is transformers' T5 decoder (Raffel et al., arXiv 1910.10683) over continuous vectors. Its memory is
[embedding ; instruction encoding]; every output is a residual on the source token of the same place, in units of the
embedding space's own statistics. One set of weights runs in two modes:

- autoregressive: token i reads the edited token i - 1, causally, with a KV cache;
- parallel: a learned query per token, all at once and bidirectionally, since continuous predictions fed back to
  their own model are known to drift (Nexus-Gen, arXiv 2504.21356).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from .hierarchy import Hierarchy
from .rope import rotary_angles

MODES = ("parallel", "autoregressive")


@dataclass(frozen=True)
class EditDecoderConfig:
    """dim: width of the embedding (4096 for FLUX.1); text_dim: width of the instruction encoding (4096 for its T5);
    hierarchy: the query table of the adapter, ((rows, cols, tokens), ...)."""

    dim: int
    text_dim: int
    hierarchy: tuple[tuple[int, int, int], ...]
    width: int = 1024
    heads: int = 16
    layers: int = 12

    def __post_init__(self):
        object.__setattr__(self, "hierarchy", tuple(tuple(level) for level in self.hierarchy))
        if self.width % self.heads:
            raise ValueError(f"An edit decoder of width {self.width} cannot have {self.heads} heads; use a divisor of the width.")

    def to_json(self) -> dict:
        return asdict(self) | {"hierarchy": [list(level) for level in self.hierarchy]}

    @classmethod
    def from_json(cls, record: dict) -> EditDecoderConfig:
        try:
            return cls(**record)
        except TypeError as error:
            raise ValueError(f"The edit decoder record does not fit this version of the pack ({error}); update the pack.") from None


class TokenPlaces(nn.Module):
    """Who a token is: a learned vector per row of the hierarchy table, plus its box and level along continuous axes."""

    AXIS = 16  # channels per axis: sines and cosines at 8 frequencies

    def __init__(self, table: Hierarchy, width: int):
        super().__init__()
        self.table = table
        self.rows = nn.Parameter(torch.randn(table.token_count, width) * 0.02)
        self.box = nn.Linear(7 * self.AXIS, width)

    def index(self, boxes: Tensor, levels: Tensor) -> Tensor:
        """Rows of the table, [T] int64 on the CPU, of tokens given by boxes [T, 4] and levels [T].

        A token's slot is the number of tokens before it with the same box and level.
        """
        boxes, levels = boxes.float().cpu(), levels.cpu()
        near = 1e-3  # far above the rounding of boxes, far below any cell
        same_cell = ((boxes[:, None] - boxes[None]).abs() < near).all(-1) & (levels[:, None] == levels[None])
        slots = same_cell.tril(-1).sum(-1)
        match = ((boxes[:, None] - self.table.boxes()[None]).abs() < near).all(-1)
        match &= (levels[:, None] == self.table.level_ids()[None]) & (slots[:, None] == self.table.slots()[None])
        found = match.any(-1)
        if not found.all():
            i = int((~found).nonzero()[0])
            box = ", ".join(f"{value:.3g}" for value in boxes[i].tolist())
            raise ValueError(
                f"Token {i} (level {int(levels[i])}, box {box}) has no place in the hierarchy of this edit decoder; "
                "edit embeddings of its own adapter, before composing them."
            )
        return match.long().argmax(-1)

    def forward(self, boxes: Tensor, levels: Tensor) -> Tensor:
        """[T, width]."""
        index = self.index(boxes, levels)
        x0, y0, x1, y1 = (self.table.boxes()[index] * 32).unbind(-1)  # the image is 32 units wide: as many as its patches
        level = self.table.level_ids()[index].float()
        # Centre and level are the axes of the rotary positions; the corners say how far the box reaches.
        axes = torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, level, x0, y0, x1, y1], dim=-1)
        angles = rotary_angles(axes, (self.AXIS,) * 7)
        waves = torch.cat([angles.sin(), angles.cos()], dim=-1).to(self.rows)
        return self.rows[index.to(self.rows.device)] + self.box(waves)


class EditDecoder(nn.Module):
    """Source embedding and instruction -> edited embedding of the same boxes and levels."""

    def __init__(self, config: EditDecoderConfig):
        super().__init__()
        self.config = config
        width = config.width
        self.places = TokenPlaces(Hierarchy.from_json(config.hierarchy), width)
        self.memory_in = nn.Linear(config.dim, width)
        self.instruction_in = nn.Sequential(nn.LayerNorm(config.text_dim), nn.Linear(config.text_dim, width))
        self.memory_kind = nn.Parameter(torch.randn(2, width) * 0.02)  # source token, instruction token
        self.memory_norm = nn.LayerNorm(width)
        self.source_in = nn.Linear(config.dim, width)
        self.history_in = nn.Linear(config.dim, width)
        self.start = nn.Parameter(torch.randn(width) * 0.02)  # in place of the token before the first
        self.query = nn.Parameter(torch.randn(width) * 0.02)  # parallel mode: in place of every token before
        self.mode = nn.Parameter(torch.randn(len(MODES), width) * 0.02)
        self.stack = _t5_decoder(width, config.heads, config.layers)
        self.out = nn.Linear(width, config.dim)
        nn.init.zeros_(self.out.weight)  # an untrained decoder copies the source
        nn.init.zeros_(self.out.bias)
        self.register_buffer("token_mean", torch.zeros(config.dim))
        self.register_buffer("token_std", torch.ones(config.dim))

    def set_token_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Mean and standard deviation per channel, [dim] each, of the adapter's tokens over real images."""
        if mean.shape != self.token_mean.shape or std.shape != self.token_std.shape or not (std > 0).all():
            raise ValueError(f"Token statistics need [{self.config.dim}] means and as many positive deviations.")
        self.token_mean.copy_(mean)
        self.token_std.copy_(std)

    def normalise(self, tokens: Tensor) -> Tensor:
        """Tokens [..., dim] in units of the space's statistics, float32: where errors of all channels weigh the same."""
        return (tokens.float() - self.token_mean.float()) / self.token_std.float()

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
        normed, place, memory = self._prepare(source, boxes, levels, instruction)
        count = source.shape[1]
        if history is None:
            inputs = self._inputs(normed, place, self.query, MODES.index("parallel"))
            mask = memory.new_zeros(1, 1, count, count)
        else:
            if history.shape != source.shape:
                raise ValueError(f"The history has shape {list(history.shape)} instead of the source's {list(source.shape)}.")
            written = self.history_in(self._cast(self.normalise(history[:, :-1])))
            start = self.start.to(written.dtype).expand(len(source), 1, -1)
            inputs = self._inputs(normed, place, torch.cat([start, written], dim=1), MODES.index("autoregressive"))
            mask = memory.new_full((count, count), torch.finfo(memory.dtype).min).triu(1)[None, None]
        hidden = self._run(inputs, memory, mask).last_hidden_state
        return self._finish(normed, hidden)

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
        if mode not in MODES:
            raise ValueError(f"There is no edit mode '{mode}'; use one of {', '.join(MODES)}.")
        progress = progress or (lambda done, total: None)
        count = source.shape[1]
        if mode == "parallel":
            tokens = self(source, boxes, levels, instruction)
            progress(count, count)
            return tokens

        normed, place, memory = self._prepare(source, boxes, levels, instruction)
        previous, cache, written = self.start, None, []
        for i in range(count):
            step = self._inputs(normed[:, i : i + 1], place[i : i + 1], previous, MODES.index("autoregressive"))
            result = self._run(step, memory, memory.new_zeros(1, 1, 1, i + 1), use_cache=True, past_key_values=cache)
            cache = result.past_key_values
            token = self._finish(normed[:, i : i + 1], result.last_hidden_state)
            previous = self.history_in(self._cast(self.normalise(token)))
            written.append(token)
            progress(i + 1, count)
        return torch.cat(written, dim=1)

    def _prepare(self, source: Tensor, boxes: Tensor, levels: Tensor, instruction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised source [B, T, dim] float32, places [T, width], memory [B, T + L, width]."""
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
        normed = self.normalise(source)
        place = self.places(boxes, levels)
        tokens = self.memory_in(self._cast(normed)) + place + self.memory_kind[0]
        text = self.instruction_in(self._cast(instruction)) + self.memory_kind[1]
        return normed, place, self.memory_norm(torch.cat([tokens, text], dim=1))

    def _inputs(self, normed: Tensor, place: Tensor, before: Tensor, mode: int) -> Tensor:
        return self.source_in(self._cast(normed)) + place + before + self.mode[mode]

    def _run(self, inputs: Tensor, memory: Tensor, mask: Tensor, **cache):
        # A 4-D additive mask is the one form that every release of transformers takes as it is, causal or not.
        return self.stack(inputs_embeds=inputs, attention_mask=mask, encoder_hidden_states=memory, **({"use_cache": False} | cache))

    def _finish(self, normed: Tensor, hidden: Tensor) -> Tensor:
        edited = normed + self.out(hidden).float()
        return edited * self.token_std.float() + self.token_mean.float()

    def _cast(self, x: Tensor) -> Tensor:
        return x.to(self.out.weight.dtype)


def _t5_decoder(width: int, heads: int, layers: int) -> nn.Module:
    """T5 v1.1's decoder stack (gated GELU, feed-forward 2.5 times the width) that is fed with vectors only."""
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5Stack

    config = T5Config(
        vocab_size=1,
        d_model=width,
        d_kv=width // heads,
        d_ff=width * 5 // 2,
        num_heads=heads,
        num_layers=layers,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        is_decoder=True,
        pad_token_id=0,
        eos_token_id=0,
    )
    stack = T5Stack(config)
    stack.embed_tokens = None  # some releases make a vocabulary table here, which would only sit in the checkpoint
    return stack
