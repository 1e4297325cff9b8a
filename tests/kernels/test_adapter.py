import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from semantic_diffusion_adapter.kernels import checkpoint
from semantic_diffusion_adapter.kernels.adapter import Adapter, AdapterConfig, read_adapter, token_similarity
from semantic_diffusion_adapter.kernels.hierarchy import PRESETS, Hierarchy
from semantic_diffusion_adapter.kernels.rope import axis_dims, box_positions, patch_positions, rotary_angles, rotate
from semantic_diffusion_adapter.kernels.vision.fusion import Fusion
from semantic_diffusion_adapter.kernels.vision.known import KNOWN_TOWERS
from semantic_diffusion_adapter.kernels.vision.towers import TowerConfig


def tower(tower_id: str, size: int = 56, width: int = 24) -> TowerConfig:
    architecture = {"hidden_size": width, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": size, "patch_size": 14}
    return TowerConfig(tower_id, "dinov2", architecture, size, 14, width, (0.5,) * 3, (0.5,) * 3)


def toy(preset: str = "tree128", **fields) -> AdapterConfig:
    defaults = {"width": 32, "heads": 2, "layers": 2, "out_dim": 20}
    return AdapterConfig(PRESETS[preset].to_json(), (tower("a"), tower("b.v2", width=16)), **(defaults | fields))


def features(batch: int = 2) -> dict:
    return {"a": torch.randn(batch, 16, 24), "b.v2": torch.randn(batch, 16, 16)}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("preset", PRESETS)
def test_one_table_serves_every_preset(preset):
    adapter = Adapter(toy(pooled_dim=12))
    tokens, pooled = adapter(features(), PRESETS[preset])
    assert tokens.shape == (2, PRESETS[preset].token_count, 20) and pooled.shape == (2, 12)
    assert tokens.dtype is torch.float32


def test_the_whole_table_is_the_default():
    adapter, inputs = Adapter(toy()), features()
    assert torch.equal(adapter(inputs)[0], adapter(inputs, PRESETS["tree128"])[0])
    assert adapter(inputs)[1] is None


def test_absent_tokens_are_omitted_not_hidden():
    """A preset inside a bigger table gives what an adapter that only has the preset's queries gives."""
    big, small = Adapter(toy("tree128")), Adapter(toy("tree64"))
    state = big.state_dict()
    state["queries"] = state["queries"][PRESETS["tree64"].index_in(PRESETS["tree128"])]
    small.load_state_dict(state)
    inputs = features()
    torch.testing.assert_close(big(inputs, PRESETS["tree64"])[0], small(inputs)[0])
    # ... and self-attention makes the coarse tokens depend on whether fine ones are active.
    alone = big(inputs, PRESETS["global16"])[0]
    assert (alone - big(inputs, PRESETS["tree64"])[0][:, :16]).abs().max() > 1e-3


def test_a_hierarchy_outside_the_table_is_refused():
    with pytest.raises(ValueError, match="query table"):
        Adapter(toy("tree64"))(features(), PRESETS["tree128"])


def test_one_layer_against_attention_by_hand():
    adapter = Adapter(toy("quad64", layers=1)).double()
    table, grid, inputs = PRESETS["quad64"], (4, 4), {k: v.double() for k, v in features().items()}
    dims = axis_dims(16)
    angles = rotary_angles(box_positions(table.boxes(), table.level_ids(), grid), dims)
    patch_angles = rotary_angles(patch_positions(grid, 2), dims)
    layer = adapter.layers[0]

    def attend(a, x, memory, x_angles, memory_angles):
        def heads(t):
            return torch.stack(t.chunk(2, -1), 1)

        k, v = a.kv(memory).chunk(2, -1)
        q = rotate(F.normalize(heads(a.q(x)), dim=-1) * 16**0.5, x_angles)
        k = rotate(F.normalize(heads(k), dim=-1) * 16**0.5, memory_angles)
        out = ((q @ k.transpose(-1, -2)) / 4).softmax(-1) @ heads(v)
        return a.out(torch.cat(out.unbind(1), -1))

    patches = adapter.patch_norm(adapter.fusion(inputs))
    x = adapter.queries.expand(2, -1, -1)
    h = layer.self_norm(x)
    x = x + attend(layer.self_attention, h, h, angles, angles)
    x = x + attend(layer.cross_attention, layer.cross_norm(x), patches, angles, patch_angles)
    x = x + layer.mlp(x)
    expected = adapter.text_norm(adapter.head(adapter.norm(x)))
    torch.testing.assert_close(adapter(inputs)[0], expected.float(), rtol=1e-4, atol=1e-4)


def test_patches_are_told_apart_by_place_through_rotation_alone():
    adapter, inputs = Adapter(toy()), features(1)
    adapter.fusion.position.data.zero_()
    swapped = {k: v.flip(1) for k, v in inputs.items()}
    assert (adapter(inputs)[0] - adapter(swapped)[0]).abs().max() > 1e-3


def test_output_has_the_statistics_of_the_text_space():
    adapter = Adapter(toy())
    mean, std = torch.randn(20) * 3, torch.rand(20) * 5 + 0.1
    adapter.set_text_statistics(mean, std)
    tokens = adapter(features(4))[0]
    normed = (tokens - mean) / std
    torch.testing.assert_close(normed.mean(-1), torch.zeros(4, 128), atol=1e-5, rtol=0)
    torch.testing.assert_close(normed.var(-1, unbiased=False), torch.ones(4, 128), atol=1e-2, rtol=0)
    assert "text_mean" in adapter.state_dict()
    with pytest.raises(ValueError, match="20"):
        adapter.set_text_statistics(mean, torch.zeros(20))


def test_gradients_reach_every_weight_of_the_full_depth_and_only_active_queries():
    adapter = Adapter(toy(pooled_dim=4, layers=12))
    tokens, pooled = adapter(features(), PRESETS["tree64"])
    (tokens.square().sum() * 0.3 + tokens[..., 0].sum() + pooled.sum()).backward()
    for name, parameter in adapter.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    active = torch.zeros(128, dtype=torch.bool)
    active[PRESETS["tree64"].index_in(PRESETS["tree128"])] = True
    assert adapter.queries.grad[active].abs().sum(-1).min() > 0 and adapter.queries.grad[~active].abs().sum() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights(dtype):
    adapter, inputs = Adapter(toy(pooled_dim=8)).eval(), features()
    expected, expected_pooled = adapter(inputs)
    tokens, pooled = adapter.to(dtype)(inputs)
    assert F.cosine_similarity(tokens, expected, dim=-1).min() > 0.99
    assert F.cosine_similarity(pooled, expected_pooled, dim=-1).min() > 0.99


def test_autocast_trains():
    adapter, inputs = Adapter(toy()), features()
    expected = adapter(inputs)[0]
    with torch.autocast("cpu", torch.bfloat16):
        tokens = adapter(inputs)[0]
    tokens.square().mean().backward()
    assert F.cosine_similarity(tokens, expected, dim=-1).min() > 0.99


def test_config_and_weights_round_trip():
    config = toy(pooled_dim=3)
    assert AdapterConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    adapter, inputs = Adapter(config), features()
    again = Adapter(config)
    again.load_state_dict(load(save(adapter.state_dict())))
    assert torch.equal(adapter(inputs)[0], again(inputs)[0])
    with pytest.raises(ValueError, match="update the pack"):
        AdapterConfig.from_json(config.to_json() | {"future": 1})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 10**8}, "says 100000000 for 'layers'"), ({"layers": 256}, "lacks 'layers.2"), ({"width": 2**17}, "has shape|lacks"),
        ({"width": True}, "says True for 'width'"), ({"width": 24.0}, "says 24.0 for 'width'"), ({"heads": 5}, "cannot have 5 heads"),
        ({"heads": 16}, "head of 2 channels"), ({"towers": []}, "for 'towers'"), ({"towers": {}}, "for 'towers'"),
        ({"towers": [tower("a").to_json() | {"architecture": {"auto_map": {}}}]}, "architecture of vision tower 'a'"),
        ({"hierarchy": [[1, 1, 10**9]]}, "tokens must be at most"), ({"hierarchy": [[1, 1]]}, "lacks 'hierarchy.0.2'"),
        ({"hierarchy": [[True, 1, 4]]}, "says True for 'hierarchy.0.0'"), ({"hierarchy": [["1", 1, 4]]}, "says '1' for 'hierarchy.0.0'"),
        ({"hierarchy": [[1, 1, 60000]]}, "'queries' has shape"), ({"out_dim": None}, "for 'out_dim'"), ({"future": 1}, "update the pack"),
    ],
)  # fmt: skip
def test_a_record_that_asks_for_more_than_its_file_holds_is_refused_at_once(tmp_path, change, message):
    config = toy(layers=2)
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, Adapter(config).state_dict(), "adapter", config.to_json(), dtype=torch.int8)
    assert read_adapter(path)[0].config == config
    checkpoint.save(path, Adapter(config).state_dict(), "adapter", config.to_json() | change)
    with pytest.raises(ValueError, match=message) as caught:
        read_adapter(path)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


@pytest.mark.parametrize("fields", [{"hierarchy": [[1, 1, 4]]}, {"widths": {"text": 5, "pooled": None}}])
def test_a_record_that_says_two_things_is_refused(tmp_path, fields):
    config = toy(layers=1)
    checkpoint.save(tmp_path / "a.safetensors", Adapter(config).state_dict(), "adapter", config.to_json(), **fields)
    with pytest.raises(ValueError, match="says two things of its hierarchy or its text width"):
        read_adapter(tmp_path / "a.safetensors")


def test_towers_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"'a' \(4x4 patches\) and 'b' \(5x5 patches\).*56 px for 'b'"):
        Fusion((tower("a"), tower("b", size=70)), 8)
    with pytest.raises(ValueError, match="listed twice"):
        Fusion((tower("a"), tower("a")), 8)
    with pytest.raises(ValueError, match="at least one"):
        Fusion((), 8)
    adapter = Adapter(toy())
    with pytest.raises(ValueError, match="'b.v2' are missing"):
        adapter({"a": torch.randn(1, 16, 24)})
    with pytest.raises(ValueError, match=r"\[1, 25, 24\] instead of \[batch, 16, 24\]"):
        adapter(features(1) | {"a": torch.randn(1, 25, 24)})
    with pytest.raises(ValueError, match="divisor"):
        toy(heads=5)


def test_fusion_sums_towers_on_the_grid():
    fusion, inputs = Fusion((tower("a"), tower("b.v2", width=16)), 8), features(1)
    total = fusion(inputs)
    parts = [p(inputs[t.id]) for t, p in zip(fusion.towers, fusion.projections)]
    torch.testing.assert_close(total, parts[0] + parts[1] + fusion.position)


def test_one_layer_at_flux_width():
    towers = (KNOWN_TOWERS["dfn5b-vit-h-14-378"], KNOWN_TOWERS["dinov2-large-378"])
    adapter = Adapter(AdapterConfig(PRESETS["tree128"].to_json(), towers, layers=1, pooled_dim=768))
    inputs = {t.id: torch.randn(1, 729, t.width) for t in towers}
    with torch.no_grad():
        tokens, pooled = adapter(inputs)
    assert tokens.shape == (1, 128, 4096) and pooled.shape == (1, 768)


def test_similarity_against_brute_force():
    tokens = torch.randn(2, 5, 7)
    pairs = [F.cosine_similarity(e[i], e[j], dim=0) ** 2 for e in tokens for i in range(5) for j in range(5) if i != j]
    torch.testing.assert_close(token_similarity(tokens), torch.stack(pairs).mean())
    torch.testing.assert_close(token_similarity(torch.ones(1, 4, 3)), torch.tensor(1.0))
    torch.testing.assert_close(token_similarity(torch.eye(4)[None]), torch.tensor(0.0))
    assert token_similarity(torch.randn(2, 1, 3)) == 0


def test_any_list_of_levels_works():
    config = AdapterConfig([[1, 1, 3], [3, 2, 2]], (tower("a"),), width=32, heads=2, layers=1, out_dim=8)
    tokens, _ = Adapter(config)({"a": torch.randn(1, 16, 24)}, Hierarchy.from_json([[3, 2, 1]]))
    assert tokens.shape == (1, 6, 8)
