"""The ways in which the fuzzer changes a file: its bytes, its header, its tensors, its record."""

from __future__ import annotations

import json
import math
import random
import struct
from typing import Any

from semantic_diffusion_adapter.tests.kernels.fuzz import File

BITS = {"F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16, "U16": 16, "I8": 8, "U8": 8,
        "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8}  # fmt: skip
WRONG = (0, -1, -2, 1, 2, 3, 7, 1000, 10**8, 10**9, 10**18, 2**63, True, False, 1.5, 0.0, -3.5, 1e300, None, "", "x", "1", "a\x00b",
         "\ud800", "x" * 10_000, [], [[]], {}, [1, 2, 3], {"a": 1}, math.nan, math.inf)  # fmt: skip
HOSTILE = {
    "timm_model_name": "hf-hub:owner/model", "timm_model_pretrained": True, "hf_model_name": "owner/model", "hf_model_pretrained": True,
    "_attn_implementation": "owner/kernel", "attn_implementation": "owner/kernel", "auto_map": {"AutoModel": "owner/model--code.Model"},
    "_name_or_path": "owner/model", "trust_remote_code": True, "quantization_config": {"quant_method": "gptq"}, "model_type": "auto",
    "torch_dtype": "float16", "architectures": ["Evil"], "local-dir": "/tmp", "pretrained": "local-dir:/tmp", "text_cfg": {}, "future": 1,
    "num_experts": 10**6, "__class__": "object", "depth": 10**8, "layers": 10**8, "num_hidden_layers": 10**8, "format_version": 2,
}  # fmt: skip


def _spots(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) inside a JSON value, the digest's aside."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [spot for key, child in children if key != "digest" for spot in ((value, key), *_spots(child))]


# The record


def _word(file: File, rng: random.Random) -> None:
    spots = _spots(file.record)
    number = [spot for spot in spots if type(spot[0][spot[1]]) in (int, float)]
    container, key = rng.choice(number if number and rng.random() < 0.5 else spots)
    old = container[key]
    near = [old + 1, old - 1, old * 2, -old, old + 0.5, 10**8] if type(old) in (int, float) else []
    container[key] = rng.choice(near if near and rng.random() < 0.5 else WRONG)


def _field_gone(file: File, rng: random.Random) -> None:
    container, key = rng.choice(_spots(file.record))
    del container[key]


def _hostile_field(file: File, rng: random.Random) -> None:
    places = [file.record] + [c[k] for c, k in _spots(file.record) if isinstance(c[k], dict)]
    name = rng.choice(list(HOSTILE))
    rng.choice(places)[name] = HOSTILE[name]


def _deep(file: File, rng: random.Random) -> None:
    container, key = rng.choice(_spots(file.record))
    for _ in range(rng.choice((50, 250, 900))):
        container[key] = [container[key]] if rng.random() < 0.5 else {"a": container[key]}


# The tensors


def _number(file: File, rng: random.Random) -> None:
    entry = file.tensors[rng.choice([name for name, entry in file.tensors.items() if entry[2]])]
    at = rng.randrange(len(entry[2]))
    entry[2] = entry[2][:at] + bytes([entry[2][at] ^ 1 << rng.randrange(8)]) + entry[2][at + 1 :]


def _not_finite(file: File, rng: random.Random) -> None:
    names = [name for name, entry in file.tensors.items() if entry[0] in ("F16", "F32") and entry[2]]
    entry = file.tensors[rng.choice(names)]
    size = BITS[entry[0]] // 8
    at = rng.randrange(len(entry[2]) // size) * size
    bad = struct.pack("<e" if size == 2 else "<f", rng.choice((math.nan, math.inf, -math.inf)))
    entry[2] = entry[2][:at] + bad + entry[2][at + size :]


def _retyped(file: File, rng: random.Random) -> None:
    entry = file.tensors[rng.choice(list(file.tensors))]
    entry[0] = rng.choice([dtype for dtype, bits in BITS.items() if bits == BITS[entry[0]] and dtype != entry[0]])


def _scale(file: File, rng: random.Random) -> None:
    """Gone, of another size, or of a tensor that has none; where nothing is scaled, a scale appears."""
    scales = [name for name in file.tensors if name.endswith("::scale")]
    if not scales:
        name = rng.choice(list(file.tensors))
        file.tensors[f"{name}::scale"] = ["F32", [1], bytes(4)]
        return
    name = rng.choice(scales)
    dtype, shape, data = file.tensors.pop(name)
    how = rng.randrange(4)
    if how == 1:
        file.tensors[name] = [dtype, [1], data[:4]]
    elif how == 2:
        file.tensors[name] = [dtype, [1, *shape], data]
    elif how == 3:
        file.tensors.pop(name.removesuffix("::scale"))
        file.tensors[name] = [dtype, shape, data]


def _tensor_gone(file: File, rng: random.Random) -> None:
    del file.tensors[rng.choice(list(file.tensors))]


def _tensor_more(file: File, rng: random.Random) -> None:
    name = rng.choice(list(file.tensors))
    file.tensors[
        rng.choice((f"{name}.more", "", "visual.x", "dinov2.x", "a\nb", "x" * 5000, f"{name}::scale::scale"))
    ] = list(file.tensors[name])


def _renamed(file: File, rng: random.Random) -> None:
    first, second = rng.sample(list(file.tensors), 2)
    if rng.random() < 0.5:
        file.tensors[first], file.tensors[second] = file.tensors[second], file.tensors[first]
    else:
        file.tensors[first + "x"] = file.tensors.pop(first)


def _reshaped(file: File, rng: random.Random) -> None:
    entry = file.tensors[rng.choice([name for name, entry in file.tensors.items() if entry[1]])]
    shape = list(entry[1])
    entry[1] = rng.choice((shape[::-1], [math.prod(shape)], [1, *shape], [*shape, 1], shape + [1] * 20))


STRUCTURED = {
    "word of the record": _word, "field gone": _field_gone, "hostile field": _hostile_field, "deep record": _deep, "number": _number,
    "not finite": _not_finite, "retyped": _retyped, "scale": _scale, "tensor gone": _tensor_gone, "tensor more": _tensor_more,
    "renamed": _renamed, "reshaped": _reshaped,
}  # fmt: skip


# The header


def _entry(header: dict, rng: random.Random) -> dict:
    return header[rng.choice([name for name in header if name != "__metadata__"])]


def _offsets(header: dict, rng: random.Random) -> None:
    offsets = _entry(header, rng)["data_offsets"]
    offsets[rng.randrange(2)] += rng.choice((1, -1, 2, 8, -8, 2**20, 2**40, 2**63, -(2**63)))


def _entry_word(header: dict, rng: random.Random) -> None:
    entry = _entry(header, rng)
    container, key = rng.choice(_spots(entry) + [(entry, "more")])
    container[key] = rng.choice(WRONG)


def _twice(header: dict, rng: random.Random) -> bytes:
    """One name twice: a tensor's, a field's of an entry, or one of the record's."""
    text = json.dumps(header)
    how = rng.randrange(3)
    if how == 0:
        name = rng.choice(list(header))
        text = f"{text[:-1]}, {json.dumps(name)}: {json.dumps(header[name])}}}"
    elif how == 1:
        text = text.replace('{"dtype"', '{"shape": [1], "dtype"', 1)
    else:
        text = text.replace('\\"kind\\"', '\\"kind\\": \\"vae\\", \\"kind\\"', 1)
    return text.encode()


def _metadata(header: dict, rng: random.Random) -> None:
    where = rng.choice(("sda", "other", "__metadata__"))
    value = rng.choice((*WRONG, "{", "[1]", '{"format_version": 1}', "[" * 100_000))
    if where == "__metadata__":
        header[where] = value
    else:
        header["__metadata__"][where] = value


def _strange_json(header: dict, rng: random.Random) -> bytes:
    text = json.dumps(header).encode()
    at = rng.randrange(len(text))
    return rng.choice((
        text.replace(b'"F', b'"Q', 1), b"{" * 100_000, b'{"a": ' + b"[" * 100_000, text[:-1], text.decode().encode("utf-16"), b" " + text,
        text[:at] + b"\xff" + text[at:], text[:at] + text[at + 1 :], text.replace(b"[0,", b"[-0,", 1), text + b" " * 64, b"{}", b"[]",
    ))  # fmt: skip


HEADERS = {
    "offsets": _offsets,
    "word of the header": _entry_word,
    "name twice": _twice,
    "metadata": _metadata,
    "strange JSON": _strange_json,
}


# The bytes


def _bits(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    length = 8 + struct.unpack("<Q", data[:8])[0]
    for _ in range(rng.choice((1, 1, 1, 4))):
        changed[rng.randrange(rng.choice((8, length, len(data))))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return rng.choice(
        (data[:at], data[:-1], data + b"\0", data + data[:at], data[:at] + b"\0" * 8 + data[at:], data[:8])
    )


def _length(data: bytes, rng: random.Random) -> bytes:
    length = struct.unpack("<Q", data[:8])[0]
    return (
        struct.pack("<Q", rng.choice((0, 1, length - 1, length + 1, length * 2, 2**24 + 1, 10**8, 2**40, 2**64 - 1)))
        + data[8:]
    )


RAW = {"bits": _bits, "cut or longer": _cut, "length": _length}
NAMES = (*STRUCTURED, *HEADERS, *RAW)


def whole(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def mutant(file: File, name: str, seal: str, rng: random.Random) -> bytes:
    """The bytes of a file with one change of the kind `name` (any other: none) under a seal. `file` is used up."""
    if name in STRUCTURED:
        STRUCTURED[name](file, rng)
    file.seal(seal)
    header = file.header()
    if name in HEADERS:
        header = HEADERS[name](header, rng) or header
    data = whole(header if isinstance(header, bytes) else json.dumps(header).encode(), file.data())
    return RAW[name](data, rng) if name in RAW else data
