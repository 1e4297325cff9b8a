"""Encoders from local folders and files, against the libraries' own calls."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from semantic_diffusion_adapter.training.judge import metrics
from semantic_diffusion_adapter.training.judge.encoders import load_encoder

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["dino", "clip", "open_clip"])
def test_features_are_of_unit_length_for_pictures_of_any_size(encoders, photos, name):
    encoder = load_encoder(encoders[name], CPU)
    pictures = [photos["chelsea"], photos["astronaut"], photos["chelsea"]]
    features = encoder.images(pictures)
    assert features.shape == (3, 32 if name == "dino" else 16)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(3))
    assert metrics.cosine(features[:1], features[2:]).item() == pytest.approx(1)
    assert metrics.cosine(features[:1], features[1:2]).item() < 0.9999
    assert len(encoder.describe()["sha256"]) == 64 and encoder.reads == (name != "dino")


def test_transformers_features_are_the_librarys(encoders, photos):
    from transformers import CLIPModel, CLIPProcessor, ViTImageProcessor, ViTModel

    picture = Image.fromarray(photos["coffee"])
    vit = ViTModel.from_pretrained(encoders["dino"])
    pixels = ViTImageProcessor.from_pretrained(encoders["dino"])(picture, return_tensors="pt")
    with torch.no_grad():
        first = F.normalize(vit(**pixels).last_hidden_state[:, 0], dim=-1)
    torch.testing.assert_close(load_encoder(encoders["dino"], CPU).images([photos["coffee"]]), first)

    clip = CLIPModel.from_pretrained(encoders["clip"]).eval()
    words = ["a cat", "a much longer caption about two dogs"]
    given = CLIPProcessor.from_pretrained(encoders["clip"])(text=words, images=picture, return_tensors="pt", padding=True, truncation=True,
                                                            max_length=16)
    with torch.no_grad():
        out = clip(**given)
    ours = load_encoder(encoders["clip"], CPU)
    torch.testing.assert_close(ours.images([photos["coffee"]]), out.image_embeds)
    torch.testing.assert_close(ours.texts(words), out.text_embeds)


def test_open_clip_features_are_the_librarys(encoders, photos):
    import open_clip

    model, look = open_clip.create_model_from_pretrained(f"local-dir:{encoders['open_clip']}")
    ours = load_encoder(encoders["open_clip"], CPU)
    with torch.no_grad():
        picture = model.encode_image(look(Image.fromarray(photos["china"]))[None], normalize=True)
        words = model.encode_text(open_clip.get_tokenizer(f"local-dir:{encoders['open_clip']}")(["a temple"]), normalize=True)
    torch.testing.assert_close(ours.images([photos["china"]]), picture)
    torch.testing.assert_close(ours.texts(["a temple"]), words)


def test_the_packs_own_towers_serve_as_encoders(miniature, photos):
    for name, width in (("miniature_clip", 128), ("miniature_dinov2", 128)):
        encoder = load_encoder(miniature / "clip_vision" / f"{name}.safetensors", CPU)
        assert encoder.images([photos["china"], photos["flower"]]).shape == (2, width)
        assert not encoder.reads and encoder.describe()["kind"] == name.replace("_", "-")


def test_keys_are_the_last_layers_at_the_aspect_of_the_picture(encoders, photos, miniature):
    encoder = load_encoder(encoders["dino"], CPU)
    picture = photos["chelsea"]  # 451 x 300: 337 x 224 px, 21 x 14 patches and the class token
    keys = encoder.keys(picture)
    assert keys.shape == (1, 1 + 21 * 14, 32)
    assert metrics.structure_distance(keys, encoder.keys(picture)).item() == 0
    flipped = metrics.structure_distance(keys, encoder.keys(np.ascontiguousarray(picture[:, ::-1]))).item()
    assert flipped > 0

    seen = []
    encoder.model.layers[-1].attention.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True)
    again = encoder.keys(picture)
    torch.testing.assert_close(encoder.model.layers[-1].attention.k_proj(seen[0]), again)
    own = load_encoder(miniature / "clip_vision" / "miniature_dinov2.safetensors", CPU)
    assert own.keys(picture).shape == (1, 65, 128)


def test_a_place_without_an_encoder_is_named(encoders, miniature, tmp_path):
    with pytest.raises(ValueError, match="There is no encoder at .*nowhere: give a folder"):
        load_encoder(tmp_path / "nowhere", CPU)
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "config.json").write_text("{}", encoding="utf-8")
    (folder / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match="has no model.safetensors: download"):
        load_encoder(folder, CPU)
    (folder / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="pickled cannot be read"):
        load_encoder(folder, CPU)
    with pytest.raises(ValueError, match="'flux'.*'vision_tower' is needed"):
        load_encoder(miniature / "diffusion_models" / "miniature_flux.safetensors", CPU)
    for path in (encoders["clip"], miniature / "clip_vision" / "miniature_clip.safetensors"):
        with pytest.raises(ValueError, match="is no DINO, whose keys the structure distance reads"):
            load_encoder(path, CPU).keys(np.zeros((32, 32, 3), np.uint8))
