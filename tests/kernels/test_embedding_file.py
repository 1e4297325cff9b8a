"""A saved embedding comes back as it was, and every refusal is one sentence that leaves the folder as it was."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from semantic_diffusion_adapter.kernels import checkpoint, embedding_file
from semantic_diffusion_adapter.kernels.embedding import MASK_SIDE, SemanticEmbedding, from_hierarchy
from semantic_diffusion_adapter.kernels.hierarchy import PRESETS

THIRDS = torch.tensor([[0.0, 0.0, 1 / 3, 1.0], [1 / 3, 0.0, 1.0, 2 / 3]])


def embedding(**changes) -> SemanticEmbedding:
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(2, MASK_SIDE, MASK_SIDE)
    masks[0, :, :100], masks[1, 50:] = 1, 0.5
    made = SemanticEmbedding(
        tokens=torch.randn(3, 2, 8, generator=generator),
        boxes=THIRDS,
        levels=torch.tensor([0, 4]),
        strengths=torch.tensor([-torch.inf, math.log(0.3)]),
        pooled=torch.randn(3, 5, generator=generator),
        source={"adapter": "a.safetensors", "edits": ["remove the \u732b"], "pooled_width": 5},
        masks=masks,
        masked_by=torch.tensor([1, -1]),
        schedule=torch.tensor([[0.0, 1.0], [0.2, 0.3]]),
    )
    return dataclasses.replace(made, **changes)


def test_round_trip(tmp_path):
    path, made = tmp_path / "deep" / "a.safetensors", embedding()
    embedding_file.save(path, made, b"a jpeg", {"workflow": "{}", "sda": "somebody else's"})
    embedding_file.check(path)
    loaded, thumbnail = embedding_file.load(path)
    assert thumbnail == b"a jpeg" and loaded.source == made.source
    for name in ("boxes", "levels", "strengths", "masked_by", "schedule"):
        assert torch.equal(getattr(loaded, name), getattr(made, name)), name
    for name in ("tokens", "pooled"):
        assert torch.equal(getattr(loaded, name), getattr(made, name).half().float()), name
    assert torch.equal(loaded.masks[0], made.masks[0])
    assert (loaded.masks - made.masks).abs().max() <= 0.501 / 255
    assert [file.name for file in path.parent.iterdir()] == ["a.safetensors"], "a temporary file was left behind"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        assert file.get_tensor("tokens").dtype == torch.float16 and file.get_tensor("masks").dtype == torch.uint8
    assert metadata["workflow"] == "{}"
    record = json.loads(metadata["sda"])
    assert record["kind"] == "embedding" and record["widths"] == {"text": 8, "pooled": 5}
    assert record["config"] == {"batch": 3, "tokens": 2}


def test_what_is_absent_stays_absent(tmp_path):
    path = tmp_path / "a.safetensors"
    embedding_file.save(path, embedding(pooled=None, masks=None, masked_by=None, schedule=None))
    loaded, thumbnail = embedding_file.load(path)
    assert loaded.pooled is loaded.masks is loaded.masked_by is loaded.schedule is thumbnail is None


def test_128_tokens_of_flux_are_one_mebibyte_and_keep_their_hierarchy(tmp_path):
    path = tmp_path / "a.safetensors"
    embedding_file.save(path, from_hierarchy(torch.randn(1, 128, 4096), PRESETS["tree128"]))
    assert 0 <= path.stat().st_size - 2**20 < 2**13
    assert embedding_file.load(path)[0].hierarchy() == PRESETS["tree128"]


def test_values_too_large_for_half_precision_are_kept(tmp_path):
    made = embedding(tokens=torch.full((3, 2, 8), 1e6), pooled=None)
    embedding_file.save(tmp_path / "a.safetensors", made)
    assert torch.equal(embedding_file.load(tmp_path / "a.safetensors")[0].tokens, made.tokens)


def test_the_file_may_change_after_loading(tmp_path):
    path = tmp_path / "a.safetensors"
    embedding_file.save(path, embedding())
    loaded, _ = embedding_file.load(path)
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert torch.equal(loaded.boxes, THIRDS) and torch.equal(loaded.levels, torch.tensor([0, 4]))


@pytest.mark.parametrize("thumbnail", ["not base 64!", 7])
def test_a_damaged_thumbnail_is_no_reason_to_refuse(tmp_path, thumbnail):
    path = tmp_path / "a.safetensors"
    write(path, said={"thumbnail": thumbnail})
    assert embedding_file.load(path)[1] is None


def write(path, without=(), said=None, **changes):
    """An embedding file by other means than ours, without a digest. said: further or other entries of the record."""
    e = embedding()
    tensors = {name: getattr(e, name) for name in ("tokens", "boxes", "levels", "pooled")} | {"strengths": torch.zeros(2)} | changes
    kept = {name: tensor for name, tensor in tensors.items() if name not in without}
    record = {
        "format_version": 1, "kind": "embedding", "config": {"batch": 3, "tokens": 2}, "widths": {"text": 8, "pooled": 5}, "source": {},
    } | (said or {})  # fmt: skip
    save_file(kept, path, metadata={checkpoint.RECORD_KEY: json.dumps(record)})


def test_refusals_are_one_sentence(tmp_path):
    path = tmp_path / "a.safetensors"

    def refused(message, function=embedding_file.load):
        with pytest.raises(ValueError, match=message) as caught:
            function(path)
        text = str(caught.value)
        assert text.endswith(".") and "\n" not in text

    def refused_early(message):
        refused(message)
        refused(message, embedding_file.check)

    refused_early("no checkpoint at")
    embedding_file.save(path, embedding())
    whole = path.read_bytes()
    for length in (len(whole) - 1, 100, 5):
        path.write_bytes(whole[:length])
        refused_early("cut short" if length > 8 else "not a safetensors file")
    checkpoint.save(path, {"x": torch.ones(2)}, "vae", {})
    refused_early("kind 'vae' where 'embedding' is needed")
    path.write_bytes(whole.replace(b'\\"format_version\\": 1', b'\\"format_version\\": 2'))
    refused_early("format version 2 .*update the pack")
    save_file({"x": torch.ones(2)}, path)
    refused_early("no Semantic Diffusion Adapter record")
    write(path, tokens=torch.full((3, 2, 8), torch.nan))
    refused("'tokens' .* NaN")
    write(path, boxes=THIRDS * torch.nan)
    refused("'boxes' .* NaN")
    write(path, levels=torch.tensor([0, 10**9]))
    refused("level of the embedding is 1000000000")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"without": ["levels"]}, "lacks 'levels'"),
        ({"without": ["pooled"]}, "lacks 'pooled'"),
        ({"said": {"widths": {"text": 8, "pooled": None}}}, "tensor 'pooled', which its record does not speak of"),
        ({"pooled": torch.ones(3, 5, dtype=torch.int64)}, r"'pooled' .* is I64 \[3, 5\] where its record implies F16 or F32"),
        ({"boxes": THIRDS[:1]}, r"'boxes' .* is F32 \[1, 4\] where"),
        ({"tokens": torch.ones(3, 2, 8, dtype=torch.int64)}, "'tokens' .* is I64"),
        ({"tokens": torch.ones(3, 2, 8, dtype=torch.bfloat16)}, "'tokens' .* is BF16"),
        ({"masked_by": torch.zeros(2, dtype=torch.int64)}, "lacks 'masks'"),
        ({"extra": torch.ones(2)}, "tensor 'extra'"),
        ({"schedule": torch.zeros(3, 2)}, r"'schedule' .* is F32 \[3, 2\] where"),
        ({"said": {"config": {"batch": 3, "tokens": 10**9}}}, "says 1000000000 for 'config.tokens'"),
        ({"said": {"config": {"batch": 3}}}, "lacks 'config.tokens'"),
        ({"said": {"widths": {"text": 8}}}, "lacks 'widths.pooled'"),
        ({"said": {"widths": 5}}, "says 5 for 'widths'"),
        ({"said": {"source": "me"}}, "says 'me' for 'source'"),
        ({"said": {"source": {"edits": 3}}}, "says 3 for 'source.edits'"),
        ({"said": {"source": {"pooled_width": True}}}, "says True for 'source.pooled_width'"),
    ],
)
def test_a_record_and_tensors_that_disagree_are_refused_before_a_tensor_is_read(tmp_path, changes, message):
    path = tmp_path / "a.safetensors"
    write(path)
    assert embedding_file.load(path)[0].width == 8, "a file from before there were digests loads"
    write(path, **changes)
    for function in (embedding_file.check, embedding_file.load):
        with pytest.raises(ValueError, match=message) as caught:
            function(path)
        assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_an_embedding_of_many_blends_is_saved_and_loaded(tmp_path):
    source = {"adapter": "a"}
    for _ in range(60):
        source = {"blend": [source, {"adapter": "b"}]}
    embedding_file.save(tmp_path / "a.safetensors", embedding(source=source))
    assert embedding_file.load(tmp_path / "a.safetensors")[0].source == source


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path):
    resource = pytest.importorskip("resource")
    path = tmp_path / "a.safetensors"
    embedding_file.save(path, embedding())
    old = path.read_bytes()
    large = embedding(tokens=torch.randn(3, 2, 8192))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(ValueError, match="was not written .*make room on the disk") as caught:
            embedding_file.save(path, large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == old and [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_folder_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ValueError, match="was not written .*choose another folder"):
        embedding_file.save(tmp_path / "file" / "a.safetensors", embedding())
