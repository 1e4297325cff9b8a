import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from semantic_diffusion_adapter.kernels.edit_decoder import (
    LLMEditDecoder,
    LLMEditDecoderConfig,
    T5EditDecoder,
    T5EditDecoderConfig,
    build_edit_decoder,
    read_config,
)
from semantic_diffusion_adapter.kernels.edit_decoder.llm import new_llm
from semantic_diffusion_adapter.kernels.edit_decoder.llm_record import llm_record
from semantic_diffusion_adapter.kernels.hierarchy import PRESETS
from transformers import AutoConfig, AutoModel

TABLE = PRESETS["tree128"]
SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
KINDS = {
    "qwen3": SIZES | {"head_dim": 16},
    "qwen2": SIZES,
    "llama": SIZES | {"rope_theta": 500_000.0},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}


def toy(kind: str = "qwen3", **fields) -> LLMEditDecoderConfig:
    llm = {"model_type": kind, **KINDS[kind]}
    return LLMEditDecoderConfig(**({"dim": 20, "text_dim": 12, "hierarchy": TABLE.to_json(), "llm": llm} | fields))


def talkative(config: LLMEditDecoderConfig, llm=None) -> LLMEditDecoder:
    """With a random output head, since a new decoder copies its source."""
    torch.manual_seed(0)
    decoder = LLMEditDecoder(config, llm).eval()
    torch.nn.init.normal_(decoder.out.weight, std=0.2)
    decoder.set_token_statistics(torch.randn(20), torch.rand(20) * 3 + 0.5)
    return decoder


@pytest.fixture
def decoder() -> LLMEditDecoder:
    return talkative(toy())


def inputs(preset: str = "tree64", batch: int = 2) -> tuple:
    table = PRESETS[preset]
    return torch.randn(batch, table.token_count, 20) * 2, table.boxes(), table.level_ids(), torch.randn(batch, 7, 12)


@pytest.mark.parametrize("kind", KINDS)
def test_any_decoder_of_transformers_edits_and_round_trips(kind):
    """It edits every preset, the same each time, and its file has no words; the record is all that it takes to build it."""
    decoder = talkative(toy(kind))
    again = build_edit_decoder(read_config(json.loads(json.dumps(decoder.config.to_json()))))
    assert again.config == decoder.config and len(decoder.blocks) == 2
    again.eval().load_state_dict(load(save(decoder.state_dict())))
    for preset in PRESETS:
        arguments = inputs(preset)
        edited = decoder.generate(*arguments)
        assert edited.shape == arguments[0].shape and edited.dtype is torch.float32
        assert torch.equal(edited, decoder.generate(*arguments)) and torch.equal(edited, again.generate(*arguments))
    assert not any("embed_tokens" in name or "wte" in name for name in decoder.state_dict())


def test_an_untrained_decoder_copies_the_source():
    decoder, arguments = LLMEditDecoder(toy()), inputs()
    torch.testing.assert_close(decoder.generate(*arguments), arguments[0])


def test_the_llm_reads_causally_instruction_then_source_then_queries(decoder):
    """A vector changes what comes at and after it and nothing before; the tokens written are read at the queries."""
    source, boxes, levels, instruction = inputs("global16", batch=1)
    seen = {}

    def run(change_at: int | None) -> torch.Tensor:
        def change(module, args, kwargs):
            vectors = kwargs["inputs_embeds"].clone()
            if change_at is not None:
                vectors[:, change_at] += 1
            return args, kwargs | {"inputs_embeds": vectors}

        def keep(module, args, output):
            seen["hidden"] = output.last_hidden_state

        hooks = [decoder.llm.register_forward_pre_hook(change, with_kwargs=True), decoder.llm.register_forward_hook(keep)]
        edited = decoder(source, boxes, levels, instruction)
        for hook in hooks:
            hook.remove()
        return edited

    plain, hidden = run(None), seen["hidden"]
    assert hidden.shape[1] == 7 + 16 + 16
    for at in (3, 7 + 5, 23 + 9):
        moved = (run(at) - plain).abs().amax((0, 2)), (seen["hidden"] - hidden).abs().amax((0, 2))
        assert moved[1][:at].max() == 0 and moved[1][at:].min() > 0
        first = max(0, at - 23)  # the first token whose query is touched
        assert moved[0][first:].min() > 0 and (first == 0 or moved[0][:first].max() == 0)


def test_instruction_source_and_place_all_matter(decoder):
    source, boxes, levels, instruction = inputs("tree112", batch=1)
    edited = decoder.generate(source, boxes, levels, instruction)
    for other in (
        decoder.generate(source, boxes, levels, instruction + torch.randn_like(instruction)),
        decoder.generate(source.roll(1, 1), boxes, levels, instruction).roll(-1, 1),
    ):
        assert (edited - other).abs().max() > 1e-3
    cells = (slice(64, 68), slice(68, 72))  # the tokens of one cell of the finest level, and of the next
    assert not torch.equal(*(decoder(source[:, :4], TABLE.boxes()[c], TABLE.level_ids()[c], instruction) for c in cells))


def test_the_residual_lives_in_normalised_space(decoder):
    """Rescaling the whole space, statistics included, rescales the result and nothing else."""
    source, *rest = inputs()
    edited = decoder.generate(source, *rest)
    scale, shift = torch.rand(20) + 0.5, torch.randn(20)
    decoder.set_token_statistics(decoder.token_mean * scale + shift, decoder.token_std * scale)
    torch.testing.assert_close(decoder.generate(source * scale + shift, *rest), edited * scale + shift, rtol=1e-3, atol=1e-3)


def test_trained_weights_are_kept_and_read_vectors_of_the_size_of_their_words():
    config = AutoConfig.for_model("qwen3", vocab_size=50, **KINDS["qwen3"])
    llm = AutoModel.from_config(config)
    torch.nn.init.normal_(llm.get_input_embeddings().weight, std=0.07)
    weight, size = llm.layers[1].mlp.up_proj.weight.detach().clone(), llm.get_input_embeddings().weight.detach().std().item()
    decoder = talkative(toy(llm=llm_record(config)), llm)
    assert torch.equal(decoder.llm.layers[1].mlp.up_proj.weight, weight)
    sizes = []
    decoder.llm.register_forward_pre_hook(lambda m, a, kw: sizes.append(kw["inputs_embeds"].detach().std().item()), with_kwargs=True)
    decoder(*inputs())
    assert sizes[0] == pytest.approx(size, rel=0.02)
    assert "vocab_size" not in decoder.config.llm and read_config(decoder.config.to_json()) == decoder.config


def test_rotary_bases_are_read_under_the_names_of_every_release():
    record = llm_record(AutoConfig.for_model("llama", **KINDS["llama"]))
    assert record["rope_theta"] == 500_000.0
    older = {key: value for key, value in record.items() if key != "rope_parameters"}
    arguments = inputs()
    decoders = [talkative(toy("llama", llm=llm)) for llm in (record, older, record | {"rope_theta": 10_000.0, "rope_parameters": None})]
    edited = [decoder(*arguments) for decoder in decoders]
    assert torch.equal(edited[0], edited[1]) and not torch.allclose(edited[0], edited[2])


def test_gradients_reach_every_weight(decoder):
    decoder(*inputs("tree128")).square().mean().backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights(decoder, dtype):
    arguments = inputs("tree128")
    expected = decoder.generate(*arguments)
    assert F.cosine_similarity(decoder.to(dtype).generate(*arguments), expected, dim=-1).min() > 0.99


def test_a_half_precision_llm_under_full_precision_projections_trains(decoder):
    """As in training at scale: the frozen LLM in bf16, the rest in float32 under autocast."""
    arguments = inputs()
    expected = decoder(*arguments)
    decoder.llm.to(torch.bfloat16).requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        edited = decoder(*arguments)
    edited.square().mean().backward()
    assert F.cosine_similarity(edited, expected, dim=-1).min() > 0.99
    assert decoder.source_in.weight.grad.abs().sum() > 0 and decoder.instruction_in[1].weight.grad.abs().sum() > 0


def test_what_it_cannot_do_is_said(decoder):
    source, boxes, levels, instruction = inputs()
    with pytest.raises(ValueError, match=r"\(causal_lm\) cannot write in the mode 'autoregressive': set the mode to parallel"):
        decoder.generate(source, boxes, levels, instruction, mode="autoregressive")
    with pytest.raises(ValueError, match="takes no history"):
        decoder(source, boxes, levels, instruction, history=source)
    with pytest.raises(ValueError, match=r"takes \[batch, boxes, 20\]"):
        decoder(source[..., :19], boxes, levels, instruction)
    with pytest.raises(ValueError, match=r"takes \[2, length, 12\]"):
        decoder(source, boxes, levels, instruction[..., :11])


def test_llms_that_cannot_be_built_are_refused():
    for kind in ("qwen99", "t5", "mamba", "qwen3_moe", None, ["qwen3"]):
        with pytest.raises(ValueError, match="of type .* builds .*qwen3.*: update the pack"):
            new_llm({"model_type": kind})
    with pytest.raises(ValueError, match="says 'wide' for 'hidden_size'"):
        new_llm({"model_type": "qwen3", "hidden_size": "wide"})
    with pytest.raises(ValueError, match="cannot build the edit decoder's 'qwen3'"):
        new_llm({"model_type": "qwen3", "hidden_size": 32, "hidden_act": "no_such"})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("_attn_implementation", "owner/kernel"), ("attn_implementation", "owner/kernel"), ("auto_map", {"AutoModel": "a/b--c.D"}),
        ("_name_or_path", "owner/model"), ("quantization_config", {"quant_method": "bitsandbytes"}), ("torchscript", True),
        ("hidden_act", "owner/kernel"), ("num_hidden_layers", 10**8), ("num_hidden_layers", True), ("hidden_size", 2.0),
        ("rope_parameters", {"rope_type": "hf-hub:a/b"}), ("rope_scaling", {"future": 1}),
        ("layer_types", ["full_attention"] * 10**4), ("vocab_size", 10**9),
    ],
)  # fmt: skip
def test_what_is_no_architecture_is_refused_by_name(field, value):
    """A file may come from anybody: no field of it reaches the network or foreign code, and no number takes minutes."""
    for function in (new_llm, lambda record: build_edit_decoder(toy(llm=record))):
        with pytest.raises(ValueError, match=field) as caught:
            function({"model_type": "qwen3", **SIZES, field: value})
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_an_llm_whose_network_a_record_does_not_hold_is_not_trained():
    config = AutoConfig.for_model("qwen3", **KINDS["qwen3"])
    config.num_experts = 8
    with pytest.raises(ValueError, match="'num_experts'"):
        llm_record(config)
    with pytest.raises(ValueError, match="type 'qwen3_moe'"):
        llm_record(AutoConfig.for_model("qwen3_moe"))


def test_a_record_of_an_older_release_builds():
    """It holds what every configuration of transformers says."""
    config = AutoConfig.for_model("qwen3", **KINDS["qwen3"])
    old = {key: value for key, value in config.to_dict().items() if value is not None and key in ("return_dict", "output_hidden_states")}
    assert old and new_llm(llm_record(config) | old).config.hidden_size == 32


def test_the_record_names_the_architecture_and_without_one_it_is_t5(decoder):
    config = T5EditDecoderConfig(20, 12, TABLE.to_json(), width=32, heads=2, layers=1)
    assert config.to_json()["architecture"] == "t5" and decoder.config.to_json()["architecture"] == "causal_lm"
    old = {key: value for key, value in config.to_json().items() if key != "architecture"}
    assert read_config(old) == read_config(config.to_json()) == config
    assert type(build_edit_decoder(read_config(old))) is T5EditDecoder
    with pytest.raises(ValueError, match="'mamba' and this version of the pack knows t5, causal_lm; update the pack"):
        read_config(old | {"architecture": "mamba"})
    with pytest.raises(ValueError, match="update the pack"):
        read_config(old | {"architecture": "causal_lm"})
