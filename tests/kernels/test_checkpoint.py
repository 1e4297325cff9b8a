"""Checkpoints come back as they were saved, and every refusal is one sentence about the file."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors.torch import save_file
from semantic_diffusion_adapter.kernels import checkpoint


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "weight": torch.randn(6, 5, generator=generator),
        "small": torch.randn(6, 5, generator=generator) * 1e-7,
        "kernel": torch.randn(4, 3, 2, 2, generator=generator),
        "bias": torch.randn(6, generator=generator),
        "count": torch.tensor([3], dtype=torch.int64),
    }


def test_round_trip_keeps_every_bit_and_the_record(tmp_path):
    path = tmp_path / "deep" / "a.safetensors"
    checkpoint.save(path, tensors(), "adapter", {"width": 5}, step=7, licence="Apache-2.0")
    state, record = checkpoint.load(path, "adapter")
    assert state.keys() == tensors().keys()
    assert all(torch.equal(state[name], value) for name, value in tensors().items())
    assert record == {
        "format_version": 1, "kind": "adapter", "config": {"width": 5}, "step": 7, "licence": "Apache-2.0",
    }  # fmt: skip
    assert checkpoint.read_header(path) == record
    assert [file.name for file in path.parent.iterdir()] == ["a.safetensors"], "a temporary file was left behind"


def test_a_file_in_parts_is_read_as_a_whole(tmp_path):
    whole = tensors()
    for number, name in enumerate(whole, 1):
        save_file({name: whole[name]}, tmp_path / f"model-{number:05}-of-{len(whole):05}.safetensors")
    files = sorted(tmp_path.iterdir())
    for file in files:
        read = checkpoint.load_parts(file)
        assert read.keys() == whole.keys() and all(torch.equal(read[name], whole[name]) for name in whole)
        assert checkpoint.parts(file) == files
    files[1].unlink()
    with pytest.raises(ValueError, match=f"{files[1].name} is not beside it: put all of them there"):
        checkpoint.load_parts(files[0])


@pytest.mark.parametrize("name", ["a", "a-00001-of-00000", "a-00004-of-00003", "a-1-of-9999999999"])
def test_a_name_that_counts_no_parts_is_a_whole_file(tmp_path, name):
    path = tmp_path / f"{name}.safetensors"
    assert checkpoint.parts(path) == [path]
    save_file(tensors(), path)
    assert checkpoint.load_parts(path).keys() == tensors().keys()


def test_eight_bit_rows_are_within_half_a_step(tmp_path):
    path = tmp_path / "a.safetensors"
    original = tensors() | {"zero": torch.zeros(3, 4)}
    checkpoint.save(path, original, "flux", {}, dtype=torch.int8)
    state, _ = checkpoint.load(path, "flux")
    assert checkpoint.load_tensors(path)["weight"].dtype == torch.int8
    for name in ("weight", "small", "kernel", "zero"):
        rows = original[name].flatten(1)
        step = rows.abs().amax(1, keepdim=True) / 127
        assert state[name].shape == original[name].shape and state[name].dtype == torch.float32
        assert ((state[name].flatten(1) - rows).abs() <= 0.5001 * step).all()
    assert torch.equal(state["bias"], original["bias"].half())
    assert torch.equal(state["count"], original["count"])


def test_half_precision_storage(tmp_path):
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, tensors(), "vae", {}, dtype=torch.bfloat16)
    state, _ = checkpoint.load(path, "vae")
    assert torch.equal(state["weight"], tensors()["weight"].bfloat16())
    with pytest.raises(ValueError, match="'big' does not fit"):
        checkpoint.save(path, {"big": torch.tensor([1e6])}, "vae", {}, dtype=torch.float16)


def test_tied_and_strided_tensors_are_stored(tmp_path):
    weight = torch.randn(4, 6)
    checkpoint.save(tmp_path / "a.safetensors", {"a": weight, "b": weight, "c": weight.T, "d": weight[2:]}, "text_encoder", {})
    state, _ = checkpoint.load(tmp_path / "a.safetensors", "text_encoder")
    assert torch.equal(state["b"], weight) and torch.equal(state["c"], weight.T) and torch.equal(state["d"], weight[2:])


def test_a_failed_save_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, {"x": torch.ones(2)}, "vae", {})
    with pytest.raises(ValueError, match="'x' has NaN"):
        checkpoint.save(path, {"x": torch.tensor([torch.nan])}, "vae", {})
    with pytest.raises(ValueError, match="kind 'lora'"):
        checkpoint.save(path, {"x": torch.ones(2)}, "lora", {})
    with pytest.raises(ValueError, match="'kind' is reserved|reserved"):
        checkpoint.save(path, {"x": torch.ones(2)}, "vae", {}, format_version=3)
    assert torch.equal(checkpoint.load(path, "vae")[0]["x"], torch.ones(2))


def write(path, metadata, **extra):
    save_file({"x": torch.ones(64)} | extra, path, metadata=metadata)


def test_refusals_are_one_sentence(tmp_path):
    path = tmp_path / "a.safetensors"

    def refused(message, kind="adapter"):
        with pytest.raises(ValueError, match=message) as caught:
            checkpoint.load(path, kind)
        text = str(caught.value)
        assert str(path) in text and text.endswith(".") and "\n" not in text

    refused("no checkpoint at")
    path.write_bytes(b"")
    refused("not a safetensors file")
    path.write_bytes(b"PK\x03\x04 a pickle in a zip, long enough to have a header")
    refused("not a safetensors file")
    write(path, {"format": "pt"})
    refused("no Semantic Diffusion Adapter record")
    write(path, {"sda": "{"})
    refused("record in .* is damaged")
    write(path, {"sda": json.dumps({"format_version": 2, "kind": "adapter", "config": {}})})
    refused("format version 2 .*update the pack")
    good = {"sda": json.dumps({"format_version": 1, "kind": "adapter", "config": {}})}
    write(path, good)
    refused("kind 'adapter' where 'vae' is needed", kind="vae")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    refused("cut short")
    path.write_bytes(whole[:40])
    refused("cut short")
    write(path, good, y=torch.tensor([1.0, torch.inf]))
    refused("'y' .* NaN or infinite")


@pytest.mark.parametrize(
    "header",
    [
        b"{}", b'{"x": 3}', b"{nonsense", b'{"x": {"data_offsets": [0]}}', b'{"x": {"data_offsets": [0, "1"]}}',
        b'{"__metadata__": 3}', b'{"x": ' + b"[" * 100_000,
    ],
)  # fmt: skip
def test_malformed_headers_never_raise_anything_else(tmp_path, header):
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(ValueError):
        checkpoint.load(path, "adapter")


def test_fill_names_what_does_not_fit():
    module = torch.nn.Linear(3, 2)
    state = {"weight": torch.ones(2, 3, dtype=torch.float16), "bias": torch.zeros(2)}
    checkpoint.fill(module, state, "file.safetensors")
    assert module.weight.dtype == torch.float32 and torch.equal(module.weight, torch.ones(2, 3))
    with pytest.raises(ValueError, match="file.safetensors lacks 'bias'"):
        checkpoint.fill(module, {"weight": state["weight"]}, "file.safetensors")
    with pytest.raises(ValueError, match="unknown tensor 'extra'"):
        checkpoint.fill(module, state | {"extra": torch.ones(1)}, "file.safetensors")
    with pytest.raises(ValueError, match=r"'weight' has shape \(3, 2\)"):
        checkpoint.fill(module, state | {"weight": torch.ones(3, 2)}, "file.safetensors")
