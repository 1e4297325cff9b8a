from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from semantic_diffusion_adapter.runner import environment
from semantic_diffusion_adapter.runner.environment import Failure, module, prepare

ROOT = Path(__file__).resolve().parents[2]


def test_a_folder_without_comfyui_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(Failure, match="holds no main.py"):
        prepare()


def test_a_comfyui_without_a_python_asks_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "main.py").touch()
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    monkeypatch.delenv("COMFYUI_PYTHON", raising=False)
    with pytest.raises(Failure, match="set COMFYUI_PYTHON"):
        prepare()


def test_what_a_foreign_python_lacks_is_named_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "main.py").touch()
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    monkeypatch.setenv("COMFYUI_PYTHON", sys.executable)
    with pytest.raises(Failure, match="lacks no_such_module; run: .* -m pip install -e"):
        prepare(("no_such_module",))


def test_half_installed_packages_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "lib" / "python3.11" / "site-packages"
    for name, files in {"whole": ("RECORD", "INSTALLER"), "cut": ("RECORD",)}.items():
        (site / f"{name}-1.0.dist-info").mkdir(parents=True)
        for file in files:
            (site / f"{name}-1.0.dist-info" / file).touch()
    monkeypatch.setattr(environment, "VENV", tmp_path)
    environment._forget_half_installed()
    assert [folder.name for folder in site.iterdir()] == ["whole-1.0.dist-info"]


def test_a_module_runs_without_the_working_directory_on_its_path(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('the wrong json')")
    command = module(Path(sys.executable), "json.tool", ["--indent", "1", "-"])
    done = subprocess.run(command, cwd=tmp_path, input="[1]", capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[\n 1\n]\n"), done.stderr


def test_the_requirements_pin_nothing_and_leave_torch_alone() -> None:
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert lines and all(line.replace("_", "").isalnum() for line in lines)
    assert not {"torch", "torchvision", "torchaudio"} & set(lines)


def test_run_py_needs_nothing_but_the_standard_library() -> None:
    isolated = [sys.executable, "-I", "-S", "-c", "import sys; sys.path.insert(0, sys.argv[1]); import run"]
    done = subprocess.run([*isolated, str(ROOT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
