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
    for function in (lambda: checkpoint.load("a\0b", "adapter"), lambda: checkpoint.save("a\0b", tensors(), "adapter", {})):
        with pytest.raises(ValueError, match=r"The file name 'a\\x00b' has a NUL character"):
            function()
    path.write_bytes(b"")
    refused("not a safetensors file")
    path.write_bytes(b"PK\x03\x04 a pickle in a zip, long enough to have a header")
    refused("not a safetensors file")
    write(path, {"format": "pt"})
    refused("no Semantic Diffusion Adapter record")
    write(path, {"sda": "{"})
    refused("record in .* is damaged")
    for version in (0, -1, True, 1.5, "1", None, [1]):
        write(path, {"sda": json.dumps({"format_version": version, "kind": "adapter", "config": {}})})
        refused("for 'format_version'")
    for text in ('{"kind": "adapter", "kind": "vae"}', '{"a": NaN}', '{"a": 1e999}', '{"a": ' + "[" * 500, '[1]', '{"a": ' + "[" * 10**5):
        write(path, {"sda": text})
        refused("record in .* is damaged")
    write(path, {"sda": json.dumps({"format_version": 1, "kind": "adapter", "config": {}, "widths": 5})})
    refused("for 'widths'")
    write(path, {"sda": json.dumps({"format_version": 1, "kind": "adapter"})})
    refused("lacks 'config'")
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


def resaved(path, change) -> None:
    """The file again with a change to its header and its bytes, its record as it was."""
    whole = path.read_bytes()
    start = 8 + struct.unpack("<Q", whole[:8])[0]
    header, data = json.loads(whole[8:start]), bytearray(whole[start:])
    change(header, data)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header, data: header["bias"].update(dtype="I32"), "not as it was saved .*dtype"),
        (lambda header, data: header["weight"].update(shape=[5, 6]), "not as it was saved .*shape"),
        (lambda header, data: header.update(other=header.pop("weight")), "not as it was saved .*name"),
        (lambda header, data: header["__metadata__"].update(
            sda=header["__metadata__"]["sda"].replace('"heads": 4', '"heads": 2')), "not as it was saved .*record"),
        (lambda header, data: data.__setitem__(-1, data[-1] ^ 1), "not as it was saved .*numbers"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_as_it_was_saved_is_refused(tmp_path, change, message):
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, tensors(), "adapter", {"heads": 4, "scale": 0.1})
    resaved(path, lambda header, data: header.update(dict(reversed(header.items()))))
    assert checkpoint.verify(path), "the order of the names in the header is no change"
    resaved(path, change)
    with pytest.raises(ValueError, match=message):
        checkpoint.load(path, "adapter")


def test_beyond_what_is_quickly_hashed_numbers_are_checked_on_request(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, tensors(), "adapter", {})
    resaved(path, lambda header, data: data.__setitem__(-1, data[-1] ^ 1))
    monkeypatch.setattr(checkpoint, "QUICK", 16)
    checkpoint.load(path, "adapter")
    with pytest.raises(ValueError, match="numbers in its tensors were changed"):
        checkpoint.verify(path)
    write(path, {"sda": json.dumps({"format_version": 1, "kind": "adapter", "config": {}})})
    assert not checkpoint.verify(path), "a file from before there were digests"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("weight::scale"), r"'weight' .* is I8 \[6, 5\] with no scale"),
        (lambda t: t.update({"weight::scale": torch.ones(1)}), r"with a scale of F32 \[1\]"),
        (lambda t: t.update({"weight::scale": torch.ones(6, 1)}), r"with a scale of F32 \[6, 1\]"),
        (lambda t: t.update({"weight::scale": torch.ones(6).half()}), r"with a scale of F16 \[6\]"),
        (lambda t: t.pop("weight"), "'weight::scale' without the tensor that it scales"),
        (lambda t: t.update(weight=t["weight"].view(torch.uint8)), r"is U8 \[6, 5\] with a scale"),
        (lambda t: t.update(bias=t["bias"].view(torch.int16)), "is I16, which no file of this pack stores"),
        (lambda t: t.update(bias=t["bias"].view(torch.bfloat16)), "'kernel_bias' as F16 and 'bias' as BF16|'bias' as BF16 and"),
        (lambda t: t.update(weight=t["weight"].view(torch.float8_e4m3fn)), "is F8_E4M3"),
    ],
)
def test_without_a_digest_the_dtypes_must_be_those_that_are_stored(tmp_path, change, message):
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, tensors() | {"kernel_bias": torch.ones(4)}, "flux", {}, dtype=torch.int8)
    stored = checkpoint.load_tensors(path)
    record = {"sda": json.dumps({"format_version": 1, "kind": "flux", "config": {}})}
    save_file(stored, path, metadata=record)
    assert torch.equal(checkpoint.load(path, "flux")[0]["bias"], stored["bias"])
    change(stored)
    save_file(stored, path, metadata=record)
    with pytest.raises(ValueError, match=message):
        checkpoint.load(path, "flux")


def test_what_is_saved_can_be_loaded(tmp_path):
    path = tmp_path / "a.safetensors"
    for fields, message in (({"figure": float("nan")}, "NaN"), ({"what": torch.ones(1)}, "not JSON serializable")):
        with pytest.raises(ValueError, match=f"record of .* cannot be written .*{message}"):
            checkpoint.save(path, tensors(), "adapter", {}, **fields)
    for dtype in (torch.int8, torch.int32, torch.complex64, torch.float8_e4m3fn):
        with pytest.raises(ValueError, match="which checkpoints do not store"):
            checkpoint.save(path, {"x": torch.ones(2, 2).to(dtype)}, "adapter", {})
    for fields in ({"thumbnail": "x" * 2**20}, {"metadata": {"workflow": "x" * 2**23}}):
        with pytest.raises(ValueError, match="too long to be read again"):
            checkpoint.save(path, tensors(), "adapter", {}, **fields)
    assert not any(tmp_path.iterdir())
