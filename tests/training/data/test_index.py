"""The index: buckets, one ranged read for a picture, and a hash of what the samples are."""
from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

for package in ("fsspec", "pyarrow"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install -e '.[training]'")

import fsspec  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
from semantic_diffusion_adapter.training.data.decode import CorruptSample  # noqa: E402
from semantic_diffusion_adapter.training.data.index import Index, bucket_of, buckets  # noqa: E402

from .conftest import jpeg, table_of  # noqa: E402


@pytest.mark.parametrize("resolution", (128, 512, 768, 1024))
def test_buckets_are_the_aspects_of_the_field(resolution):
    sizes = buckets(resolution)
    assert (resolution, resolution) in sizes and {(w, h) for h, w in sizes} == set(sizes)
    for h, w in sizes:
        assert h % 32 == w % 32 == 0 and 0.5 <= h / w <= 2
        assert abs(h * w / resolution ** 2 - 1) < (0.3 if resolution < 512 else 0.06)


@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from((512, 768, 1024)))
def test_a_bucket_never_enlarges_and_is_the_nearest_such(height, width, resolution):
    h, w = bucket_of(height, width, resolution)
    assert (h == 0) == (min(height, width) < resolution)
    assert h <= height and w <= width
    if h:
        error = max(h * width, w * height) / min(h * width, w * height)
        for a, b in buckets(resolution):
            if a <= height and b <= width:
                assert error <= max(a * width, b * height) / min(a * width, b * height) + 1e-9


@pytest.mark.parametrize("scheme", ("{}", "file://{}", "memory://{}"))
def test_a_row_is_read_by_its_range_alone(scheme, tmp_path, written, monkeypatch):
    pictures = [jpeg(64, 96, i) for i in range(3)]
    index = written(scheme.format(tmp_path / "set"), pictures)
    assert index.rows == len(index) == 3 and index.kind == "pictures" and index.resolutions == (64,)
    asked = []
    read = index.fs.cat_file
    monkeypatch.setattr(index.fs, "cat_file", lambda path, start, end: asked.append(end - start) or read(path, start, end))
    assert [index.read_member(i) for i in range(3)] == pictures
    assert asked == [len(p) for p in pictures]
    assert index[1]["caption"] == "picture 1"


def test_the_hash_is_of_the_samples_not_of_the_shards():
    first = Index("a", table_of([(600, 600), (900, 700)]))
    moved = table_of([(600, 600), (900, 700)], offset=[512, 9000], shard=["x.tar", "y.tar"])
    assert Index("b", moved).hash == first.hash
    cut = pa.concat_tables([moved.slice(0, 1), moved.slice(1)])
    assert Index("b", cut).hash == first.hash
    for other in (table_of([(600, 600), (900, 701)]), table_of([(600, 600), (900, 700)], caption=["picture 0", "else"]),
                  table_of([(600, 600), (900, 700)], caption=["picture 0p", "icture 1"]), table_of([(600, 600)]),
                  table_of([(600, 600), (900, 700)], resolutions=(512, 768))):
        assert Index("a", other).hash != first.hash


def test_an_index_travels_to_other_processes(tmp_path, written):
    index = written(str(tmp_path), [jpeg(64, 64)])
    again = pickle.loads(pickle.dumps(index))
    assert again.hash == index.hash and again.read_member(0) == index.read_member(0)


def test_what_is_no_index_is_said_in_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="There is no index.parquet in .*; run `sda prepare` to its end first"):
        Index.read(str(tmp_path))
    pq.write_table(pa.table({"a": [1]}), tmp_path / "index.parquet")
    with pytest.raises(ValueError, match="no index of ours"):
        Index.read(str(tmp_path))
    newer = table_of([(600, 600)]).replace_schema_metadata({"format": "99", "kind": "pictures"})
    with pytest.raises(ValueError, match="format 99, newer than this version; update the pack"):
        Index("x", newer)
    with pytest.raises(ValueError, match="no buckets at 768 px, only at 512"):
        Index("x", table_of([(600, 600)])).buckets(768)


@pytest.mark.parametrize("harm, message", [
    (lambda data, start: data[:start + 40] + bytes([data[start + 40] ^ 1]) + data[start + 41:], "bytes have changed"),
    (lambda data, start: data[:start + 50], "ends after 50 of the picture's"),
    (None, "the shard is missing"),
])
def test_a_corrupt_shard_names_shard_row_and_sample(harm, message, tmp_path, written):
    index = written(f"memory://{tmp_path}", [jpeg(64, 64, i) for i in range(3)])
    fs, path = fsspec.filesystem("memory"), f"{index.root}/shards/000000.tar"
    data = fs.cat_file(path)
    fs.rm(path)
    if harm:
        fs.pipe_file(path, harm(data, index[2]["offset"]))
        index.read_member(1)
    named = r"Row 2 of memory://.* \('000000002', from 2.jpg\) in shards/000000.tar .*"
    with pytest.raises(CorruptSample, match=named + message) as caught:
        index.read_member(2)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.row, again.shard, str(again)) == (2, "shards/000000.tar", str(caught.value))
