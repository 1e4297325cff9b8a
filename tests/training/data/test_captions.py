"""Captions in whatever form people keep them."""
from __future__ import annotations

import io
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install -e '.[training]'")

import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
from semantic_diffusion_adapter.training.data.captions import caption_in, caption_of, metadata, text_of  # noqa: E402

values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
                      lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.sampled_from(("caption", "TEXT")), inner))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("text", ["a café by the sea", "a temple", "\u6771\u4eac\u306e\u591c, at night"])
def test_text_of_any_unicode_is_itself(text, encoding):
    assert text_of(text.encode(encoding)).lstrip("\ufeff") == text


@pytest.mark.parametrize("data, text", [
    ("a café".encode("cp1252"), "a café"),
    ("“smart” – quotes".encode("cp1252"), "“smart” – quotes"),
    ("a temple".encode("utf-16-le"), "a temple"),
    ("a temple".encode("utf-16-be"), "a temple"),
    ("\u6771\u4eac\u306e\u591c".encode()[:-1], "\u6771\u4eac\u306e\ufffd"),  # cut in a letter: still UTF-8
    (b"", ""),
])
def test_text_of_other_encodings(data, text):
    assert text_of(data) == text


@given(st.binary(max_size=200))
def test_no_bytes_are_too_strange(data):
    caption_of(data).encode()


@pytest.mark.parametrize("value, caption", [
    (" a cat \n", "a cat"), (b" a cat ", "a cat"), (3, "3"), (2.5, "2.5"), (math.nan, ""), (math.inf, ""), (None, ""), (True, ""),
    (["", "one", "two"], "one"), ([], ""), ([None, ["deep"]], "deep"),
    ({"caption": "a", "text": "b"}, "a"), ({"text": "b", "caption": None}, "b"), ({"TEXT": "loud"}, "loud"),
    ({"url": "x"}, ""), ({"caption": {"text": ["nested"]}}, "nested"), ("half \ud83d", "half ?"),
])
def test_a_value_of_a_table(value, caption):
    assert caption_of(value) == caption


@given(values)
def test_every_value_gives_text_that_can_be_written(value):
    assert caption_of(value) == caption_of(value).encode().decode()


def test_a_file_of_json():
    assert caption_in(b'\xef\xbb\xbf{"caption": "a temple"}', "json") == "a temple"
    assert caption_in(json.dumps(["one", "two"]).encode("utf-16"), "json") == "one"
    assert caption_in(b'{"caption": "x"}', "txt") == '{"caption": "x"}'
    for broken in (b"{", b"[" * 100_000):
        with pytest.raises((ValueError, RecursionError)):
            caption_in(broken, "json")


def test_the_tables_of_image_folders():
    stream = io.BytesIO()
    pq.write_table(pa.table({"file_name": ["a.jpg", None, "b/c.jpg"], "text": ["one", "lost", "two"]}), stream)
    named = {"a.jpg": "one", "b/c.jpg": "two"}
    assert metadata("metadata.parquet", stream.getvalue()) == named
    assert metadata("metadata.csv", b'\xef\xbb\xbffile_name,text\r\na.jpg,one\r\n"b/c.jpg","two"\r\n') == named
    assert metadata("metadata.jsonl", b'{"file_name": "a.jpg", "text": "one"}\n\n{"file_name": "b/c.jpg", "text": "two"}\n') == named
    with pytest.raises(ValueError):
        metadata("metadata.jsonl", b"{")
