"""The text encoder that reads instructions: the same numbers from every form in which it is published."""
from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install -e '.[training]'")

from semantic_diffusion_adapter.kernels import precision  # noqa: E402
from semantic_diffusion_adapter.training import cli  # noqa: E402
from semantic_diffusion_adapter.training.frozen import text_statistics as statistics  # noqa: E402
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
    encoder = load_instruction_encoder(folder / form, CPU, length=6, precision="fp32")
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
    shutil.copy(single, tmp_path / single.name)
    with pytest.raises(ValueError, match="no tokenizer beside .*t5xxl_fp16.safetensors; give the folder of T5's"):
        load_instruction_encoder(tmp_path / single.name, CPU)
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


def outputs(folder, texts) -> torch.Tensor:
    """[N, D] of the texts as the encoder reads them, each without padding."""
    from transformers import AutoTokenizer, T5EncoderModel

    words, encoder = AutoTokenizer.from_pretrained(folder / "tokenizer_2"), T5EncoderModel.from_pretrained(folder / "text_encoder_2").eval()
    with torch.no_grad():
        return torch.cat([encoder(**words(text, return_tensors="pt")).last_hidden_state[0] for text in texts])


@pytest.mark.parametrize("form", ["", "text_encoder_2", "t5xxl_fp16.safetensors"])
@pytest.mark.parametrize("count", [0, 3, 64])
def test_statistics_are_of_the_captions_and_where_they_are_few_of_prompts_too(published, monkeypatch, form, count):
    monkeypatch.setattr(precision, "fast_dtype", lambda device: torch.float32)
    folder, captions = published[0], ["remove the red dog", "a dog", "add"][:count] * (count // 3 or 1) + ["the dog"] * (count == 64)
    assert len(captions) == count
    expected = outputs(folder, captions if count == 64 else [*captions, *statistics.PROMPTS])
    mean, deviation = statistics.text_statistics(folder / form, captions)
    torch.testing.assert_close(mean, expected.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(deviation, expected.std(0), rtol=1e-4, atol=1e-5)
    assert mean.device == CPU


def test_the_command_writes_what_stands_in_for_the_encoder(published, tmp_path, capsys):
    folder, file = published[0], tmp_path / "text.safetensors"
    made = []
    for _ in range(2):  # anyone gets the same
        assert cli.main(["statistics", "--text", str(folder), "--to", str(file)]) == 0
        made.append(file.read_bytes())
    assert made[0] == made[1]
    for once, again in zip(statistics.text_statistics(file, []), statistics.text_statistics(folder, [])):
        torch.testing.assert_close(once, again)
    statistics.check_statistics(file, 24)
    assert cli.main(["statistics", "--text", str(file), "--to", str(tmp_path / "x")]) == 1
    assert "holds statistics already" in capsys.readouterr().err


def test_what_fits_no_base_is_refused_before_it_is_read(published, tmp_path):
    folder = published[0]
    for form in ("", "text_encoder_2", "t5xxl_fp16.safetensors"):
        statistics.check_statistics(folder / form, 24)
        with pytest.raises(ValueError, match="has texts of 24 channels and the base reads 4096"):
            statistics.check_statistics(folder / form, 4096)
    shutil.copytree(folder / "text_encoder_2", tmp_path / "text_encoder_2")
    with pytest.raises(ValueError, match="no tokenizer beside"):
        statistics.check_statistics(tmp_path, 24)
    (tmp_path / "text_encoder_2" / "config.json").unlink()
    with pytest.raises(ValueError, match="no T5 in"):
        statistics.check_statistics(tmp_path, 24)


def test_a_text_encoder_in_float8_is_what_it_stands_for(published, tmp_path):
    folder, expected = published
    state = load_file(folder / "t5xxl_fp16.safetensors")
    name = "encoder.block.1.layer.1.DenseReluDense.wo"
    scale = state[f"{name}.weight"].abs().max() / 448
    state |= {f"{name}.weight": (state[f"{name}.weight"] / scale).to(torch.float8_e4m3fn), f"{name}.scale_weight": scale,
              "scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}
    save_file(state, tmp_path / "t5xxl_fp8.safetensors")
    encoder = load_instruction_encoder(tmp_path / "t5xxl_fp8.safetensors", CPU, folder / "tokenizer_2", length=6, precision="fp32")
    assert torch.nn.functional.cosine_similarity(encoder(TEXTS), expected, dim=-1).min() > 0.99
