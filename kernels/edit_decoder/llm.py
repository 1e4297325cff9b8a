"""The edit decoder on a causal LLM: a dense decoder of transformers (Qwen, Llama, ...) in place of T5's.

The LLM reads one sequence of vectors, [instruction ; source tokens ; queries], under its own causal mask: sources know
the instruction, every query knows both and the queries before it. The queries are written out in one parallel pass,
since a learned query cannot drift as fed-back predictions do. Learned queries in a causal LLM, with its mask as it is:
MetaQueries, arXiv 2504.06256. The instruction comes encoded by Flux's own text encoder; the LLM's words and its head
are not used.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .base import EditDecoder, EditDecoderConfig
from .llm_record import llm_record, read_llm


@dataclass(frozen=True)
class LLMEditDecoderConfig(EditDecoderConfig):
    """llm: the decoder's transformers configuration (`model_type`, `hidden_size`, ...); what it leaves out is filled in
    with transformers' defaults when the decoder is made."""

    architecture = "causal_lm"

    llm: dict[str, Any]


class LLMEditDecoder(EditDecoder):
    modes = ("parallel",)

    def __init__(self, config: LLMEditDecoderConfig, llm: nn.Module | None = None):
        """llm: the base model of `config.llm` with trained weights; None for a new one. Its word table is dropped."""
        size = 1.0 if llm is None else float(llm.get_input_embeddings().weight.detach().float().std())
        llm = llm or new_llm(config.llm)
        llm.set_input_embeddings(None)  # it is fed with vectors only
        width = llm.config.hidden_size
        super().__init__(replace(config, llm=llm_record(llm.config)), width)
        self.llm = llm
        self.instruction_in = nn.Sequential(nn.LayerNorm(config.text_dim), nn.Linear(config.text_dim, width))
        self.source_in = nn.Linear(config.dim, width)
        self.query_in = nn.Linear(config.dim, width)
        self.kind = nn.Parameter(torch.randn(3, width) * 0.02)  # instruction, source, query
        self.input_norm = nn.LayerNorm(width)
        nn.init.constant_(self.input_norm.weight, size)  # vectors enter at the size of the words that the LLM knows
        self.out = nn.Linear(width, config.dim)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    @property
    def blocks(self) -> nn.ModuleList:
        return next(child for child in self.llm.children() if isinstance(child, nn.ModuleList))

    def forward(
        self, source: Tensor, boxes: Tensor, levels: Tensor, instruction: Tensor, history: Tensor | None = None
    ) -> Tensor:
        if history is not None:
            raise ValueError("A causal LLM writes all tokens in one pass and takes no history; train it in parallel mode.")
        self._check(source, boxes, instruction)
        normed, place = self.normalise(source), self.places(boxes, levels)
        tokens = self._cast(normed)
        text = self.instruction_in(self._cast(instruction)) + self.kind[0]
        sources = self.source_in(tokens) + place + self.kind[1]
        queries = self.query_in(tokens) + place + self.kind[2]
        inputs = self.input_norm(torch.cat([text, sources, queries], dim=1))
        hidden = self.llm(inputs_embeds=inputs.to(self.llm.dtype), use_cache=False).last_hidden_state
        return self._finish(normed, self._cast(hidden[:, -source.shape[1] :]))


def new_llm(record: dict[str, Any]) -> nn.Module:
    """An untrained causal decoder that knows one word.

    ValueError where it is not to be built, or not by the installed transformers.
    """
    import transformers
    from transformers import AutoConfig, AutoModel

    fields = read_llm(record)
    kind = fields.pop("model_type")
    try:
        config = AutoConfig.for_model(kind, **fields | {"vocab_size": 1, "pad_token_id": None})
        return AutoModel.from_config(config)
    except Exception as error:  # each class of transformers complains in its own way
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(f"transformers {transformers.__version__} cannot build the edit decoder's {kind!r} ({reason}).") from error
