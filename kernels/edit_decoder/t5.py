"""The edit decoder on transformers' T5 decoder (Raffel et al., arXiv 1910.10683), fed with continuous vectors.

Its memory is [embedding ; instruction encoding]. One set of weights runs in two modes:

- autoregressive: token i reads the edited token i - 1, causally, with a KV cache;
- parallel: a learned query per token, all at once and bidirectionally, since continuous predictions fed back to
  their own model are known to drift (Nexus-Gen, arXiv 2504.21356).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import schema
from .base import MODES, EditDecoder, EditDecoderConfig


@dataclass(frozen=True)
class T5EditDecoderConfig(EditDecoderConfig):
    architecture = "t5"

    width: schema.Width = 1024
    heads: schema.Heads = 16
    layers: schema.Layers = 12

    def __post_init__(self):
        super().__post_init__()
        if self.width % self.heads:
            raise ValueError(f"An edit decoder of width {self.width} cannot have {self.heads} heads; use a divisor of the width.")


class T5EditDecoder(EditDecoder):
    modes = MODES

    def __init__(self, config: T5EditDecoderConfig):
        width = config.width
        super().__init__(config, width)
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
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    @property
    def blocks(self) -> nn.ModuleList:
        return self.stack.block

    def forward(
        self, source: Tensor, boxes: Tensor, levels: Tensor, instruction: Tensor, history: Tensor | None = None
    ) -> Tensor:
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

    def _one_by_one(self, source: Tensor, boxes: Tensor, levels: Tensor, instruction: Tensor, progress: Callable) -> Tensor:
        normed, place, memory = self._prepare(source, boxes, levels, instruction)
        count, previous, cache, written = source.shape[1], self.start, None, []
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
        self._check(source, boxes, instruction)
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
