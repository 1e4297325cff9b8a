"""Where the outputs of a text encoder lie: their mean and deviation by channel, and how embeddings keep to them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .embedding import SemanticEmbedding, from_hierarchy
from .hierarchy import Hierarchy

_SPREAD = 0.05  # deviations by which the tokens of the shared start differ; equal ones would get equal gradients
_SHARED = 20_411  # its seed: one start for all pictures, so that a token's place means the same in each

# What a text space is measured on where there are no captions: things, people, places, light and style, as prompts name
# them, and the plain shapes that the miniature has words for.
PROMPTS = (
    "a photo of a red fox in the snow at dusk", "portrait of an old fisherman, deep wrinkles, soft window light",
    "a busy street market in Marrakesh, seen from above", "two children build a sandcastle on a grey beach",
    "a bowl of ramen with a soft-boiled egg, steam, dark wooden table",
    "minimalist living room with a green sofa and a round mirror",
    "an astronaut riding a horse, oil painting", "close-up of a dew drop on a blade of grass, macro photography",
    "a steam locomotive crosses a stone bridge in autumn", "the word OPEN painted on a blue wooden door",
    "aerial view of rice terraces under morning fog", "a black cat sleeps on a stack of books beside a lamp",
    "a woman in a yellow raincoat waits at a bus stop, rain, reflections",
    "modern glass office building against a clear sky",
    "watercolour of a small harbour with fishing boats", "a violinist on stage, one spotlight, dark background",
    "three ceramic vases on a shelf, pastel colours",
    "a mountain lake with snow-covered peaks, golden hour, wide angle",
    "an old pickup truck in a field of sunflowers", "a robot waters plants on a balcony, digital art",
    "a small red circle at the top left and a large blue square at the bottom right on a white ground",
    "a green triangle on the left and a yellow cross at the center on a grey ground",
)


def length(values: Tensor) -> Tensor:
    """[..., 1]: the root mean square of normalised tokens [..., D], 1 on average for a text's."""
    return values.square().mean(-1, keepdim=True).sqrt()


@dataclass(frozen=True, eq=False)
class TextSpace:
    """mean, deviation: [D] float32 of the encoder's outputs over many texts; the deviation is above 0."""

    mean: Tensor
    deviation: Tensor

    @classmethod
    def of(cls, outputs: Iterable[Tensor]) -> TextSpace:
        """The space that outputs [L, D] of texts, without their padding, span. ValueError for fewer than two vectors."""
        total, squares, count = 0.0, 0.0, 0
        for each in outputs:
            each = each.detach().double().cpu()
            total, squares, count = total + each.sum(0), squares + each.square().sum(0), count + len(each)
        if count < 2:
            raise ValueError(f"The statistics of a text space need two or more vectors, not {count}.")
        mean = total / count
        variance = (squares / count - mean.square()) * count / (count - 1)
        return cls(mean.float(), variance.clamp_min(0).sqrt().clamp_min(1e-6).float())

    @property
    def width(self) -> int:
        return len(self.mean)

    def normalise(self, tokens: Tensor) -> Tensor:
        """Tokens [..., D] in deviations from the mean."""
        return (tokens - self.mean.to(tokens)) / self.deviation.to(tokens)

    def denormalise(self, values: Tensor) -> Tensor:
        return values * self.deviation.to(values) + self.mean.to(values)

    def hold(self, values: Tensor, longest: Tensor) -> Tensor:
        """Normalised tokens [..., D] of which none is longer than `longest` [..., 1], in deviations a channel."""
        return values * (longest / length(values)).clamp_max(1)

    def start(self, hierarchy: Hierarchy, batch: int = 1) -> SemanticEmbedding:
        """The mean in every token, with a little noise that is the same for every picture."""
        noise = torch.randn(hierarchy.token_count, self.width, generator=torch.Generator().manual_seed(_SHARED))
        tokens = self.denormalise(_SPREAD * noise)
        return from_hierarchy(tokens.expand(batch, -1, -1).clone(), hierarchy, source={"start": "mean"})

    def start_from(self, text: Tensor, hierarchy: Hierarchy, batch: int = 1) -> SemanticEmbedding:
        """A prompt's encoding [1 or batch, L, D], cut to the hierarchy; where it is shorter, `start` goes on."""
        begun = self.start(hierarchy, batch)
        count = min(text.shape[1], hierarchy.token_count)
        tokens = begun.tokens.clone()
        tokens[:, :count] = text[:, :count].to(tokens)
        return from_hierarchy(tokens, hierarchy, source={"start": "prompt"})

    def distances(self, embedding: SemanticEmbedding) -> dict[str, float]:
        """How far an embedding is from the space, means over its pictures.

        mean: root mean square, over channels, of the tokens' mean in deviations (0 for a text's).
        deviation: the same of the tokens' deviation (1).
        norm: a token's length as a share of a text's (1).
        cosine: mean squared cosine between two tokens of one picture.
        """
        values = self.normalise(embedding.tokens.float())
        unit = F.normalize(values, dim=-1)
        cosines = (unit @ unit.transpose(1, 2)).square()
        count = embedding.token_count
        others = (cosines.sum((1, 2)) - count) / max(1, count * (count - 1))
        return {
            "mean": float(values.mean(1).square().mean(-1).sqrt().mean()),
            "deviation": float(values.std(1, correction=0).square().mean(-1).sqrt().mean()),
            "norm": float(length(values).mean()),
            "cosine": float(others.mean()),
        }
