"""The text encoder that reads instructions: the same numbers from every form in which it is published."""
from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install -e '.[training]'")

from semantic_diffusion_adapter.kernels import precision  # noqa: E402
from semantic_diffusion_adapter.training.frozen.text import load_instruction_encoder  # noqa: E402

CPU = torch.device("cpu")
WORDS = ["<pad>", "</s>", "<unk>", "add", "remove", "the", "a", "dog", "red"]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A FLUX.1 folder of toy width: text_encoder_2 and tokenizer_2, and the encoder as ComfyUI's single file beside them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("flux")
    config = T5Config(vocab_size=12, d_model=24, d_kv=6, d_ff=40, num_layers=3, num_heads=2, feed_forward_proj="gated-gelu",
                      pad_token_id=0, eos_token_id=1)
    encoder = T5EncoderModel(config).eval()
    encoder.save_pretrained(folder / "text_encoder_2")
    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>").save_pretrained(
        folder / "tokenizer_2")
    state = {k: v.clone() for k, v in encoder.state_dict().items() if k != "encoder.embed_tokens.weight"}
    save_file(state, folder / "t5xxl_fp16.safetensors")
    ids = torch.tensor([[4, 5, 7, 1, 0, 0], [3, 6, 8, 7, 1, 0]])
    with torch.no_grad():
        expected = encoder(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    return folder, expected


TEXTS = ["remove the dog", "add a red dog"]


@pytest.mark.parametrize("form", ["", "text_encoder_2", "t5xxl_fp16.safetensors"])
def test_every_form_gives_flux_s_own_encoding_padding_unmasked(published, form):
    folder, expected = published
    tokenizer = folder / "tokenizer_2" if form.endswith("safetensors") else None
    encoder = load_instruction_encoder(folder / form, CPU, tokenizer, length=6, precision="fp32")
    assert encoder.width == 24
    torch.testing.assert_close(encoder(TEXTS), expected)
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters())


def test_int8_is_near_and_half_as_large(published):
    pytest.importorskip("torchao", reason="torchao is not installed: pip install -e '.[training]'")
    folder, expected = published
    encoder = load_instruction_encoder(folder, CPU, length=6, precision="int8")
    assert torch.nn.functional.cosine_similarity(encoder(TEXTS).float(), expected, dim=-1).min() > 0.99
    assert all("Int8" in type(b.layer[1].DenseReluDense.wo.weight.data).__name__ for b in encoder.model.encoder.block)


@pytest.mark.parametrize("fast", [torch.bfloat16, torch.float32], ids=str)
def test_padded_and_cut_to_its_length_and_held_in_what_is_fast(published, monkeypatch, fast):
    monkeypatch.setattr(precision, "fast_dtype", lambda device: fast)
    encoder = load_instruction_encoder(published[0], CPU)
    assert encoder(TEXTS).shape == (2, 256, 24) and encoder([""]).dtype is fast
    short = load_instruction_encoder(published[0], CPU, length=3)
    assert short(["remove the red dog"]).shape == (1, 3, 24)


def test_the_encoder_is_told_by_its_weights(published, tmp_path):
    folder, _ = published
    one = load_instruction_encoder(folder, CPU).hash
    assert one == load_instruction_encoder(folder / "text_encoder_2", CPU).hash
    state = load_file(folder / "t5xxl_fp16.safetensors")
    save_file(state | {"encoder.final_layer_norm.weight": state["encoder.final_layer_norm.weight"] * 2}, tmp_path / "other.safetensors")
    files = (folder / "t5xxl_fp16.safetensors", tmp_path / "other.safetensors")
    assert len({load_instruction_encoder(file, CPU, folder / "tokenizer_2").hash for file in files}) == 2


def test_the_miniature_s_own_encoder(toy_text, tmp_path):
    from semantic_diffusion_adapter.training.miniature.text import encode, load_text_encoder, token_ids

    encoder = load_instruction_encoder(toy_text, CPU)
    words = ["remove the red circle"]
    assert torch.equal(encoder(words), encode(load_text_encoder(toy_text, CPU), token_ids(words))[0])


@pytest.fixture
def toy_text(tmp_path):
    from semantic_diffusion_adapter.training.miniature.text import build_text_encoder, save_text_encoder

    save_text_encoder(tmp_path / "t5.safetensors", build_text_encoder(), 0)
    return tmp_path / "t5.safetensors"


def test_what_is_missing_is_said(published, tmp_path):
    folder, _ = published
    single = folder / "t5xxl_fp16.safetensors"
    with pytest.raises(ValueError, match="no text encoder at .*gone; give FLUX.1's T5"):
        load_instruction_encoder(tmp_path / "gone", CPU)
    with pytest.raises(ValueError, match="no tokenizer beside .*t5xxl_fp16.safetensors; give the folder of T5's"):
        load_instruction_encoder(single, CPU)
    with pytest.raises(ValueError, match=f"no tokenizer in {tmp_path}"):
        load_instruction_encoder(single, CPU, tmp_path)
    with pytest.raises(ValueError, match="no T5 in "):
        load_instruction_encoder(tmp_path, CPU)
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="no plain T5 v1.1 encoder; give ComfyUI's t5xxl_fp16"):
        load_instruction_encoder(tmp_path / "x.safetensors", CPU, folder / "tokenizer_2")
    state = load_file(single)
    del state["encoder.block.1.layer.1.DenseReluDense.wo.weight"]
    save_file(state, tmp_path / "cut.safetensors")
    with pytest.raises(ValueError, match="no plain T5 v1.1 encoder .*wo.weight"):
        load_instruction_encoder(tmp_path / "cut.safetensors", CPU, folder / "tokenizer_2")
    narrow = {k: v for k, v in load_file(single).items()} | {"shared.weight": torch.zeros(5, 24)}
    save_file(narrow, tmp_path / "narrow.safetensors")
    with pytest.raises(ValueError, match="has 9 words and the text encoder .* 5; give its own"):
        load_instruction_encoder(tmp_path / "narrow.safetensors", CPU, folder / "tokenizer_2")
