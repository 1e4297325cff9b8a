"""`sda prepare`: what goes in and what comes out, byte for byte the same whoever does the work and however often he dies."""
from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import psutil
import pytest
from PIL import Image

for package in ("pyarrow", "webdataset"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install -e '.[training,test]'")

import fsspec  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import webdataset  # noqa: E402
from semantic_diffusion_adapter.training.data import choice, pipeline, prepare, shards, sources, tasks  # noqa: E402
from semantic_diffusion_adapter.training.data.decode import decode  # noqa: E402
from semantic_diffusion_adapter.training.data.index import Index  # noqa: E402

from .conftest import jpeg  # noqa: E402

SIZES = {"resolutions": (256, 384), "shard_mb": 1, "workers": 1}


def prepared(source, out, **settings) -> Index:
    assert prepare.run(prepare.Config(str(source), str(out), **SIZES | settings))
    return Index.read(str(out))


def contents(out: Path) -> dict[str, str]:
    """Digests of all that a preparation is for; parquet files by what they say."""
    found = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in [*out.glob("shards/*"), out / "report.json"]}
    return found | {name: str(pq.read_table(out / name).to_pylist()) for name in ("index.parquet", "report.parquet")}


@pytest.fixture(scope="module")
def usual(photographs, tmp_path_factory) -> Path:
    """The photographs as two processes prepare them."""
    out = tmp_path_factory.mktemp("prepared") / "set"
    prepared(photographs, out, workers=2)
    return out


def test_what_is_kept_and_what_is_dropped(usual, photographs):
    index, report = Index.read(str(usual)), json.loads((usual / "report.json").read_text(encoding="utf-8"))
    assert report["dropped"] == {"small": 1, "broken": 1, "not a picture": 1, "duplicate": 1}
    assert report["kept"] == len(index) == 78 and report["with_caption"] == 2 and report["files_passed_over"] == {"pdf": 1}
    dropped = {row["origin"]: row["detail"] for row in pq.read_table(usual / "report.parquet").to_pylist()}
    assert dropped["deep/er/rocket.jpg"] == "the same as again.jpg" and "truncated" in dropped["torn.jpg"]
    assert dropped["little.png"] == "300 x 200, shorter side below 256"
    rows = {row["origin"]: (i, row) for i, row in enumerate(index)}
    assert rows["again.jpg"][1]["caption"] == "a rocket on its pad" and rows["china.jpg"][1]["caption"] == "a temple"
    for origin, (i, row) in rows.items():
        assert index.read_member(i) == (photographs / origin).read_bytes()  # as they were, not encoded again
        with Image.open(photographs / origin) as image:
            assert (row["width"], row["height"]) == image.size
        assert (row["bucket_384"] == [0, 0]) == (min(image.size) < 384)
    assert sum(report["buckets_height_x_width"]["384"].values()) == 78
    assert decode(index, rows["print.jpg"][0], (256, 384)).shape == (3, 256, 384)
    assert len(list((usual / "shards").iterdir())) > 2


def test_other_programs_read_the_shards(usual):
    shards = sorted(str(p) for p in (usual / "shards").iterdir())
    samples = list(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False))
    index = Index.read(str(usual))
    assert [s["__key__"] for s in samples] == [row["key"] for row in index]
    assert [s.get("txt", b"").decode() for s in samples] == [row["caption"] for row in index]


def test_two_nodes_of_ray_write_the_same_bytes(two_nodes, usual, photographs, tmp_path):
    prepared(photographs, tmp_path / "set", ray=True)
    assert contents(tmp_path / "set") == contents(usual)


def test_one_process_of_the_command_writes_the_same_bytes(usual, photographs, tmp_path):
    out = tmp_path / "set"
    line = [sys.executable, "-m", "semantic_diffusion_adapter.training.cli", "prepare", "--source", str(photographs), "--out", str(out),
            "--resolutions", "256", "384", "--shard-mb", "1", "--workers", "1"]
    ran = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert "78 samples in" in ran.stdout and "4 dropped: " in ran.stdout
    assert contents(out) == contents(usual)


def test_what_was_stopped_goes_on_without_doing_anything_twice(usual, photographs, tmp_path, capsys):
    out, over = tmp_path / "set", threading.Event()

    def stop() -> None:
        while not over.wait(0.01):
            if list(out.glob("_work/scan/*.parquet")):
                os.kill(os.getpid(), signal.SIGTERM)
                return

    stopper = threading.Thread(target=stop)
    stopper.start()
    done = prepare.run(prepare.Config(str(photographs), str(out), **SIZES))
    over.set()
    stopper.join()
    assert done is False and "The same line goes on" in capsys.readouterr().out and not (out / "index.parquet").exists()
    marks = {f: f.stat().st_mtime_ns for f in out.glob("_work/*/*.parquet")}
    prepared(photographs, out)
    assert contents(out) == contents(usual)
    assert marks and {f: f.stat().st_mtime_ns for f in marks} == marks and not list(out.rglob("*.writing"))


class Stuck:
    """A picture that cannot be read: `reader()` is the one worker, once it does nothing but wait for it."""

    def __init__(self, path: Path):
        self.path, self.data = path, path.read_bytes()
        path.unlink()
        os.mkfifo(path)  # whoever opens it waits
        self.others = {process.pid for process in psutil.Process().children(recursive=True)}  # of tests before this one

    def reader(self) -> psutil.Process:
        seen, steady = None, 0
        for _ in range(2400):
            time.sleep(0.05)
            try:
                now = [(p.pid, p.status(), p.cpu_times()[:2]) for p in psutil.Process().children(recursive=True)
                       if p.pid not in self.others and "spawn_main" in " ".join(p.cmdline())
                       and p.status() != psutil.STATUS_ZOMBIE]
            except psutil.Error:  # one that has just ended
                now = []
            waits = len(now) == 1 and now[0][1] != psutil.STATUS_RUNNING and sum(now[0][2]) > 0.1
            steady = steady + 1 if waits and now == seen else 0
            seen = now
            if steady == 10:
                return psutil.Process(now[0][0])
        raise AssertionError("nobody reads it")

    def release(self) -> None:
        self.path.with_suffix(".new").write_bytes(self.data)
        self.path.with_suffix(".new").replace(self.path)


def beside(work, run) -> None:
    """Run with `work` in another thread; what goes wrong in it is this one's."""
    wrong = []

    def guarded() -> None:
        try:
            work()
        except BaseException as error:
            wrong.append(error)

    thread = threading.Thread(target=guarded)
    thread.start()
    try:
        run()
    finally:
        thread.join()
    assert not wrong, wrong


@pytest.fixture
def stuck_list(photographs, tmp_path):
    """(a table of paths, one that can get stuck among them)"""
    late, files = tmp_path / "late.jpg", sorted(str(f) for f in photographs.glob("made_*"))[:40]
    late.write_bytes(jpeg(300, 400, 99))
    pq.write_table(pa.table({"path": [*files, str(late)] + files[:2]}), tmp_path / "list.parquet")
    return tmp_path / "list.parquet", late


def test_killed_workers_lose_and_double_nothing(stuck_list, tmp_path):
    (table, late), once, out = stuck_list, tmp_path / "once", tmp_path / "set"
    prepared(table, once)

    def kill_one(stuck: Stuck) -> None:
        victim = stuck.reader()
        stuck.release()
        victim.kill()

    for _ in ("examining", "writing"):
        stuck = Stuck(late)
        beside(lambda stuck=stuck: kill_one(stuck), lambda: prepared(table, out, workers=1))
        assert contents(out) == contents(once) and Index.read(str(out)).rows == 41
        assert not list(out.rglob("*.writing"))
        for file in [*out.glob("shards/*"), *out.glob("_work/shards/*"), out / "index.parquet"]:
            file.unlink()


def test_a_task_that_always_kills_its_worker_is_given_up(stuck_list, tmp_path):
    table, late = stuck_list
    stuck = Stuck(late)

    def kill_all() -> None:
        for _ in range(tasks.DEATHS):
            victim = stuck.reader()
            victim.kill()
            while victim.is_running():  # not waited for: that is the parent's to do
                time.sleep(0.05)

    def fails() -> None:
        died = r"3 workers died over list.parquet, row group 0, 43 rows from 0 on \(exit code -9\); mostly the memory is short"
        with pytest.raises(ValueError, match=died):
            prepared(table, tmp_path / "set", workers=1)

    beside(kill_all, fails)


def command(table: Path, out: Path) -> list[str]:
    """`sda prepare` with one worker, as a process of its own."""
    module = "semantic_diffusion_adapter.training.cli"
    return [sys.executable, "-m", module, "prepare", "--source", str(table), "--out", str(out), "--resolutions", "256",
            "--workers", "1"]


def test_workers_die_with_their_parent(stuck_list, tmp_path):
    table, late = stuck_list
    stuck = Stuck(late)
    parent = subprocess.Popen(command(table, tmp_path / "set"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    worker = stuck.reader()
    parent.kill()
    assert psutil.wait_procs([worker], 20)[0] == [worker]
    parent.wait()


def test_ctrl_c_of_a_terminal_ends_in_a_sentence(stuck_list, tmp_path):
    table, late = stuck_list
    stuck = Stuck(late)
    parent = subprocess.Popen(command(table, tmp_path / "set"), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              text=True, start_new_session=True)
    worker = stuck.reader()
    os.killpg(parent.pid, signal.SIGINT)  # to every process, as a terminal does
    out, err = parent.communicate(timeout=60)
    assert parent.returncode == 130 and "The same line goes on from here" in out and "Traceback" not in err
    assert not worker.is_running()


def test_ray_that_is_not_there_is_a_sentence(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "ray", None)
        with pytest.raises(ValueError, match="Ray is not installed: pip install ray; or leave --ray and --ray-address out"):
            with pipeline.workers(ray=True):
                pass
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install -e '.[ray]'")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # whatever the other tests have started
    for address in ("127.0.0.1:9", "nonsense"):
        with pytest.raises(ValueError, match=f"No Ray cluster answers at {address} .*; start one with `ray start --head`, or leave"):
            with pipeline.workers(address=address):
                pass


def tar_of(folder: Path, name: str, members: dict[str, bytes]) -> None:
    with tarfile.open(folder / name, "w") as tar:
        for member, data in members.items():
            info = tarfile.TarInfo(member)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_tars_with_their_captions_and_one_torn(tmp_path):
    source = tmp_path / "tars"
    source.mkdir()
    tar_of(source, "00000.tar", {"000.jpg": jpeg(256, 256, 1), "000.txt": b"one\n", "000.json": b'{"caption": "no"}',
                                 "001.jpg": jpeg(256, 300, 2), "001.json": b'{"caption": "two"}', "002.json": b"{}"})
    tar_of(source, "00001.tar", {"100.jpg": jpeg(256, 256, 3), "101.jpg": jpeg(256, 256, 4), "102.jpg": jpeg(256, 256, 1)})
    tar_of(source, "00002.tar", {"200.jpg": jpeg(256, 256, 5), "201.jpg": jpeg(256, 256, 6)})
    data = (source / "00002.tar").read_bytes()
    (source / "00002.tar").write_bytes(data[:512 + (len(jpeg(256, 256, 5)) + 511) // 512 * 512 + 512 + 700])
    (source / "00000.parquet").write_bytes(b"img2dataset's notes")
    index = prepared(source, tmp_path / "set")
    assert [(row["origin"], row["caption"]) for row in index] == [
        ("00000.tar/000.jpg", "one"), ("00000.tar/001.jpg", "two"), ("00001.tar/100.jpg", ""), ("00001.tar/101.jpg", ""),
        ("00002.tar/200.jpg", "")]
    dropped = {row["origin"]: row["reason"] for row in pq.read_table(tmp_path / "set/report.parquet").to_pylist()}
    assert dropped == {"00001.tar/102.jpg": "duplicate", "00002.tar": "broken tar", "00002.tar/201.jpg": "unreadable"}


def test_a_table_of_paths_and_a_table_of_pictures(photographs, tmp_path):
    names = ["china.jpg", "deep/er/flower.jpg", "gone.jpg", None]
    table = pa.table({"image_path": [str(photographs / names[0]), f"file://{photographs / names[1]}", names[2], names[3]],
                      "text": ["temple", None, "", "x"]})
    pq.write_table(table, tmp_path / "list.parquet")
    index = prepared(tmp_path / "list.parquet", tmp_path / "paths")
    assert sorted((Path(row["origin"]).name, row["caption"]) for row in index) == [("china.jpg", "temple"), ("flower.jpg", "")]
    dropped = pq.read_table(tmp_path / "paths/report.parquet").to_pylist()
    assert [row["reason"] for row in dropped] == ["unreadable"] * 2 and "gone.jpg" in str(dropped)
    pictures = [{"bytes": (photographs / names[0]).read_bytes(), "path": None}, {"bytes": None, "path": "gone.jpg"}]
    pq.write_table(pa.table({"cover": pictures, "words": ["temple", "x"]}), tmp_path / "own.parquet", row_group_size=1)
    index = prepared(f"file://{tmp_path}/own.parquet", f"file://{tmp_path}/own", path_column="cover", caption_column="words")
    assert [row["caption"] for row in index] == ["temple"] and index.read_member(0) == pictures[0]["bytes"]
    with pytest.raises(ValueError, match="own.parquet in .* has no column path or .*, only cover, words; .* --path-column"):
        prepared(tmp_path / "own.parquet", tmp_path / "x")


def test_a_long_table_of_paths_is_read_in_runs_of_rows(tmp_path, monkeypatch):
    """By its workers, so that what the driver holds of a table does not grow with its rows."""
    monkeypatch.setattr(sources, "NAMED", 3)
    for i in range(11):
        (tmp_path / f"{i:02}.jpg").write_bytes(jpeg(256, 256, i))
    names = [f"{i:02}.jpg" for i in range(10, -1, -1)]
    pq.write_table(pa.table({"path": names, "text": [f"of {n}" for n in names]}), tmp_path / "list.parquet",
                   row_group_size=7)
    chunks, _ = sources.listing(str(tmp_path / "list.parquet"))
    assert [(c["group"], c["first"], c["rows"]) for c in chunks] == [(0, 0, 3), (0, 3, 3), (0, 6, 1), (1, 0, 3), (1, 3, 1)]
    assert not any(name in str(chunks) for name in names)
    found = [f for c in chunks for f in sources.read(c)]
    assert [f.origin for f in found] == names and [f.texts["caption"] for f in found] == [f"of {n}" for n in names]
    assert [f.origin for f in sources.read(chunks[1], {0, 2})] == [names[3], names[5]]
    index = prepared(tmp_path / "list.parquet", tmp_path / "set")
    assert [row["origin"] for row in index] == names and index.read_member(4) == (tmp_path / names[4]).read_bytes()


def test_a_source_that_grew_or_a_lost_shard_is_made_good(tmp_path):
    source, out = tmp_path / "in", tmp_path / "set"
    source.mkdir()
    for i in range(3):
        (source / f"{i}.jpg").write_bytes(jpeg(256, 256, i))
    first = prepared(source, out)
    (out / "shards/000000.tar").unlink()
    assert prepared(source, out).read_member(2) == (source / "2.jpg").read_bytes() == first.read_member(2)
    (source / "0a.jpg").write_bytes(jpeg(256, 256, 9))
    assert [row["origin"] for row in prepared(source, out)] == ["0.jpg", "0a.jpg", "1.jpg", "2.jpg"]
    for name in ("0.jpg", "1.jpg", "2.jpg", "0a.jpg"):
        (source / name).write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"Of 4 samples none is left \(4 not a picture\)"):
        prepared(source, out)


@pytest.mark.parametrize("source, message", [
    ("nowhere", "There is no .*nowhere; give a folder, a file, or a glob"),
    ("empty", "holds no pictures"),
])
def test_no_source_is_a_sentence(source, message, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=message):
        prepare.run(prepare.Config(str(tmp_path / source), str(tmp_path / "out")))


def test_an_object_store_is_read_and_written_without_a_local_file(tmp_path):
    source, out = f"memory://{tmp_path}/in", f"memory://{tmp_path}/set"
    fs = fsspec.filesystem("memory")
    for i in range(3):
        fs.pipe_file(f"{tmp_path}/in/{i}.jpg", jpeg(256, 256, i))
    fs.pipe_file(f"{tmp_path}/in/1.txt", b"second")
    config = prepare.Config(source, out, (256,))
    chunks, _ = sources.listing(source)
    scan = prepare.scan_task(out, chunks[0], 256)
    assert shards.scan(scan) == {"samples": 3}
    root = f"{tmp_path}/set"
    marks = [f"{root}/_work/scan/{scan['mark'].rsplit('/', 1)[1]}"]
    written, = prepare.layout(choice.choose(fs, marks), chunks, marks, out, "pictures", config)
    assert shards.write(written) == {"samples": 3}
    prepare.write_index(fs, root, 1, "pictures", config, lambda buckets: None)
    index = Index.read(out)
    assert index[1]["caption"] == "second" and [index.read_member(i) for i in range(3)] == [jpeg(256, 256, i) for i in range(3)]
    before = fs.cat_file(f"{root}/shards/000000.tar")
    fs.pipe_file(f"{tmp_path}/in/2.jpg", jpeg(256, 256, 77))
    assert shards.write(written) == {"samples": 3}  # found done: nothing is read
    fs.rm_file(f"{root}/_work/shards/000000.parquet")
    with pytest.raises(ValueError, match="in/2.jpg has changed while it was being prepared|2.jpg has changed"):
        shards.write(written)
    assert len(before) and not fs.exists(f"{root}/_work/shards/000000.parquet") and not fs.exists(f"{root}/index.parquet")
