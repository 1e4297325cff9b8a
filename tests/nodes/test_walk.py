"""The cached walk against a plain one, while files and folders come and go."""

from __future__ import annotations

import os
import random
import shutil
import sys
from pathlib import Path

import pytest

pytest.importorskip("comfy.sd", reason="no ComfyUI here: set COMFYUI_PATH, or `python3 run.py test` makes one")

from semantic_diffusion_adapter.nodes.host import walk  # noqa: E402

OURS = b"ours"


class Asked(list):
    """Whether a file begins as ours does, and which files were asked for."""

    def __call__(self, path: str) -> bool:
        self.append(Path(path).name)
        return Path(path).read_bytes() == OURS


def plain(folder: Path) -> list[str]:
    files = (path for path in folder.rglob("*.safetensors") if path.is_file() and path.read_bytes() == OURS)
    return sorted(path.relative_to(folder).as_posix() for path in files)


def age(*paths: Path) -> None:
    """As if nothing had changed for an hour."""
    for path in paths:
        state = path.stat()
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns - 3_600_000_000_000))


def test_it_finds_what_a_plain_walk_finds(tmp_path: Path) -> None:
    chance, found = random.Random(0), walk.Walk(".safetensors", Asked())
    for _ in range(300):
        folders = [tmp_path, *(path for path in tmp_path.rglob("*") if path.is_dir())]
        place, name = chance.choice(folders), str(chance.randrange(6))
        match chance.randrange(5):
            case 0 if len(folders) < 12:
                (place / f"folder {name}").mkdir(exist_ok=True)
            case 1 if place != tmp_path:
                shutil.rmtree(place)
            case 2:
                (place / f"{name}.safetensors").unlink(missing_ok=True)
            case 3:
                (place / f"{name}.png").touch()
            case _:
                (place / f"{name}.safetensors").unlink(missing_ok=True)  # writing into a file does not change its folder
                (place / f"{name}.safetensors").write_bytes(chance.choice((OURS, b"another", b"")))
        if chance.random() < 0.3:
            age(*(path for path in (tmp_path, *tmp_path.rglob("*")) if chance.random() < 0.5))
        assert found.below(str(tmp_path)) == plain(tmp_path)


def test_what_has_settled_is_neither_listed_nor_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for name in ("a/1", "a/2", "b/3"):
        (tmp_path / f"{name}.safetensors").write_bytes(OURS)
    age(*tmp_path.rglob("*.safetensors"), tmp_path / "a", tmp_path / "b", tmp_path)
    listed, real, asked = [], os.scandir, Asked()
    monkeypatch.setattr(os, "scandir", lambda folder: (listed.append(Path(folder).name), real(folder))[1])
    found = walk.Walk(".safetensors", asked)
    expected = ["a/1.safetensors", "a/2.safetensors", "b/3.safetensors"]
    assert found.below(str(tmp_path)) == expected
    listed.clear(), asked.clear()
    assert found.below(str(tmp_path)) == expected and listed == asked == []
    (tmp_path / "b" / "4.safetensors").write_bytes(OURS)
    assert found.below(str(tmp_path)) == [*expected, "b/4.safetensors"]
    assert listed == ["b"] and asked == ["4.safetensors"]


def test_a_file_that_is_still_being_written_is_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(OURS[:-1])
    age(tmp_path)  # the folder does not change while the file grows
    found = walk.Walk(".safetensors", Asked())
    assert found.below(str(tmp_path)) == []
    path.write_bytes(OURS)
    assert found.below(str(tmp_path)) == ["a.safetensors"]


def test_a_folder_that_is_not_there_holds_nothing(tmp_path: Path) -> None:
    assert walk.Walk(".safetensors", Asked()).below(str(tmp_path / "absent")) == []


@pytest.mark.skipif(sys.platform == "win32", reason="links need special rights on Windows")
def test_a_circle_of_links_ends(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.safetensors").write_bytes(OURS)
    (tmp_path / "a" / "up").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "broken").symlink_to(tmp_path / "absent")
    assert walk.Walk(".safetensors", Asked()).below(str(tmp_path)) == ["a/1.safetensors"]
