"""The miniature's text encoder as an ordinary CLIP: core's T5, core's prompt weights and a tokenizer of words."""

from __future__ import annotations

import re
from typing import Any

import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import comfy.text_encoders.t5
import torch

from ...kernels import base_files
from ...kernels.words import END, PAD, UNKNOWN, split
from .saying import warn

_ANY_WORD = re.compile(r"[^\W\d_]+|[0-9]+")  # of any script, where `split` knows a to z


class WordTokenizer:
    """Lower-case words and numbers, each one id, then </s>, padded to the trained length; longer prompts are cut. What is not
    heard is said in the node."""

    def __init__(self, vocabulary: list[str], length: int):
        self.words = list(vocabulary)
        self.ids = {word: index for index, word in enumerate(self.words)}
        self.length = length

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **kwargs: Any) -> dict[str, list]:
        sd1_clip = comfy.sd1_clip
        weighted = sd1_clip.token_weights(sd1_clip.escape_important(text), 1.0)
        parts = [(sd1_clip.unescape_important(part), weight) for part, weight in weighted]
        words = [(word, weight) for part, weight in parts for word in split(part)]
        self._tell(" ".join(part for part, _ in parts), len(words))
        tokens = [(self.ids.get(word, UNKNOWN), weight, place + 1) for place, (word, weight) in enumerate(words)]
        tokens = [*tokens[: self.length - 1], (END, 1.0, 0)]
        tokens += [(PAD, 1.0, 0)] * (self.length - len(tokens))
        return {"t5": [tokens if return_word_ids else [token[:2] for token in tokens]]}

    def _tell(self, text: str, count: int) -> None:
        """Say what of a prompt is not heard, in the node and in the log: it would do nothing in silence."""
        strange = dict.fromkeys(word for word in _ANY_WORD.findall(text.lower()) if word not in self.ids)
        said = []
        if strange:
            known = ", ".join(sorted(word for word in self.words if word.isalpha()))
            most = max((int(word) for word in self.words if word.isdecimal()), default=0)
            named = ", ".join(word[:40] for word in list(strange)[:12])
            said.append(f"The miniature is a toy and does not know: {named}. It knows: {known}, and even numbers up to {most}.")
        if count >= self.length:
            said.append(f"The miniature hears the first {self.length - 1} words of a prompt and this one has {count}.")
        if said:
            warn(" ".join(said))

    def untokenize(self, token_weight_pair: list) -> list:
        return [(pair, self.words[pair[0]]) for pair in token_weight_pair]

    def state_dict(self) -> dict:
        return {}


class MiniatureTextModel(torch.nn.Module):
    """What core's CLIP object drives.

    Padding is masked nowhere, as in Flux; pooled is the mean over the words and </s>.
    """

    def __init__(self, config: dict, device="cpu", dtype=None, model_options={}):  # noqa: B006 (core's signature)
        super().__init__()
        self.dtypes = {dtype}
        self.t5 = comfy.sd1_clip.SDClipModel(
            device=device,
            dtype=dtype,
            layer="last",
            textmodel_json_config=config,
            special_tokens={"end": END, "pad": PAD},
            model_class=comfy.text_encoders.t5.T5,
            model_options=model_options,
        )

    def set_clip_options(self, options: dict) -> None:
        self.t5.set_clip_options(options)

    def reset_clip_options(self) -> None:
        self.t5.reset_clip_options()

    def encode_token_weights(self, token_weight_pairs: dict[str, list]) -> tuple[torch.Tensor, torch.Tensor]:
        pairs = token_weight_pairs["t5"]
        out, _ = self.t5.encode_token_weights(pairs)
        words = torch.tensor([token[0] != PAD for section in pairs for token in section], device=out.device)
        return out, out[:, words].mean(dim=1)

    def load_sd(self, sd: dict):
        return self.t5.load_sd(sd)


def load_clip(path: str):
    """The CLIP of a text encoder file. ValueError where core's T5 could not compute what was trained."""
    tensors, record = base_files.load(path, "text_encoder")
    config = record["config"]
    t5 = config["t5"]
    fixed = {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128, "feed_forward_proj": "gated-gelu"}
    for name, value in fixed.items():
        if t5.get(name, value) != value:
            raise ValueError(f"{path} has {name} {t5[name]!r} and ComfyUI's T5 knows only {value!r}: train it with that.")
    names = ("d_model", "d_kv", "d_ff", "num_heads", "num_layers", "vocab_size")
    core = {name: t5[name] for name in names} | {
        "dense_act_fn": "gelu_pytorch_tanh", "is_gated_act": True, "model_type": "t5",
    }  # fmt: skip

    def model(device="cpu", dtype=None, model_options={}):  # noqa: B006 (core's signature)
        return MiniatureTextModel(core, device, dtype, model_options)

    def tokenizer(embedding_directory=None, tokenizer_data={}):  # noqa: B006 (core's signature)
        return WordTokenizer(config["vocabulary"], config["length"])

    target = comfy.supported_models_base.ClipTarget(tokenizer, model)
    clip = comfy.sd.CLIP(target, model_options={"dtype": torch.float32})
    missing, _ = clip.load_sd({name: tensor.float() for name, tensor in tensors.items()})
    if missing:
        raise ValueError(f"{path} lacks {missing[0]!r}: export the text encoder again.")
    return clip
