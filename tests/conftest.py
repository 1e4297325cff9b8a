"""What several folders of tests share: one real ComfyUI per session, and the reasons to skip."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# `python -m pytest` puts the repository on sys.path, where `kernels` and `nodes` would hide other packages' modules.
sys.path[:] = [folder for folder in sys.path if Path(folder or ".").resolve() != ROOT]

# PyTorch's compiler then believes the CPU, instead of compiling a program for every instruction set that it says it has.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

from semantic_diffusion_adapter.runner.client import Client  # noqa: E402
from semantic_diffusion_adapter.runner.environment import STAMP, prepare  # noqa: E402
from semantic_diffusion_adapter.runner.server import Server, serve  # noqa: E402
from semantic_diffusion_adapter.runner.workflow import to_prompt  # noqa: E402

WORKFLOW = ROOT / "example_workflows" / "01 Reconstruct and edit (miniature).json"
MINIATURE = ROOT / "assets" / "miniature"
SHIPPED = (
    "diffusion_models/miniature_flux",
    "vae/miniature_vae",
    "text_encoders/miniature_t5",
    "clip_vision/miniature_clip",
    "clip_vision/miniature_dinov2",
    "semantic_adapters/miniature_tree128",
    "edit_decoders/miniature_editor",
)


def pytest_configure() -> None:
    # Tests send signals to what they start. nohup leaves a closed terminal ignored, which children would inherit; with a
    # handler this process still outlives the terminal, and its children begin as any program does.
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda number, frame: None)


# Folders whose tests stay in one process of several, for they share a ComfyUI or a miniature of random weights.
TOGETHER = ("tests/browser", "tests/training/miniature", "tests/host")
# Those and the files that take a minute or nearly one by themselves, the longest first.
LONG = (*TOGETHER, *(f"tests/{name}.py" for name in (
    "training/engine/test_kills", "training/test_recipes", "training/engine/test_ranks", "nodes/test_stock_flux",
    "nodes/test_flux_company", "training/data/test_prepare", "training/stages/test_held_out", "training/test_walkthrough")))


def scope(nodeid: str) -> str:
    """What stays in one process of several: such a folder, and each file, for its fixtures are made once."""
    file = nodeid.split("::")[0]
    return next((folder for folder in TOGETHER if file.startswith(f"{folder}/")), file)


def place(item: pytest.Item) -> int:
    """What takes long is begun first, so that no process of several waits for another at the end."""
    where = scope(item.nodeid)
    return LONG.index(where) if where in LONG else len(LONG)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return scope(nodeid)

    config.option.loadscopereorder = False  # in the order of `place`, not those with the most tests first
    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=place)
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> object:
    report = yield
    if report.skipped and item.get_closest_marker("browser") and os.environ.get("SDA_REQUIRE_BROWSER"):
        report.outcome, report.longrepr = "failed", f"may not be skipped here, but: {report.longrepr[-1]}"
    return report


@pytest.fixture(scope="session")
def server() -> Server:
    """A real ComfyUI with this pack: COMFYUI_PATH's, or the one that run.py has set up."""
    if not os.environ.get("COMFYUI_PATH") and not STAMP.exists():
        pytest.skip("no ComfyUI here; `python3 run.py test` makes one")
    with serve(prepare()) as running:
        yield running


@pytest.fixture(scope="session")
def client(server: Server) -> Client:
    return Client(server.url)


@pytest.fixture(scope="session")
def nodes(client: Client) -> dict:
    """/object_info of the running ComfyUI."""
    return client.json("/object_info")


@pytest.fixture(scope="session")
def miniature() -> Path:
    """The folder of the shipped weights."""
    absent = [name for name in SHIPPED if not (MINIATURE / f"{name}.safetensors").is_file()]
    if absent:
        pytest.skip(f"the miniature's weights are not in assets/miniature: {', '.join(absent)}")
    return MINIATURE


@pytest.fixture
def template(nodes: dict, miniature: Path) -> dict:
    """The bundled template as an API prompt, new for every test."""
    return to_prompt(json.loads(WORKFLOW.read_text(encoding="utf-8")), nodes)
