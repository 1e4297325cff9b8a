import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from semantic_diffusion_adapter.kernels.edit_decoder import MODES, T5EditDecoder, T5EditDecoderConfig, read_config
from semantic_diffusion_adapter.kernels.hierarchy import PRESETS, Hierarchy

TABLE = PRESETS["tree128"]


def toy(**fields) -> T5EditDecoderConfig:
    return T5EditDecoderConfig(**({"dim": 20, "text_dim": 12, "hierarchy": TABLE.to_json(), "width": 32, "heads": 2, "layers": 2} | fields))


@pytest.fixture
def decoder() -> T5EditDecoder:
    """With a random output head, since a new decoder copies its source."""
    torch.manual_seed(0)
    decoder = T5EditDecoder(toy()).eval()
    torch.nn.init.normal_(decoder.out.weight, std=0.2)
    decoder.set_token_statistics(torch.randn(20), torch.rand(20) * 3 + 0.5)
    return decoder


def inputs(preset: str = "tree64", batch: int = 2) -> tuple:
    table = PRESETS[preset]
    return torch.randn(batch, table.token_count, 20) * 2, table.boxes(), table.level_ids(), torch.randn(batch, 7, 12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_of_the_table_in_both_modes(decoder, preset, mode):
    arguments = inputs(preset)
    edited = decoder.generate(*arguments, mode=mode)
    assert edited.shape == arguments[0].shape and edited.dtype is torch.float32
    assert torch.equal(edited, decoder.generate(*arguments, mode=mode))  # deterministic


def test_an_untrained_decoder_copies_the_source():
    decoder, arguments = T5EditDecoder(toy()), inputs()
    for mode in MODES:
        torch.testing.assert_close(decoder.generate(*arguments, mode=mode), arguments[0])


@pytest.mark.parametrize("layers", [2, 12])
def test_cached_generation_equals_one_pass_over_its_own_output(layers):
    torch.manual_seed(0)
    decoder, arguments = T5EditDecoder(toy(layers=layers)).eval(), inputs("tree128")
    torch.nn.init.normal_(decoder.out.weight, std=0.2)
    written = decoder.generate(*arguments, mode="autoregressive")
    torch.testing.assert_close(decoder(*arguments, history=written), written, rtol=1e-4, atol=1e-4)


def test_parallel_generation_is_the_parallel_pass(decoder):
    arguments = inputs()
    torch.testing.assert_close(decoder.generate(*arguments, mode="parallel"), decoder(*arguments))


def test_a_token_reads_only_the_history_before_it(decoder):
    arguments, k = inputs("quad64"), 40
    history = torch.randn_like(arguments[0])
    changed = history.clone()
    changed[:, k] += 10
    difference = (decoder(*arguments, history=history) - decoder(*arguments, history=changed)).abs().amax((0, 2))
    assert difference[: k + 1].max() == 0 and difference[k + 1] > 1e-3


def test_parallel_mode_sees_tokens_on_both_sides(decoder):
    """Through self-attention, not only through the memory: the memory is kept as it was."""
    source, boxes, levels, instruction = inputs("quad64", batch=1)
    normed, place, memory = decoder._prepare(source, boxes, levels, instruction)
    seen = []
    for value in (0.0, 5.0):
        changed = normed.clone()
        changed[:, 40] += value
        steps = decoder._inputs(changed, place, decoder.query, 0)
        seen.append(decoder._run(steps, memory, memory.new_zeros(1, 1, 64, 64)).last_hidden_state)
    moved = (seen[0] - seen[1]).abs().amax((0, 2))
    assert moved[:40].max() > 1e-4 and moved[41:].max() > 1e-4


@pytest.mark.parametrize("mode", MODES)
def test_instruction_source_and_place_all_matter(decoder, mode):
    source, boxes, levels, instruction = inputs("tree112", batch=1)
    edited = decoder.generate(source, boxes, levels, instruction, mode=mode)
    others = [
        decoder.generate(source, boxes, levels, instruction + torch.randn_like(instruction), mode=mode),
        decoder.generate(source.roll(1, 1), boxes, levels, instruction, mode=mode).roll(-1, 1),
    ]
    for other in others:
        assert (edited - other).abs().max() > 1e-3


def test_the_residual_lives_in_normalised_space(decoder):
    """Rescaling the whole space, statistics included, rescales the result and nothing else."""
    source, *rest = inputs()
    edited = decoder.generate(source, *rest, mode="autoregressive")
    scale, shift = torch.rand(20) + 0.5, torch.randn(20)
    decoder.set_token_statistics(decoder.token_mean * scale + shift, decoder.token_std * scale)
    torch.testing.assert_close(
        decoder.generate(source * scale + shift, *rest, mode="autoregressive"), edited * scale + shift, rtol=1e-3, atol=1e-3
    )


def test_rows_of_the_table_are_found_from_boxes_and_levels(decoder):
    for preset in PRESETS.values():
        assert torch.equal(decoder.places.index(preset.boxes() + 1e-5, preset.level_ids()), preset.index_in(TABLE))
    fine = (TABLE.level_ids() == 2).nonzero().flatten()[8:20]  # some cells of one level only
    assert torch.equal(decoder.places.index(TABLE.boxes()[fine], TABLE.level_ids()[fine]), fine)


def test_tokens_without_a_place_are_refused(decoder):
    source, boxes, levels, instruction = inputs()
    moved = boxes.clone()
    moved[20] = torch.tensor([0.1, 0.0, 0.6, 0.5])
    with pytest.raises(ValueError, match="knows no cell from 10% to 60% across and 0% to 50% down on level 1.*before it is composed"):
        decoder.generate(source, moved, levels, instruction)
    with pytest.raises(ValueError, match="knows no cell from 0% to"):  # one token more than the cell holds
        decoder(torch.randn(2, 33, 20), TABLE.boxes()[:1].expand(33, 4), torch.zeros(33, dtype=torch.int64), instruction)


def test_arguments_that_do_not_fit_are_named(decoder):
    source, boxes, levels, instruction = inputs()
    with pytest.raises(ValueError, match=r"takes \[batch, boxes, 20\]"):
        decoder(source[..., :19], boxes, levels, instruction)
    with pytest.raises(ValueError, match=r"takes \[2, length, 12\]"):
        decoder(source, boxes, levels, instruction[:1])
    with pytest.raises(ValueError, match="history"):
        decoder(source, boxes, levels, instruction, history=source[:, 1:])
    with pytest.raises(ValueError, match="no edit mode 'fast'"):
        decoder.generate(source, boxes, levels, instruction, mode="fast")
    with pytest.raises(ValueError, match="20"):
        decoder.set_token_statistics(torch.zeros(20), torch.zeros(20))


def test_progress_counts_tokens_and_can_interrupt(decoder):
    arguments, calls = inputs("global16"), []
    decoder.generate(*arguments, mode="autoregressive", progress=lambda i, n: calls.append((i, n)))
    assert calls == [(i, 16) for i in range(1, 17)]
    calls.clear()
    decoder.generate(*arguments, mode="parallel", progress=lambda i, n: calls.append((i, n)))
    assert calls == [(16, 16)]

    def stop(i, n):
        if i == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        decoder.generate(*arguments, mode="autoregressive", progress=stop)


def test_gradients_reach_every_weight_over_both_modes(decoder):
    arguments = inputs()
    loss = decoder(*arguments).square().mean() + decoder(*arguments, history=torch.randn_like(arguments[0])).square().mean()
    loss.backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", MODES)
def test_half_precision_weights(decoder, mode, dtype):
    arguments = inputs("tree128")
    expected = decoder.generate(*arguments, mode=mode)
    edited = decoder.to(dtype).generate(*arguments, mode=mode)
    assert F.cosine_similarity(edited, expected, dim=-1).min() > 0.99


@pytest.mark.parametrize("history", [False, True])
def test_autocast_trains(decoder, history):
    arguments = inputs()
    history = torch.randn_like(arguments[0]) if history else None
    expected = decoder(*arguments, history=history)
    with torch.autocast("cpu", torch.bfloat16):
        edited = decoder(*arguments, history=history)
    edited.square().mean().backward()
    assert F.cosine_similarity(edited, expected, dim=-1).min() > 0.99


def test_config_and_weights_round_trip(decoder):
    config = decoder.config
    assert read_config(json.loads(json.dumps(config.to_json()))) == config
    again, arguments = T5EditDecoder(config), inputs()
    again.load_state_dict(load(save(decoder.state_dict())))
    for mode in MODES:
        assert torch.equal(again.generate(*arguments, mode=mode), decoder.generate(*arguments, mode=mode))
    assert not any("embed_tokens" in name for name in decoder.state_dict())
    with pytest.raises(ValueError, match="update the pack"):
        read_config(config.to_json() | {"future": 1})
    with pytest.raises(ValueError, match="divisor"):
        toy(heads=5)


def test_a_table_of_thirds_survives_half_precision():
    levels = Hierarchy.from_json([[1, 1, 2], [3, 3, 2]])
    decoder = T5EditDecoder(toy(hierarchy=levels.to_json())).to(torch.bfloat16)
    source = torch.randn(1, levels.token_count, 20)
    torch.testing.assert_close(decoder.generate(source, levels.boxes(), levels.level_ids(), torch.randn(1, 3, 12)), source)


def test_one_layer_at_flux_width():
    decoder = T5EditDecoder(toy(dim=4096, text_dim=4096, width=1024, heads=16, layers=1))
    table = PRESETS["global16"]
    source, instruction = torch.randn(1, 16, 4096), torch.randn(1, 5, 4096)
    for mode in MODES:
        assert decoder.generate(source, table.boxes(), table.level_ids(), instruction, mode=mode).shape == (1, 16, 4096)
