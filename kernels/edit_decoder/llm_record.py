"""What a record may say of the LLM in an edit decoder: its family, and the fields that describe its network.

transformers' configurations take much more: kernels and code by an address, models inside models. A file may come from
anybody. So what is not listed here is refused by name, both when a file is read and when it would be written.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from annotated_types import Len

from .. import schema
from ..schema import Flag, Heads, Layers, Number, Positive, Share, Width, Word, whole

# Dense causal decoders whose whole network torch builds: no experts, no kernels of their own.
FAMILIES = (
    "gemma", "gemma2", "gemma3_text", "gpt2", "granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3",
)  # fmt: skip

_Length = whole(1, 2**24)  # positions or tokens
_Count = whole(0, 2**24)
_PerLayer = Len(0, 256)
_Factors = Annotated[list[Number], Len(0, 2**12)]


class Rope(schema.Closed):
    """Rotary positions, plain or stretched (transformers' `rope_parameters`, `rope_scaling` before release 5)."""

    rope_type: Word | None = None
    type: Word | None = None
    rope_theta: Positive | None = None
    factor: Positive | None = None
    attention_factor: Positive | None = None
    beta_fast: Positive | None = None
    beta_slow: Positive | None = None
    high_freq_factor: Positive | None = None
    long_factor: _Factors | None = None
    low_freq_factor: Positive | None = None
    mscale: Number | None = None
    mscale_all_dim: Number | None = None
    original_max_position_embeddings: _Length | None = None
    partial_rotary_factor: Positive | None = None
    short_factor: _Factors | None = None
    truncate: Flag | None = None


class LLM(schema.Closed):
    """A transformers configuration of one of FAMILIES. A field that is left out or null takes the library's default."""

    model_type: Literal[FAMILIES]
    hidden_size: Width | None = None
    intermediate_size: Width | None = None
    num_hidden_layers: Layers | None = None
    num_attention_heads: Heads | None = None
    num_key_value_heads: Heads | None = None
    head_dim: Width | None = None
    hidden_act: Word | None = None
    hidden_activation: Word | None = None
    max_position_embeddings: _Length | None = None
    original_max_position_embeddings: _Length | None = None
    initializer_range: Number | None = None
    rms_norm_eps: Positive | None = None
    tie_word_embeddings: Flag | None = None
    attention_bias: Flag | None = None
    mlp_bias: Flag | None = None
    attention_dropout: Share | None = None
    embd_pdrop: Share | None = None
    resid_pdrop: Share | None = None
    # positions
    rope_theta: Positive | None = None
    rope_scaling: Rope | None = None
    rope_parameters: Rope | dict[Word, Rope] | None = None
    rope_local_base_freq: Positive | None = None
    partial_rotary_factor: Positive | None = None
    no_rope_layers: Annotated[list[whole(0, 1)], _PerLayer] | None = None
    no_rope_layer_interval: _Count | None = None
    # which keys a query sees
    layer_types: Annotated[list[Word], _PerLayer] | None = None
    sliding_window: _Length | None = None
    sliding_window_pattern: _Length | None = None
    use_sliding_window: Flag | None = None
    max_window_layers: _Count | None = None
    use_bidirectional_attention: Flag | None = None
    # Gemma's and Granite's scales
    attention_multiplier: Number | None = None
    attn_logit_softcapping: Positive | None = None
    embedding_multiplier: Number | None = None
    final_logit_softcapping: Positive | None = None
    logits_scaling: Number | None = None
    query_pre_attn_scalar: Positive | None = None
    residual_multiplier: Number | None = None
    # GPT-2
    activation_function: Word | None = None
    attn_pdrop: Share | None = None
    layer_norm_epsilon: Positive | None = None
    n_embd: Width | None = None
    n_head: Heads | None = None
    n_inner: Width | None = None
    n_layer: Layers | None = None
    n_positions: whole(1, 2**20) | None = None
    scale_attn_by_inverse_layer_idx: Flag | None = None
    scale_attn_weights: Flag | None = None
    reorder_and_upcast_attn: Flag | None = None


# What a transformers configuration says beyond the network that is built here: words, heads, how it was published.
_ASIDE = {
    "_name_or_path", "_sliding_window_pattern", "add_cross_attention", "architectures", "auto_map", "bos_token_id", "dtype",
    "eos_token_id", "id2label", "label2id", "pad_token_id", "pretraining_tp", "quantization_config", "torch_dtype",
    "transformers_version", "use_cache", "vocab_size",
}  # fmt: skip


def read_llm(record: dict[str, Any]) -> dict[str, Any]:
    """The fields of a record that the LLM is built from. ValueError names an unknown field or one out of bounds.

    Fields that are the same in every configuration of transformers are left out; older records hold them.
    """
    if not isinstance(record.get("model_type"), str) or record["model_type"] not in FAMILIES:
        raise ValueError(
            f"The edit decoder is made of a causal LLM of type {schema.short(record.get('model_type'))} and this version of the pack "
            f"builds {', '.join(FAMILIES)}: update the pack."
        )
    from transformers import PretrainedConfig

    bare = PretrainedConfig().to_dict()
    said = {
        key: value for key, value in record.items() if key in LLM.model_fields or key not in bare or value != bare[key]
    }
    schema.parse(LLM, said, "The LLM of the edit decoder")
    return {key: value for key, value in said.items() if value is not None}


def llm_record(config: Any) -> dict[str, Any]:
    """A transformers configuration as JSON that every release reads alike: complete, so that no default can change it.

    ValueError where it is of no family that is built, or says of its network what a record does not hold.
    """
    record = {key: value for key, value in config.to_dict().items() if value is not None}
    record = {key: value for key, value in record.items() if key not in _ASIDE and not key.startswith("summary_")}
    rope = record.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:  # releases before 5 know it by two other names
        record["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            record["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    return read_llm(record)
