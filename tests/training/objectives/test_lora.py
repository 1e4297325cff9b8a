from __future__ import annotations

import pytest
import torch
from semantic_diffusion_adapter.kernels.edit_decoder import LLMEditDecoder, LLMEditDecoderConfig, build_edit_decoder
from semantic_diffusion_adapter.kernels.edit_decoder.llm_record import llm_record
from semantic_diffusion_adapter.kernels.hierarchy import PRESETS

pytest.importorskip("peft", reason="peft is not installed: pip install -e '.[training]'")

from semantic_diffusion_adapter.training.objectives.lora import Learned, add_lora, load_llm, merged_state  # noqa: E402

TREE = PRESETS["tree64"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A trained causal LLM as it is published, head and words included."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    llm = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, bos_token_id=30, eos_token_id=31, pad_token_id=39))
    path = tmp_path_factory.mktemp("llm")
    llm.save_pretrained(path)
    return path


def decoder_of(folder, dtype=torch.float32) -> LLMEditDecoder:
    llm = load_llm(folder, dtype)
    return LLMEditDecoder(LLMEditDecoderConfig(12, 8, TREE.to_json(), llm_record(llm.config)), llm)


def trained(folder, dtype=torch.float32, steps: int = 5) -> tuple[LLMEditDecoder, dict, tuple]:
    """(decoder after some steps with LoRA, its weights before them, arguments of its forward)"""
    torch.manual_seed(1)
    decoder = decoder_of(folder, dtype)
    add_lora(decoder, rank=4, alpha=8)
    before = {k: v.detach().clone() for k, v in decoder.named_parameters()}
    arguments = torch.randn(2, 64, 12), TREE.boxes(), TREE.level_ids(), torch.randn(2, 5, 8)
    target = torch.randn(2, 64, 12)
    optimizer = torch.optim.Adam(Learned(decoder).parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            (decoder(*arguments) - target).square().mean().backward()
        optimizer.step()
    return decoder.eval(), before, arguments


def test_a_new_lora_changes_nothing(folder):
    decoder = decoder_of(folder)
    torch.nn.init.normal_(decoder.out.weight)
    arguments = torch.randn(1, 64, 12), TREE.boxes(), TREE.level_ids(), torch.randn(1, 5, 8)
    plain = decoder(*arguments)
    add_lora(decoder, rank=4, alpha=8)
    torch.testing.assert_close(decoder(*arguments), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_lora_and_projections_learn(folder, dtype):
    decoder, before, _ = trained(folder, dtype)
    for name, parameter in decoder.named_parameters():
        frozen = name.startswith("llm.") and ".lora_" not in name
        assert parameter.requires_grad != frozen and torch.equal(parameter, before[name]) == frozen, name
        assert parameter.dtype is (dtype if frozen else torch.float32)


def test_a_checkpoint_holds_what_learns_and_the_statistics(folder):
    decoder, _, _ = trained(folder, steps=0)
    held = Learned(decoder).state_dict()
    assert set(held) == {n.replace(".", "/") for n, p in decoder.named_parameters() if p.requires_grad} | {"token_mean", "token_std"}
    changed = {name: torch.full_like(tensor, 0.5) for name, tensor in held.items()}
    Learned(decoder).load_state_dict(changed)  # they are the decoder's own tensors
    assert decoder.token_std.eq(0.5).all() and decoder.llm.layers[1].mlp.up_proj.lora_B["default"].weight.eq(0.5).all()


def test_the_merged_decoder_needs_no_peft_and_writes_the_same(folder):
    decoder, _, arguments = trained(folder)
    again = build_edit_decoder(decoder.config).eval()
    again.load_state_dict(merged_state(decoder))
    edited = decoder(*arguments)
    torch.testing.assert_close(again(*arguments), edited, rtol=1e-4, atol=1e-4)
    unmerged = {k: v for k, v in merged_state(decoder).items()}
    unmerged |= {k.replace(".base_layer.", "."): v for k, v in decoder.state_dict().items() if ".base_layer." in k}
    again.load_state_dict(unmerged)
    assert not torch.allclose(again(*arguments), edited, atol=1e-3), "the LoRA must have learnt something"


def test_a_decoder_without_lora_is_exported_as_it_is(folder):
    decoder = decoder_of(folder)
    state = merged_state(decoder)
    assert state.keys() == decoder.state_dict().keys()
    assert all(torch.equal(state[k], v) for k, v in decoder.state_dict().items())


def test_what_is_no_llm_is_refused(folder, tmp_path):
    from transformers import T5Config

    with pytest.raises(ValueError, match="no config.json.*such as Qwen3"):
        load_llm(tmp_path, torch.float32)
    T5Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_llm(tmp_path, torch.float32)
    with pytest.raises(ValueError, match="rank of at least 1, not 0"):
        add_lora(decoder_of(folder), rank=0, alpha=1)
