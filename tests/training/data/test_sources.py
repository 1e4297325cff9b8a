"""Sources as strangers keep them: links, odd names, broken files among good ones; nothing ends the run, nothing is lost in silence."""
from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile
from pathlib import Path

import pytest

for package in ("fsspec", "pyarrow"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install -e '.[training]'")

import fsspec  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
from semantic_diffusion_adapter.training.data import files, prepare, readers, shards, sources  # noqa: E402
from semantic_diffusion_adapter.training.data.index import Index  # noqa: E402

from .conftest import jpeg  # noqa: E402

PICTURE = jpeg(64, 64)
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def rows(source, *columns: str) -> list[dict]:
    """What examining a source says of its samples, as the workers get its chunks."""
    chunks, _ = sources.listing(files.absolute(str(source)), *columns)
    return [shards.examine(found, 64) for chunk in chunks for found in readers.read(json.loads(json.dumps(chunk)))]


def told(source, *columns: str) -> list[tuple[str, str, str]]:
    """(origin, reason or "kept", caption) of every sample."""
    return [(row["origin"], row["reason"] or "kept", row.get("caption") or "") for row in rows(source, *columns)]


def tar_of(path: Path, *members: tuple[str, bytes], mode: str = "w", form: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode, format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def table_of(file: Path, /, **columns) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), file)
    return file


ODD = ("brackets [2024]", "what?", "star*", "hash#tag", "a::b", "per%20cent", ".hidden", "s3::x", "{curly}", "ends.", "émigré 東")


@pytest.mark.parametrize("name", ODD)
def test_a_path_that_exists_is_a_path_whatever_its_name(name, tmp_path, monkeypatch):
    source = tmp_path / name / "in"
    source.mkdir(parents=True)
    (source / "0.jpg").write_bytes(PICTURE)
    (source / "0.txt").write_text("words")
    tar_of(source / "deep" / "0.tar", ("1.jpg", jpeg(64, 64, 1)))
    monkeypatch.chdir(tmp_path)
    for place in (source, f"{name}/in", f"file://{source}"):
        assert told(place) == [("0.jpg", "kept", "words"), ("deep/0.tar/1.jpg", "kept", "")]
    for place, origin in (("0.jpg", "0.jpg"), ("*.jpg", "0.jpg"), ("**/*.tar", "deep/0.tar/1.jpg"), ("d??p/*", "deep/0.tar/1.jpg")):
        assert [row[0] for row in told(source / place)] == [origin]


def test_a_set_may_lie_in_a_folder_of_any_name(tmp_path, monkeypatch):
    name = "s3::[all] what? star* #1 a%20b"
    (tmp_path / name / "in").mkdir(parents=True)
    (tmp_path / name / "in/0.jpg").write_bytes(PICTURE)
    monkeypatch.chdir(tmp_path)
    assert prepare.run(prepare.Config(f"{name}/in", f"{name}/set", (64,), workers=1))
    for place in (tmp_path / name / "set", f"{name}/set", f"file://{tmp_path}/{name}/set"):
        assert Index.read(str(place)).read_member(0) == PICTURE


def test_a_folder_of_links_is_what_it_links_to(tmp_path):
    blobs, data = tmp_path / "blobs", tmp_path / "snapshots/abc/data"
    blobs.mkdir()
    data.mkdir(parents=True)
    (blobs / "0f3a").write_bytes(PICTURE)
    table_of(blobs / "77", image=pa.array([{"bytes": PICTURE, "path": None}], STRUCT), text=["a"])
    (data / "a.jpg").symlink_to("../../../blobs/0f3a")
    (data.parent / "tables").mkdir()
    (data.parent / "tables/0.parquet").symlink_to(blobs / "77")
    (data / "gone.jpg").symlink_to("nowhere")
    (data / "self.png").symlink_to("self.png")
    (tmp_path / "all").symlink_to(data)
    for place in (data, tmp_path / "all", tmp_path / "snapshots", data / "*.???"):
        assert [(origin.split("/")[-1], reason) for origin, reason, _ in told(place)] == [
            ("a.jpg", "kept"), ("gone.jpg", "unreadable"), ("self.png", "unreadable")]
    for place in ("tables", "tables/0.parquet", "t*/*.parquet"):
        assert [row[1:] for row in told(data.parent / place)] == [("kept", "a")]


def test_each_folder_is_walked_once_and_by_its_own_name(tmp_path):
    (tmp_path / "in/real/deep").mkdir(parents=True)
    (tmp_path / "in/real/deep/a.jpg").write_bytes(PICTURE)
    (tmp_path / "far").mkdir()
    (tmp_path / "far/b.jpg").write_bytes(PICTURE)
    for link, target in (("aaa", "real"), ("real/deep/up", ".."), ("real/deep/round", "."), ("out", tmp_path / "far")):
        (tmp_path / "in" / link).symlink_to(target)
    assert [origin for origin, *_ in told(tmp_path / "in")] == ["out/b.jpg", "real/deep/a.jpg"]


def test_hidden_files_below_are_left_out_and_named_ones_are_not(tmp_path):
    for name in (".git/a.jpg", "._b.jpg", "c.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(PICTURE)
    for place, found in (("", "c.jpg"), (".git", "a.jpg"), ("._b.jpg", "._b.jpg"), (".git/*.jpg", "a.jpg"), (".g*/*", ".git/a.jpg")):
        assert [origin for origin, *_ in told(tmp_path / place)] == [found]


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="permissions as on POSIX")
def test_captions_beside_pictures(tmp_path):
    said = {"0.JPG": ("0.TXT", b"upper\n"), "1.jpg": ("1.caption", b"another ending"), "2.jpg": ("2.json", b'{"caption": ["a", "b"]}'),
            "3.jpg": ("3.json", b"[" * 100_000), "4.jpg": ("4.txt", "ünïcode".encode("utf-16"))}
    for name, (side, data) in said.items():
        (tmp_path / name).write_bytes(jpeg(64, 64, int(name[0])))
        (tmp_path / side).write_bytes(data)
    (tmp_path / "5.jpg").write_bytes(jpeg(64, 64, 5))
    (tmp_path / "5.txt").mkdir()
    (tmp_path / "6.jpg").write_bytes(jpeg(64, 64, 6))
    (tmp_path / "6.txt").symlink_to("nowhere")
    found = rows(tmp_path)
    assert [row["caption"] for row in found] == ["upper", "another ending", "a", "", "ünïcode", "", ""]
    assert [row["reason"] for row in found] == [""] * 7
    assert ["RecursionError" in found[3]["detail"], bool(found[5]["detail"]), "FileNotFound" in found[6]["detail"]] == [True, False, True]
    assert prepare.run(prepare.Config(str(tmp_path), str(tmp_path / "out"), (64,), workers=1))
    report = json.loads((tmp_path / "out/report.json").read_text(encoding="utf-8"))
    assert report["with_caption"] == 4 and report["captions_unreadable"] == 2 and report["kept"] == 7


def test_captions_of_image_folders(tmp_path):
    for name in ("a.jpg", "sub/b.jpg", "sub/c.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(PICTURE)
    (tmp_path / "sub/c.txt").write_text("its own")
    (tmp_path / "metadata.csv").write_text("file_name,text\na.jpg,one\nsub/c.jpg,not this\n")
    table_of(tmp_path / "sub/metadata.parquet", file_name=["b.jpg"], caption=["two"])
    assert told(tmp_path) == [("a.jpg", "kept", "one"), ("sub/b.jpg", "kept", "two"), ("sub/c.jpg", "kept", "its own")]
    assert sources.listing(str(tmp_path))[1] == {}
    (tmp_path / "metadata.csv").rename(tmp_path / "sub/metadata.jsonl")
    assert ("sub/metadata.jsonl", "broken table", "") in told(tmp_path)


@pytest.mark.parametrize("name, packed", [("0.tar", gzip.compress), ("0.tar.gz", gzip.compress), ("0.tgz", gzip.compress),
                                          ("0.tar.bz2", bz2.compress), ("0.tar.xz", lzma.compress)])
def test_packed_tars(name, packed, tmp_path):
    tar = tar_of(tmp_path / "plain", ("b.txt", b"two"), ("a.jpg", PICTURE), ("a.txt", b"one"), ("b.jpg", PICTURE))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(packed(tar.read_bytes()))
    assert told(tmp_path / "in") == [(f"{name}/a.jpg", "kept", "one"), (f"{name}/b.jpg", "kept", "two")]
    (tmp_path / "in" / name).write_bytes(packed(tar.read_bytes())[:-20])
    assert ("broken tar", "") in [row[1:] for row in told(tmp_path / "in")]


LONG = "x" * 300 + "é東.jpg"
TARS = {
    "keys with dots": ([("000.source.jpg", PICTURE), ("000.txt", b"words")], [("000.source.jpg", "kept", "words")]),
    "one name twice": ([("0.jpg", PICTURE), ("0.txt", b"one"), ("0.jpg", PICTURE), ("0.txt", b"two")],
                       [("0.jpg", "kept", "one"), ("0.jpg, number 2 of this name", "kept", "two")]),
    "upper case": ([("0.JPG", PICTURE), ("0.TXT", b"loud")], [("0.JPG", "kept", "loud")]),
    "a long name": ([(LONG, PICTURE), (LONG[:-3] + "caption", b"long")], [(LONG, "kept", "long")]),
    "failed downloads only": ([("0.json", b'{"caption": "x"}')], [(None, "no pictures", "")]),
    "a torn caption": ([("0.jpg", PICTURE), ("0.json", b"{")], [("0.jpg", "kept", "")]),
    "an empty picture": ([("0.jpg", b"")], [("0.jpg", "not a picture", "")]),
}


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("members, found", TARS.values(), ids=TARS)
def test_tars_of_any_habit(members, found, form, tmp_path):
    tar_of(tmp_path / "t.tar", *members, form=form)
    assert told(tmp_path) == [("t.tar" + (f"/{name}" if name else ""), *rest) for name, *rest in found]


def test_links_in_a_tar_are_their_targets(tmp_path):
    path = tar_of(tmp_path / "t.tar", ("0.jpg", PICTURE))
    with tarfile.open(path, "a") as tar:
        for name, target in (("1.jpg", "0.jpg"), ("2.jpg", "gone.jpg")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            tar.addfile(info)
    assert told(tmp_path) == [("t.tar/0.jpg", "kept", ""), ("t.tar/1.jpg", "kept", ""), ("t.tar/2.jpg", "unreadable", "")]


@pytest.mark.parametrize("data, reason", [(b"", "broken tar"), (bytes(10240), "no pictures"), (b"<html>", "broken tar")])
def test_tars_that_are_none(data, reason, tmp_path):
    (tmp_path / "t.tar").write_bytes(data)
    assert told(tmp_path) == [("t.tar", reason, "")]


def test_a_tar_that_is_damaged_keeps_what_is_before_it_and_says_so(tmp_path):
    path = tar_of(tmp_path / "t.tar", *((f"{i}.jpg", jpeg(64, 64, i)) for i in range(3)))
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        header = tar.getmembers()[1].offset
    path.write_bytes(data[:header] + bytes([data[header] ^ 9]) + data[header + 1:])
    assert told(tmp_path) == [("t.tar/0.jpg", "kept", ""), ("t.tar", "broken tar", "")]
    path.write_bytes(data[:header + 700])
    assert told(tmp_path) == [("t.tar/0.jpg", "kept", ""), ("t.tar/1.jpg", "unreadable", ""), ("t.tar", "broken tar", "")]


def test_one_dead_row_of_a_list_is_its_own_reason(tmp_path):
    (tmp_path / "ok.jpg").write_bytes(PICTURE)
    (tmp_path / "x::y.jpg").write_bytes(PICTURE)
    gone = ["a" * 300 + ".jpg", "a\0b.jpg", ".", "ok.jpg/x.jpg", "foo://x/y.jpg", "nowhere.jpg", "C:\\x.jpg", None, ""]
    away = ["http://127.0.0.1:9/x.jpg"]
    good = ["ok.jpg", "x::y.jpg", f"file://{tmp_path}/ok.jpg"]
    found = rows(table_of(tmp_path / "l.parquet", path=gone + away + good))
    assert sorted(row["reason"] for row in found) == sorted(["unreadable"] * len(gone) + ["unreachable"] * len(away) + [""] * len(good))
    assert all(row["detail"] for row in found if row["reason"])
    assert told(table_of(tmp_path / "n.parquet", path=pa.array([1, 2]))) == [("1", "unreadable", ""), ("2", "unreadable", "")]


def test_what_did_not_answer_is_asked_again(tmp_path):
    store = fsspec.filesystem("memory")
    table_of(tmp_path / "l.parquet", path=["memory://late/x.jpg", "http://127.0.0.1:9/x.jpg", str(tmp_path / "a.jpg")])
    (tmp_path / "a.jpg").write_bytes(PICTURE)
    config = prepare.Config(str(tmp_path / "l.parquet"), str(tmp_path / "out"), (64,), workers=1)
    assert prepare.run(config) and Index.read(config.out).rows == 1
    marks = {f: f.stat().st_mtime_ns for f in (tmp_path / "out/_work/scan").iterdir()}
    assert prepare.run(config) and {f: f.stat().st_mtime_ns for f in marks} != marks  # its list has one that did not answer
    assert not store.exists("late/x.jpg")


PICTURES = {
    "structs": (pa.array([{"bytes": PICTURE, "path": None}, None, {"bytes": None, "path": "no.jpg"}], STRUCT),
                ["kept"] + ["unreadable"] * 2),
    "bytes": (pa.array([PICTURE, b"torn", None], pa.binary()), ["kept", "not a picture", "unreadable"]),
    "large bytes": (pa.array([PICTURE], pa.large_binary()), ["kept"]),
    "lists of structs": (pa.array([[{"bytes": PICTURE, "path": None}] * 2, []], pa.list_(STRUCT)), ["kept", "kept", "unreadable"]),
}


@pytest.mark.parametrize("column, reasons", PICTURES.values(), ids=PICTURES)
@pytest.mark.parametrize("name", ["image", "jpg", "Image"])
def test_tables_of_pictures(name, column, reasons, tmp_path):
    path = table_of(tmp_path / "t.parquet", image_path=["elsewhere"] * len(column), **{name: column}, TEXT=[["one", "two"]] * len(column))
    assert [row[1:] for row in told(path)] == [(reason, "one") for reason in reasons]


@pytest.mark.parametrize("values, captions", [([3], ["3"]), ([float("nan")], [""]), ([None], [""]), ([["a", "b"]], ["a"]),
                                              ([{"text": "deep"}], ["deep"]), ([b"bytes"], ["bytes"])])
def test_captions_of_any_type(values, captions, tmp_path):
    assert [row[2] for row in told(table_of(tmp_path / "t.parquet", image=pa.array([PICTURE]), caption=pa.array(values)))] == captions
    assert [row[2] for row in told(table_of(tmp_path / "t.parquet", path=pa.array(["x.jpg"]), caption=pa.array(values)))] == captions


def test_a_broken_table_among_good_ones_is_counted(tmp_path):
    table_of(tmp_path / "a.parquet", image=pa.array([PICTURE]))
    (tmp_path / "b.parquet").write_bytes(b"abc")
    torn = bytearray(table_of(tmp_path / "c.parquet", image=pa.array([jpeg(64, 64, i) for i in range(3)])).read_bytes())
    torn[4:40] = bytes(36)
    (tmp_path / "c.parquet").write_bytes(torn)
    found = [row[1] for row in told(tmp_path)]
    assert sorted(found) == ["broken table", "broken table", "kept"]


def test_names_that_are_no_text(tmp_path):
    name = os.fsdecode(b"caf\xe9.jpg")
    try:
        (tmp_path / name).write_bytes(PICTURE)
    except OSError:
        pytest.skip("this disk takes no such name")
    assert told(tmp_path) == [("caf?.jpg", "kept", "")]


def test_a_progress_bar_counts_bytes_where_only_reading_a_tar_tells(tmp_path):
    tar_of(tmp_path / "t.tar", ("0.jpg", PICTURE))
    (tmp_path / "a.jpg").write_bytes(PICTURE)
    sizes, unit = sources.weigh(sources.listing(str(tmp_path))[0])
    assert unit == "B" and sizes == [len(PICTURE), (tmp_path / "t.tar").stat().st_size]
    (tmp_path / "t.tar").unlink()
    assert sources.weigh(sources.listing(str(tmp_path))[0]) == ([1], " samples")
