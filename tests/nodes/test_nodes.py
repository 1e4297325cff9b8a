"""The nodes as core sees them: schemas, folders, errors an artist can act on, memory that comes back."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import gc
import importlib
import os
import re
import sys
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("comfy.sd", reason="no ComfyUI here: set COMFYUI_PATH, or `python3 run.py test` makes one")

import comfy.ldm.flux.math  # noqa: E402
import comfy.ldm.flux.model  # noqa: E402
import comfy.ldm.modules.attention  # noqa: E402
import comfy.model_management  # noqa: E402
import comfy.utils  # noqa: E402
import folder_paths  # noqa: E402
import semantic_diffusion_adapter  # noqa: E402
from comfy_api.latest import ComfyExtension, io  # noqa: E402
from semantic_diffusion_adapter.kernels import algebra, regions  # noqa: E402
from semantic_diffusion_adapter.nodes import blend, decode, edit, encode, load, region, strength  # noqa: E402
from semantic_diffusion_adapter.nodes import miniature as miniature_node  # noqa: E402
from semantic_diffusion_adapter.nodes.host import folders, loading, miniature, text_encoder, versions  # noqa: E402

DOCS = Path(__file__).resolve().parents[2] / "web" / "docs"
# Frozen: renaming one of these breaks saved workflows. (id, inputs in widget order, output types)
BOX, INSTEAD = ["x", "y", "width", "height", "mode"], ["mask", "bboxes", "image"]  # of every node with a region
FROZEN = {
    "SDALoadVisionEncoders": (
        ["encoder_1", "model_1", "encoder_2", "model_2", "encoder_3", "model_3"], ["SDA_VISION"],
    ),
    "SDALoadAdapter": (["adapter"], ["SDA_ADAPTER"]),
    "SDALoadEditDecoder": (["edit_decoder"], ["SDA_EDIT_DECODER"]),
    "SDAEncodeImage": (["vision", "image"], ["SDA_FEATURES"]),
    "SDABuildEmbedding": (["adapter", "features", "preset"], ["SDA_EMBEDDING"]),
    "SDAEditEmbedding": (["embedding", "clip", "edit_decoder", "instruction", "mode"], ["SDA_EMBEDDING"]),
    "SDABlendEmbeddings": (["embedding_a", "embedding_b", "amount", "mode", "levels"], ["SDA_EMBEDDING"]),
    "SDAEmbeddingToConditioning": (["embedding", "text"], ["CONDITIONING"]),
    "SDAMaskedAttention": (["model", "strength", "start_percent", "end_percent", "token_mixing", "blocks"], ["MODEL"]),
    "SDAEditGuider": (["model", "source", "edited", "edit_strength", "negative", "cfg"], ["GUIDER"]),
    "SDAChangeMask": (
        ["model", "source", "edited", "latent", "threshold", "grow", "feather", "noises", "seed"], ["MASK", "MASK"],
    ),
    "SDAFlowEditGuider": (
        ["model", "source", "edited", "latent", "edit_strength", "n_avg", "seed", "cfg", "source_cfg", "negative", "mask"],
        ["GUIDER"],
    ),
    "SDAInversionEdit": (
        ["model", "source", "edited", "method", "omega", "eta", "eta_stop", "gamma", "cfg", "negative"], ["GUIDER", "SAMPLER"],
    ),
    "SDASourceGate": (
        ["model", "source", "latent", "strength", "lo", "hi", "text_gate", "start_percent", "end_percent", "blocks", "share",
         "mask"],
        ["MODEL"],
    ),
    "SDAReferenceGate": (
        ["model", "strength", "lo", "hi", "text_gate", "start_percent", "end_percent", "blocks", "mask"], ["MODEL"],
    ),
    "SDAAttributeEdit": (
        ["model", "clip", "attribute", "strength", "scale", "coarse", "mask_threshold", "start_percent", "end_percent", "blocks",
         "mask"],
        ["MODEL"],
    ),
    "SDAAttributeMask": (["model", "positive", "latent", "noises", "seed"], ["MASK"]),
    "SDARegionalPrompt": (["clip", "text", *BOX, "embedding", *INSTEAD], ["SDA_EMBEDDING"]),
    "SDARegions": (
        ["regions", "clip", "embedding", "image", "masks", "bboxes", *(f"other_{number}" for number in range(1, 17))],
        ["SDA_EMBEDDING", "MASK"],
    ),
    "SDAPlace": (["embedding", "other", *BOX, *INSTEAD], ["SDA_EMBEDDING"]),
    "SDACompose": (["embedding", "other", *BOX, *INSTEAD], ["SDA_EMBEDDING"]),
    "SDAEncodeRedux": (
        ["image", "style_model", "clip_vision", "preset", "whole", "quarters", "sixteenths"], ["SDA_EMBEDDING"],
    ),
    "SDAFitEmbedding": (
        ["model", "vae", "clip", "image", "preset", "prompt", "steps", "minutes", "rate", "order", "fit_pooled", "seed", "embedding"],
        ["SDA_EMBEDDING", "IMAGE"],
    ),
    "SDAFromStyleModel": (["style_model", "clip_vision_output", "preset"], ["SDA_EMBEDDING"]),
    "SDAStrength": (["embedding", "strength", "levels", "cells"], ["SDA_EMBEDDING"]),
    "SDAKeepOutsideMask": (["edited", "source", "mask", "feather"], ["SDA_EMBEDDING"]),
    "SDASaveEmbedding": (["embedding", "filename_prefix", "image"], []),
    "SDALoadEmbedding": (["file"], ["SDA_EMBEDDING", "IMAGE"]),
    "SDAPreviewEmbedding": (["embedding", "measure", "image", "compare", "change_map"], ["IMAGE"]),
    "SDAVisiblePatches": (["embedding", "latent", "level", "token"], ["MASK"]),
    "SDALoadMiniature": ([], ["MODEL", "CLIP", "VAE", "COMBO", "COMBO", "COMBO", "COMBO", "IMAGE", "MODEL"]),
}  # fmt: skip


@pytest.fixture
def extension(assets):
    return asyncio.run(semantic_diffusion_adapter.comfy_entrypoint())


@pytest.fixture
def node_list(extension):
    return asyncio.run(extension.get_node_list())


def test_ids_inputs_and_outputs_are_frozen(extension, node_list):
    assert isinstance(extension, ComfyExtension)
    found = {}
    for node in node_list:
        schema = node.GET_SCHEMA()
        found[schema.node_id] = ([i.id for i in schema.inputs], [o.io_type for o in schema.outputs])
    assert found == FROZEN


def test_v3_only():
    package = importlib.import_module("semantic_diffusion_adapter")
    assert not hasattr(package, "NODE_CLASS_MAPPINGS")
    assert os.path.isdir(os.path.join(os.path.dirname(package.__file__), package.WEB_DIRECTORY))


def test_everything_has_a_tooltip_and_a_name(node_list):
    for node in node_list:
        schema = node.GET_SCHEMA()
        assert schema.category == "semantic diffusion" and schema.display_name and schema.description.endswith(".")
        for part in [*schema.inputs, *schema.outputs]:
            assert part.tooltip and part.tooltip.endswith("."), f"{schema.node_id}: {part.id or part.display_name}"


def test_every_node_has_a_help_page_that_names_all_its_inputs_and_outputs(node_list):
    schemas = {schema.node_id: schema for schema in (node.GET_SCHEMA() for node in node_list)}
    assert {path.stem for path in DOCS.glob("*.md")} == set(schemas)
    shown = set()
    for name, schema in schemas.items():
        text = (DOCS / f"{name}.md").read_text(encoding="utf-8")
        assert text.startswith(f"# {schema.display_name}\n")
        ids = [i.id for i in schema.inputs] + [o.display_name for o in schema.outputs]
        ids = [re.sub(r"_([2-9]|1[0-5])$", "_1", id) for id in ids]  # `x_1` to `x_3` or to `x_16`
        assert [id for id in ids if f"`{id}`" not in text] == [], name
        shown |= set(re.findall(r"!\[[^\]]+\]\((\S+)\)", text))
    pictures = {path.name: path.stat().st_size for path in DOCS.glob("*.png")}
    assert set(pictures) == shown and max(pictures.values()) <= 12 * 1024


def test_fields_that_a_core_does_not_know_are_left_out():
    made = versions.schema(node_id="X", inputs=[], outputs=[], a_field_of_the_future=True)
    assert made.node_id == "X" and not hasattr(made, "a_field_of_the_future")


def test_combos_list_the_miniature(node_list):
    options = {
        (node.GET_SCHEMA().node_id, i.id): i.options
        for node in node_list for i in node.GET_SCHEMA().inputs if isinstance(i, io.Combo.Input)
    }  # fmt: skip
    assert "miniature_clip.safetensors" in options["SDALoadVisionEncoders", "encoder_1"]
    assert options["SDALoadVisionEncoders", "encoder_2"][0] == "none"
    assert "miniature_tree128.safetensors" in options["SDALoadAdapter", "adapter"]
    assert "miniature_editor.safetensors" in options["SDALoadEditDecoder", "edit_decoder"]


def test_registering_keeps_what_is_there_and_repeats_nothing(assets, monkeypatch):
    mine = copy.deepcopy(folder_paths.folder_names_and_paths)
    mine["semantic_adapters"], before = (["/elsewhere"], {".safetensors"}), copy.deepcopy(mine["clip_vision"])
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", mine)
    folders.register()
    folders.register()
    paths, _ = mine["semantic_adapters"]
    assert paths[0] == "/elsewhere" and len(paths) == len(set(paths)) == 3
    assert mine["clip_vision"] == before, "what is added to core's folder is offered by core's nodes"


def test_core_does_not_offer_the_towers_that_ours_does(assets):
    towers = {"miniature_clip.safetensors", "miniature_dinov2.safetensors"}
    assert not towers & set(folder_paths.get_filename_list("clip_vision"))
    assert towers <= set(folders.files("clip_vision"))
    assert folders.find("clip_vision", "miniature_clip.safetensors") == str(assets / "clip_vision" / "miniature_clip.safetensors")


def test_importing_changes_nothing_in_core():
    """The folders appear when the extension is created (in these tests: in a copy), and no method of core is replaced."""
    assert "semantic_adapters" not in folder_paths.folder_names_and_paths
    for name in ("forward", "forward_orig", "_forward", "process_img"):
        assert getattr(comfy.ldm.flux.model.Flux, name).__module__ == "comfy.ldm.flux.model"
    assert comfy.ldm.flux.math.attention.__module__ == "comfy.ldm.flux.math"
    assert comfy.ldm.modules.attention.optimized_attention.__module__ == "comfy.ldm.modules.attention"


def test_fingerprints_follow_the_files(assets, monkeypatch):
    path = assets / "semantic_adapters" / "miniature_tree128.safetensors"
    name, before = path.name, load.LoadAdapter.fingerprint_inputs(adapter=path.name)
    whole = miniature_node.LoadMiniature.fingerprint_inputs()
    assert before and before == load.LoadAdapter.fingerprint_inputs(adapter=name)
    state = path.stat()
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1_000_000_000))
    try:
        assert load.LoadAdapter.fingerprint_inputs(adapter=name) != before
        assert miniature_node.LoadMiniature.fingerprint_inputs() != whole
    finally:
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    # A linked name is not known when core asks.
    assert load.LoadAdapter.fingerprint_inputs() == "" and load.LoadVisionEncoders.fingerprint_inputs(model_1="x") == "||"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows stores no such name")
def test_a_name_that_the_page_may_take_for_html_is_not_offered(assets, tmp_path):
    for name in ("a", "<b>"):
        (tmp_path / f"{name}.safetensors").touch()
    folder_paths.folder_names_and_paths["semantic_adapters"][0].append(str(tmp_path))
    assert folders.files("semantic_adapters") == ["a.safetensors", "miniature_tree128.safetensors"]


def test_the_fingerprint_of_a_file_in_parts_follows_all_of_them(assets, tmp_path):
    files = [tmp_path / f"internvit-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    for file in files:
        file.touch()
    folder_paths.folder_names_and_paths["clip_vision"][0].append(str(tmp_path))
    ask = partial(load.LoadVisionEncoders.fingerprint_inputs, encoder_1=files[0].name)
    before = ask()
    assert before == ask()
    files[2].write_bytes(b"new")
    assert ask() != before
    files[1].unlink()
    assert ask()


def test_only_file_loaders_have_fingerprints(node_list):
    loaders = {n.GET_SCHEMA().node_id for n in node_list if n.fingerprint_inputs.__func__ is not io.ComfyNode.fingerprint_inputs.__func__}
    assert loaders == {"SDALoadVisionEncoders", "SDALoadAdapter", "SDALoadEditDecoder", "SDALoadEmbedding", "SDALoadMiniature"}


@pytest.fixture
def loaded(assets):
    """The small networks and an embedding, through the nodes."""
    (vision,) = load.LoadVisionEncoders.execute(
        encoder_1="miniature_dinov2.safetensors", model_1="from file", encoder_2="none", model_2="from file",
        encoder_3="miniature_clip.safetensors", model_3="from file",
    ).result  # fmt: skip
    (adapter,) = load.LoadAdapter.execute("miniature_tree128.safetensors").result
    (editor,) = load.LoadEditDecoder.execute("miniature_editor.safetensors").result
    (features,) = encode.EncodeImage.execute(vision, torch.rand(1, 32, 32, 3)).result
    (e,) = encode.BuildEmbedding.execute(adapter, features, "tree64").result
    clip = text_encoder.load_clip(str(assets / miniature.TEXT_ENCODER))
    return vision, adapter, editor, features, e, clip


def test_the_nodes_pass_their_widgets_on(loaded):
    _, adapter, editor, features, e, clip = loaded
    (full,) = encode.BuildEmbedding.execute(adapter, features, "full").result
    assert full.token_count == 128
    (edited,) = edit.EditEmbedding.execute(e, clip, editor, "a red circle", "autoregressive").result
    (mixed,) = blend.BlendEmbeddings.execute(e, edited, 0.25, "lerp", "1, 2").result
    assert torch.equal(mixed.tokens[:, :16], e.tokens[:, :16])
    assert torch.allclose(mixed.tokens[:, 16:], torch.lerp(e.tokens, edited.tokens, 0.25)[:, 16:])
    (positive,) = decode.EmbeddingToConditioning.execute(mixed).result
    assert positive[0][0].shape == (1, 64, 24)
    outputs = miniature_node.LoadMiniature.execute().result
    assert list(outputs[3:7]) == [
        "miniature_clip.safetensors", "miniature_dinov2.safetensors", "miniature_tree128.safetensors", "miniature_editor.safetensors",
    ]  # fmt: skip
    assert outputs[7].shape == (1, 128, 128, 3) and 0 <= outputs[7].min() <= outputs[7].max() <= 1
    (patched,) = decode.MaskedAttention.execute(outputs[0], 1.0, 0.0, 1.0, "all").result
    assert patched is not outputs[0]


def test_an_edit_keeps_regions_and_dials(loaded):
    _, _, editor, _, e, clip = loaded
    mask = torch.zeros(256, 256)
    mask[:, 128:] = 0.5
    confined = algebra.with_strength(regions.confine(e, mask), 0.5, levels={0})
    (edited,) = edit.EditEmbedding.execute(confined, clip, editor, "a red circle", "parallel").result
    assert not torch.equal(edited.tokens, confined.tokens)
    for name in ("boxes", "levels", "strengths", "masks", "masked_by"):
        assert torch.equal(getattr(edited, name), getattr(confined, name))


def test_an_llm_takes_the_edit_decoders_place(loaded, tmp_path):
    """Its file goes through the same nodes; they write what the network itself writes, in the one mode that it has."""
    from semantic_diffusion_adapter.kernels import checkpoint
    from semantic_diffusion_adapter.kernels.edit_decoder import LLMEditDecoder, LLMEditDecoderConfig

    *_, t5, _, e, clip = loaded
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    config = LLMEditDecoderConfig(24, 24, t5.module.config.hierarchy, {"model_type": "qwen2", **sizes})
    decoder = LLMEditDecoder(config).eval()
    torch.nn.init.normal_(decoder.out.weight, std=0.2)
    path = tmp_path / "llm.safetensors"
    checkpoint.save(path, decoder.state_dict(), "edit_decoder", config.to_json())

    editor = loading.load_edit_decoder(str(path))
    (edited,) = edit.EditEmbedding.execute(e, clip, editor, "a red circle", "parallel").result
    words = clip.encode_from_tokens(clip.tokenize("a red circle"))
    assert torch.equal(edited.tokens, decoder.generate(e.tokens, e.boxes, e.levels, words))
    assert not torch.allclose(edited.tokens, e.tokens, atol=0.1)
    with pytest.raises(ValueError, match=r"cannot write in the mode 'autoregressive': set the mode to parallel\.$"):
        edit.EditEmbedding.execute(e, clip, editor, "a red circle", "autoregressive")


def test_bad_input_is_one_sentence_with_a_remedy(loaded, assets):
    vision, adapter, editor, features, e, clip = loaded

    def refused(message, function, *arguments, **named):
        with pytest.raises(ValueError, match=message) as caught:
            function(*arguments, **named)
        assert str(caught.value).endswith(".") and "\n" not in str(caught.value)

    refused("models/semantic_adapters: put the file there", load.LoadAdapter.execute, "absent.safetensors")
    refused("models/edit_decoders", load.LoadEditDecoder.execute, "absent.safetensors")
    refused("kind 'adapter' where 'edit_decoder'", loading.load_edit_decoder, folders.find(*miniature.ADAPTER))
    clip_file = folders.find(*miniature.CLIP_ENCODER)
    refused("choose the matching file or another tower id", loading.load_vision_tower, clip_file, "dinov2-large-378")
    alone = {"miniature_clip": features["miniature_clip"]}
    refused("'miniature_dinov2' in Load Vision Encoders", encode.BuildEmbedding.execute, adapter, alone, "full")
    wrong = features | {"miniature_dinov2": torch.randn(1, 4, 99)}
    refused("expects 2x2 patches of width 12", encode.BuildEmbedding.execute, adapter, wrong, "full")
    refused("not in the query table", encode.BuildEmbedding.execute, adapter, features, [[3, 3, 1]])
    refused("instruction is empty", edit.EditEmbedding.execute, e, clip, editor, " \n", "parallel")
    foreign = dataclasses.replace(e, source={"style_model": "redux"})
    refused("does not come from one adapter", edit.EditEmbedding.execute, foreign, clip, editor, "a red circle", "parallel")
    (full,) = encode.BuildEmbedding.execute(adapter, features, "full").result
    refused("same preset", blend.BlendEmbeddings.execute, e, full, 0.5, "lerp", "all")
    refused("no level 7", blend.BlendEmbeddings.execute, e, e, 0.5, "lerp", "7")
    refused("levels 'one' are not numbers", blend.BlendEmbeddings.execute, e, e, 0.5, "lerp", "one")


def test_what_is_wrong_by_itself_is_told_when_queued(assets):
    """Core asks `validate_inputs` before a run; a linked value is None then."""

    def told(sentence, node, **widgets):
        answer = node.validate_inputs(**widgets)
        assert re.search(sentence, answer) and answer.endswith(".") and "\n" not in answer

    editor, scene = "miniature_editor.safetensors", "miniature_tree128.safetensors"
    told("models/semantic_adapters: put the file there .* Load Miniature", load.LoadAdapter, adapter="absent.safetensors")
    told("models/edit_decoders: put the file there", load.LoadEditDecoder, edit_decoder="absent.safetensors")
    told("models/clip_vision: put the file there .* help page", load.LoadVisionEncoders, encoder_2="absent.safetensors")
    told("No vision encoder is chosen", load.LoadVisionEncoders, encoder_1="none", encoder_2="none", encoder_3="none")
    told("No file of models/edit_decoders is chosen", load.LoadEditDecoder, edit_decoder="")
    folder_paths.folder_names_and_paths["semantic_adapters"][0].append(str(assets / "edit_decoders"))
    told("kind 'edit_decoder' where 'adapter' is needed", load.LoadAdapter, adapter=editor)
    told("levels 'one' are not numbers", blend.BlendEmbeddings, levels="one")
    told("levels 'one' are not numbers", strength.EmbeddingStrength, levels="one", cells="")
    told("1:0=3", strength.EmbeddingStrength, levels="all", cells="1:0=3")
    told("instruction is empty", edit.EditEmbedding, instruction=" ")
    told("prompt of a region is empty", region.RegionalPrompt, text="")
    told("must not be after end_percent", decode.MaskedAttention, start_percent=0.8, end_percent=0.2)

    assert load.LoadAdapter.validate_inputs(adapter=scene) is True and load.LoadAdapter.validate_inputs() is True
    assert load.LoadVisionEncoders.validate_inputs("miniature_clip.safetensors", "none", None) is True
    assert decode.MaskedAttention.validate_inputs(start_percent=0.8) is True
    assert strength.EmbeddingStrength.validate_inputs(levels="0,1", cells="1:0,0=0.5") is True


def test_a_public_file_asks_for_its_model(assets, tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "public.safetensors"
    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="does not say which encoder it is: choose its model"):
        loading.load_vision_tower(str(path), None)


def test_an_encoder_model_that_nobody_knows_is_refused(assets):
    """Core checks what is chosen in the widget, not what is linked to it."""
    widgets = {f"{what}_{slot}": value for slot in (1, 2, 3) for what, value in (("encoder", "none"), ("model", "from file"))}
    widgets |= {"encoder_1": "miniature_clip.safetensors", "model_1": "clip-vit-of-mine"}
    with pytest.raises(ValueError, match="no encoder model 'clip-vit-of-mine': write one of from file, "):
        load.LoadVisionEncoders.execute(**widgets)


def test_what_is_transparent_is_encoded_as_white(loaded):
    vision, *_ = loaded
    hidden = torch.tensor([1.0, 0.0, 0.0, 0.0]).expand(1, 32, 32, 4)
    seen, white = (encode.EncodeImage.execute(vision, image).result[0] for image in (hidden, torch.ones(1, 32, 32, 3)))
    assert seen.keys() == white.keys() and all(torch.equal(seen[name], white[name]) for name in white)


def test_a_nan_never_becomes_an_embedding(loaded):
    _, adapter, _, features, _, _ = loaded
    broken = {name: value * torch.nan for name, value in features.items()}
    with pytest.raises(ValueError, match="NaN"):
        encode.BuildEmbedding.execute(adapter, broken, "full")


def test_wrong_widths_name_the_partner(loaded, assets):
    import dataclasses

    _, _, editor, _, e, clip = loaded
    wide = dataclasses.replace(e, tokens=torch.cat([e.tokens, e.tokens], -1))
    with pytest.raises(ValueError, match="edits embeddings of width 24 and this one has 48"):
        edit.EditEmbedding.execute(wide, clip, editor, "a circle", "parallel")

    class OtherClip:
        def tokenize(self, text):
            return text

        def encode_from_tokens(self, tokens):
            return torch.zeros(1, 77, 768)

    with pytest.raises(ValueError, match="text of width 768 .* reads 24: connect the CLIP of the Flux model"):
        edit.EditEmbedding.execute(e, OtherClip(), editor, "a circle", "parallel")


def test_progress_is_shown_and_interruption_ends_the_work(loaded, monkeypatch):
    vision, _, editor, _, e, clip = loaded
    shown = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, preview, **kwargs: shown.append((value, total)))
    encode.EncodeImage.execute(vision, torch.rand(5, 32, 32, 3))
    assert shown[-1] == (4, 4), "two encoders, two chunks of images"
    shown.clear()
    edit.EditEmbedding.execute(e, clip, editor, "a circle", "autoregressive")
    # Newer cores leave some out between the first and the last.
    assert shown[0] == (1, 64) and shown[-1] == (64, 64) and shown == sorted(set(shown))

    def stop(value, total, preview, **kwargs):
        shown.append((value, total))
        comfy.model_management.interrupt_current_processing()

    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", stop)
    shown.clear()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        edit.EditEmbedding.execute(e, clip, editor, "a circle", "autoregressive")
    assert len(shown) == 1
    shown.clear()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        encode.EncodeImage.execute(vision, torch.rand(5, 32, 32, 3))
    assert len(shown) == 1


def test_memory_is_given_back(assets):
    adapter = loading.load_adapter(folders.find(*miniature.ADAPTER))
    adapter.ready()
    held = [entry.model for entry in comfy.model_management.current_loaded_models]
    assert any(patcher is adapter.patcher for patcher in held), "core must know of the network to make room"
    comfy.model_management.unload_all_models()
    assert not any(entry.model is adapter.patcher for entry in comfy.model_management.current_loaded_models)
    module = weakref.ref(adapter.module)
    del adapter, held
    gc.collect()
    assert module() is None
