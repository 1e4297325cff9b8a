"""What ComfyUI's registry delivers: the repository without what .comfyignore names. It works alone, and its pages lead nowhere
outside."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

pytest.importorskip("comfy.sd", reason="no ComfyUI here: set COMFYUI_PATH, or `python3 run.py test` makes one")

import folder_paths  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = [line for line in (ROOT / ".comfyignore").read_text().splitlines() if line and not line.startswith("#")]
# Of the checkout, not of the repository: .gitignore names them.
LOCAL = {".git", ".venv", ".host", "runs", "out", "__pycache__", ".pytest_cache", ".ruff_cache", ".hypothesis"}


def delivered(folder: Path = ROOT) -> list[Path]:
    """Every file of the package. The patterns are plain paths from the top."""
    found = []
    for path in sorted(folder.iterdir()):
        place = f"/{path.relative_to(ROOT).as_posix()}"
        if path.name in LOCAL or path.name.endswith(".egg-info") or {place, f"{place}/"} & set(LEFT_OUT):
            continue
        found += delivered(path) if path.is_dir() else [path]
    return found


def links(page: Path) -> list[str]:
    """The relative ones of a Markdown page, outside its code."""
    text = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"[a-z]+:|#", link)]


def test_what_is_left_out_is_there_to_be_left_out() -> None:
    assert LEFT_OUT and all(re.fullmatch(r"/[\w./]+", line) for line in LEFT_OUT), "`delivered` knows plain paths alone"
    assert [line for line in LEFT_OUT if not (ROOT / line.strip("/")).exists()] == []


def test_links_of_delivered_pages_lead_to_delivered_files() -> None:
    files = set(delivered())
    pages = [path for path in files if path.suffix == ".md"]
    assert {ROOT / "README.md", ROOT / "example_workflows" / "README.md"} <= set(pages)
    dead = [(page.name, link) for page in pages for link in links(page)
            if (page.parent / unquote(link.split("#")[0])).resolve() not in files]  # fmt: skip
    assert dead == []


def test_links_of_all_pages_lead_to_files() -> None:
    pages = [page for page in ROOT.rglob("*.md") if not LOCAL & set(page.relative_to(ROOT).parts)]
    dead = [(page.name, link) for page in pages for link in links(page)
            if not (page.parent / unquote(link.split("#")[0])).exists()]  # fmt: skip
    assert len(pages) > 20 and dead == []


def test_the_package_works_alone(tmp_path: Path) -> None:
    pack = tmp_path / "semantic-diffusion-adapter"
    for path in delivered():
        target = pack / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    # As core loads a pack: from its folder, whose name is no identifier.
    load = """
import asyncio, importlib.util, sys
core, pack = sys.argv[1:]
sys.path[:], sys.argv[1:] = [core, *(path for path in sys.path if path)], ["--cpu"]
import comfy.options
comfy.options.enable_args_parsing()
spec = importlib.util.spec_from_file_location(pack, f"{pack}/__init__.py", submodule_search_locations=[pack])
module = sys.modules[pack] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
nodes = asyncio.run(asyncio.run(module.comfy_entrypoint()).get_node_list())
(miniature,) = (node for node in nodes if node.GET_SCHEMA().node_id == "SDALoadMiniature")
print(len(nodes), all(miniature.fingerprint_inputs().split("|")))
"""
    core = str(Path(folder_paths.__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", load, core, str(pack)], capture_output=True, text=True, cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    count, weights = done.stdout.split()[-2:]
    assert int(count) > 20 and weights == "True", "a file of the miniature is not delivered"
