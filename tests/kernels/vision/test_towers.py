import dataclasses
import json

import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from semantic_diffusion_adapter.kernels.vision.known import KNOWN_TOWERS
from semantic_diffusion_adapter.kernels.vision.layouts import library_layout
from semantic_diffusion_adapter.kernels.vision.towers import TowerConfig, VisionTower, build_tower, load_tower

MEAN, STD = (0.4, 0.45, 0.5), (0.25, 0.2, 0.3)
INTERNVIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "attention_bias": True,
    "use_qk_norm": True,
    "image_size": [56, 56],
    "patch_size": [14, 14],
}


def toy(kind: str, layer: int = -1) -> TowerConfig:
    architecture = {
        "open_clip": {
            "embed_dim": 16,
            "quick_gelu": True,
            "vision_cfg": {"image_size": 56, "layers": 2, "width": 32, "head_width": 16, "patch_size": 14},
        },
        "dinov2": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 70, "patch_size": 14},
        "dinov2-reg": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": 14,
            "num_register_tokens": 4,
        },
        "internvit": INTERNVIT,
    }[kind]
    return TowerConfig(f"toy-{kind}", kind.removesuffix("-reg"), architecture, 56, 14, 32, MEAN, STD, layer=layer)


KINDS = ["open_clip", "dinov2", "dinov2-reg", "internvit"]


@pytest.mark.parametrize("layer", [-1, -2])
@pytest.mark.parametrize("kind", KINDS)
def test_one_feature_per_patch_for_any_image_size(kind, layer):
    tower = build_tower(toy(kind, layer))
    for height, width in ((56, 56), (33, 90)):
        assert tower(torch.rand(2, 3, height, width)).shape == (2, 16, 32)
    assert tower.grid == (4, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_the_librarys_own(kind):
    """Against each library's plain interface, fed with pixels prepared by hand; row-major, no prefix token left."""
    torch.manual_seed(0)
    tower = build_tower(toy(kind))
    image = torch.rand(1, 3, 56, 56)
    pixels = (image - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    if kind == "open_clip":
        tower.model.output_tokens = True
        expected = tower.model(pixels)[1]
    else:
        expected = tower.model(pixels).last_hidden_state[:, {"dinov2-reg": 5}.get(kind, 1) :]
    torch.testing.assert_close(tower(image), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_layer_before_the_last_feeds_the_last(kind):
    torch.manual_seed(0)
    config = toy(kind)
    last, before = build_tower(config), build_tower(dataclasses.replace(config, layer=-2))
    before.model.load_state_dict(last.model.state_dict())
    for parameter in before.blocks[-1].parameters():
        parameter.data.normal_()  # must not reach the layer before
    image = torch.rand(1, 3, 56, 56)
    caught = {}
    hook = last.blocks[-1].register_forward_pre_hook(lambda module, args: caught.setdefault("x", args[0]))
    last(image)
    hook.remove()
    torch.testing.assert_close(before(image), caught["x"][:, -16:])


def test_patches_keep_their_place():
    """Changing one patch of the image changes that row of the patch embedding first: row-major order."""
    tower = build_tower(dataclasses.replace(toy("dinov2-reg"), layer=-3))
    image = torch.zeros(1, 3, 56, 56)
    changed = image.clone()
    changed[:, :, 14:28, 42:56] = 1
    difference = (tower(changed) - tower(image)).abs().sum(-1)[0]
    assert difference.nonzero().flatten().tolist() == [1 * 4 + 3]


def test_resize_squashes_with_antialiasing_and_stays_in_range():
    tower = build_tower(toy("dinov2"))
    image = (torch.rand(1, 3, 200, 91) > 0.5).float()
    pixels = tower.preprocess(image) * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    expected = F.interpolate(image, (56, 56), mode="bicubic", antialias=True).clamp(0, 1)
    torch.testing.assert_close(pixels, expected, rtol=1e-5, atol=1e-5)
    assert pixels.min() >= -1e-6 and pixels.max() <= 1 + 1e-6


def test_an_image_with_alpha_is_refused():
    with pytest.raises(ValueError, match="drop the alpha"):
        build_tower(toy("dinov2"))(torch.rand(1, 4, 56, 56))


@pytest.mark.parametrize("kind", KINDS)
def test_json_and_weights_round_trip(kind):
    torch.manual_seed(0)
    tower = build_tower(toy(kind))
    config = TowerConfig.from_json(json.loads(json.dumps(tower.config.to_json())))
    assert config == tower.config
    again = load_tower(config, tower.model.state_dict())
    image = torch.rand(1, 3, 40, 40)
    assert torch.equal(again(image), tower(image))
    assert not any(t.is_meta for t in (*again.parameters(), *again.buffers()))


def test_a_whole_open_clip_file_loads_its_image_half():
    config = toy("open_clip")
    text = {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1}
    clip = open_clip.CLIP(text_cfg=text, **config.architecture).eval()
    tower = load_tower(config, clip.state_dict())
    clip.visual.output_tokens = True
    image = torch.rand(1, 3, 56, 56)
    torch.testing.assert_close(tower(image), clip.visual(tower.preprocess(image))[1])


def test_a_task_models_prefix_is_removed():
    tower = build_tower(toy("dinov2"))
    state = {f"dinov2.{name}": t for name, t in tower.model.state_dict().items()} | {"classifier.weight": torch.zeros(3, 64)}
    assert torch.equal(load_tower(tower.config, state)(torch.ones(1, 3, 56, 56)), tower(torch.ones(1, 3, 56, 56)))


def test_internvits_own_keys_load():
    """Forward of one block by hand from OpenGVLab's names, fused qkv included."""
    torch.manual_seed(0)
    config = TowerConfig("toy", "internvit", INTERNVIT | {"num_hidden_layers": 1}, 56, 14, 32, MEAN, STD)
    w = 32
    state = {
        "embeddings.class_embedding": torch.randn(1, 1, w),
        "embeddings.position_embedding": torch.randn(1, 17, w),
        "embeddings.patch_embedding.weight": torch.randn(w, 3, 14, 14) * 0.05,
        "embeddings.patch_embedding.bias": torch.randn(w),
    }
    block = {"attn.qkv.weight": (3 * w, w), "attn.qkv.bias": (3 * w,), "attn.q_norm.weight": (w,), "attn.k_norm.weight": (w,)}
    block |= {"attn.proj.weight": (w, w), "attn.proj.bias": (w,), "ls1": (w,), "ls2": (w,)}
    block |= {f"norm{i}.{part}": (w,) for i in (1, 2) for part in ("weight", "bias")}
    block |= {"mlp.fc1.weight": (64, w), "mlp.fc1.bias": (64,), "mlp.fc2.weight": (w, 64), "mlp.fc2.bias": (w,)}
    b = {name: torch.randn(shape) * 0.3 for name, shape in block.items()}
    tower = load_tower(config, state | {f"encoder.layers.0.{name}": t for name, t in b.items()})

    image = torch.rand(1, 3, 56, 56)
    x = F.conv2d(tower.preprocess(image), state["embeddings.patch_embedding.weight"], state["embeddings.patch_embedding.bias"], 14)
    x = torch.cat([state["embeddings.class_embedding"], x.flatten(2).transpose(1, 2)], 1) + state["embeddings.position_embedding"]
    h = F.layer_norm(x, (w,), b["norm1.weight"], b["norm1.bias"], 1e-6)
    q, k, v = F.linear(h, b["attn.qkv.weight"], b["attn.qkv.bias"]).chunk(3, -1)
    q, k = (F.rms_norm(t, (w,), b[f"attn.{n}_norm.weight"], 1e-6) for t, n in ((q, "q"), (k, "k")))
    q, k, v = (t.unflatten(-1, (2, 16)).transpose(1, 2) for t in (q, k, v))
    a = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    x = x + b["ls1"] * F.linear(a, b["attn.proj.weight"], b["attn.proj.bias"])
    h = F.gelu(F.linear(F.layer_norm(x, (w,), b["norm2.weight"], b["norm2.bias"], 1e-6), b["mlp.fc1.weight"], b["mlp.fc1.bias"]))
    x = x + b["ls2"] * F.linear(h, b["mlp.fc2.weight"], b["mlp.fc2.bias"])
    torch.testing.assert_close(tower(image), x[:, 1:], rtol=1e-4, atol=1e-4)


def test_a_wrong_file_is_one_sentence():
    dino = build_tower(toy("dinov2"))
    with pytest.raises(ValueError, match="toy-open_clip.*lacks 'class_embedding' and .* more differences; choose"):
        load_tower(toy("open_clip"), dino.model.state_dict())
    state = dino.model.state_dict()
    state["layernorm.weight"] = torch.ones(7)
    with pytest.raises(ValueError, match=r"'layernorm.weight' of shape \[7\] instead of \[32\]"):
        load_tower(dino.config, state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_weights(kind, dtype):
    torch.manual_seed(0)
    tower = build_tower(toy(kind))
    image = torch.rand(1, 3, 40, 40)
    with torch.no_grad():
        expected = tower(image)
        features = load_tower(tower.config, {k: v.to(dtype) for k, v in tower.model.state_dict().items()})(image)
    assert features.dtype is dtype
    assert F.cosine_similarity(features.float(), expected, dim=-1).min() > 0.99


def test_a_file_of_mixed_dtypes_gives_one_dtype():
    tower = build_tower(toy("internvit"))
    mixed = {name: t if t.ndim > 1 else t.half() for name, t in tower.model.state_dict().items()}
    features = load_tower(tower.config, mixed)(torch.rand(1, 3, 56, 56))
    assert features.dtype is torch.float32


@pytest.mark.parametrize("tower_id", KNOWN_TOWERS)
def test_published_towers_have_their_true_shape(tower_id):
    """Built on the meta device: full width and depth, no memory. Parameters in millions as published."""
    config = KNOWN_TOWERS[tower_id]
    with torch.device("meta"):
        tower = VisionTower(config)
        features = tower(torch.rand(1, 3, 64, 64))
    side = {378: 27, 448: 32, 512: 32}[config.image_size]
    assert tower.grid == (side, side) and features.shape == (1, side * side, config.width)
    millions = {"dfn5b": 632, "siglip2": 428, "dinov2-large": 304, "dinov2-giant": 1136, "dinov2-reg-large": 304}
    millions |= {"dinov2-reg-giant": 1136, "internvit-300m": 304, "internvit-6b": 5536}
    published = next(count for name, count in millions.items() if tower_id.startswith(name))
    assert sum(p.numel() for p in tower.parameters()) // 10**6 == published
    assert TowerConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize(
    ("tower_id", "model"),
    [("dfn5b-vit-h-14-378", "ViT-H-14-378-quickgelu"), ("siglip2-so400m-16-512", "ViT-SO400M-16-SigLIP2-512")],
)
def test_open_clip_towers_follow_open_clips_own_configs(tower_id, model):
    theirs = open_clip.get_model_config(model)
    ours = KNOWN_TOWERS[tower_id].architecture
    assert ours["vision_cfg"] == theirs["vision_cfg"] and ours["embed_dim"] == theirs["embed_dim"]
    assert ours.get("quick_gelu", False) == theirs.get("quick_gelu", False)
    tag = {"dfn5b-vit-h-14-378": ("ViT-H-14-378", "dfn5b")}.get(tower_id, (model, "webli"))
    preprocess = open_clip.pretrained.get_pretrained_cfg(*tag)
    config = KNOWN_TOWERS[tower_id]
    assert (config.mean, config.std, config.resize) == (preprocess["mean"], preprocess["std"], preprocess["resize_mode"])


def test_impossible_configs_are_refused():
    with pytest.raises(ValueError, match="unknown kind 'resnet'"):
        dataclasses.replace(toy("dinov2"), kind="resnet")
    with pytest.raises(ValueError, match="use 56 px"):
        dataclasses.replace(toy("dinov2"), image_size=60)
    with pytest.raises(ValueError, match="update the pack"):
        TowerConfig.from_json(toy("dinov2").to_json() | {"future": 1})


SIGLIP = KNOWN_TOWERS["siglip2-so400m-16-512"].architecture


@pytest.mark.parametrize(
    ("kind", "architecture", "field"),
    [
        ("open_clip", SIGLIP | {"vision_cfg": SIGLIP["vision_cfg"] | {"timm_model_name": "hf-hub:owner/model"}}, "timm_model_name"),
        ("open_clip", SIGLIP | {"vision_cfg": SIGLIP["vision_cfg"] | {"timm_model_name": "local-dir:/tmp"}}, "timm_model_name"),
        ("open_clip", SIGLIP | {"vision_cfg": SIGLIP["vision_cfg"] | {"timm_model_name": "resnet50"}}, "timm_model_name"),
        ("open_clip", SIGLIP | {"vision_cfg": SIGLIP["vision_cfg"] | {"timm_model_pretrained": True}}, "timm_model_pretrained"),
        ("open_clip", SIGLIP | {"vision_cfg": SIGLIP["vision_cfg"] | {"hf_model_name": "owner/model"}}, "hf_model_name"),
        ("open_clip", SIGLIP | {"text_cfg": {"hf_model_name": "owner/model"}}, "text_cfg"),
        ("open_clip", {"embed_dim": 16, "vision_cfg": 3}, "vision_cfg"),
        ("dinov2", toy("dinov2").architecture | {"_attn_implementation": "owner/kernel"}, "_attn_implementation"),
        ("dinov2", toy("dinov2").architecture | {"auto_map": {"AutoModel": "a--b.C"}}, "auto_map"),
        ("dinov2", toy("dinov2").architecture | {"num_hidden_layers": 10**8}, "num_hidden_layers"),
        ("dinov2", toy("dinov2").architecture | {"hidden_size": 32.0}, "hidden_size"),
        ("internvit", INTERNVIT | {"attn_implementation": "owner/kernel"}, "attn_implementation"),
        ("internvit", INTERNVIT | {"norm_type": "owner/norm"}, "norm_type"),
    ],
)
def test_what_is_no_architecture_is_refused_by_name(kind, architecture, field):
    """A file may come from anybody: it names no model to fetch, no folder, no code."""
    config = TowerConfig("a", kind, architecture, 56, 14, 32, MEAN, STD)
    for function in (build_tower, lambda config: load_tower(config, {})):
        with pytest.raises(ValueError, match=f"The architecture of vision tower 'a'.*{field}") as caught:
            function(config)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("change", [{"layer": -4}, {"patch": 7}, {"patch": 28}, {"width": 31}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_record_that_belies_its_network_is_refused(kind, change):
    tower = build_tower(toy(kind))
    with pytest.raises(ValueError, match="does not give .* patches of width .*, as its record says: export the file again"):
        load_tower(dataclasses.replace(tower.config, **change), tower.model.state_dict())


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"id": 7}, "'id'"), ({"image_size": 56.0}, "'image_size'"), ({"image_size": 10**9}, "'image_size'"), ({"patch": 0}, "'patch'"),
        ({"mean": [0.5, 0.5, "x"]}, "'mean.2'"), ({"std": [0.0, 0.5, 0.5]}, "'std.0'"), ({"layer": 0}, "'layer'"),
        ({"architecture": []}, "'architecture'"),
        ({"layer": True}, "'layer'"), ({"kind": None}, "'kind'"),
    ],
)  # fmt: skip
def test_words_of_a_record_are_typed_and_bounded(change, field):
    with pytest.raises(ValueError, match=f"The vision tower record says .* for {field}.*: download or export"):
        TowerConfig.from_json(toy("dinov2").to_json() | change)


def test_weights_of_no_floating_dtype_are_refused():
    tower = build_tower(toy("dinov2"))
    state = tower.model.state_dict()
    state["layernorm.weight"] = state["layernorm.weight"].to(torch.int32)
    with pytest.raises(ValueError, match="'layernorm.weight' as torch.int32"):
        load_tower(tower.config, state)


@pytest.mark.parametrize("gated", [False, True])
def test_dinov2_loads_under_the_names_of_every_release(tmp_path, gated):
    """The published names, which the library itself writes, and those that newer releases hold in memory; both ways."""
    torch.manual_seed(0)
    config = toy("dinov2-reg")
    config = dataclasses.replace(config, architecture=config.architecture | {"use_swiglu_ffn": gated})
    tower = build_tower(config)
    tower.model.save_pretrained(tmp_path)
    published = load_file(tmp_path / "model.safetensors")
    assert any("attention.attention.query" in name for name in published)
    images = torch.rand(1, 3, 56, 56)
    newer = library_layout("dinov2", published, ["encoder.layer.0.attention.q_proj.weight"])
    older = library_layout("dinov2", newer, ["encoder.layer.0.attention.attention.query.weight"])
    assert older.keys() == published.keys() and all(torch.equal(older[name], published[name]) for name in published)
    assert not newer.keys() & {name for name in older if "attention.attention" in name or "weights_" in name}
    for state in (published, newer, older):
        assert torch.equal(load_tower(config, state)(images), tower(images))
