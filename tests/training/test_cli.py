"""The `sda` command: which stages run, and how it ends."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("tyro", reason="tyro is not installed: pip install -e '.[training]'")

from semantic_diffusion_adapter.training import cli  # noqa: E402
from semantic_diffusion_adapter.training.miniature import preview  # noqa: E402


def test_scenes_are_written_where_the_flags_say(tmp_path):
    flags = ["--out", str(tmp_path / "look"), "--bundled", str(tmp_path / "scene.png"), "--count", "2"]
    assert cli.main(["miniature", "scenes", *flags]) == 0
    assert len(list((tmp_path / "look").glob("*.png"))) == 4 and (tmp_path / "scene.png").is_file()


def test_all_ends_where_a_stage_was_stopped(monkeypatch):
    ran = []

    def stopped(config: preview.Config) -> bool:
        ran.append(config)
        return False

    monkeypatch.setattr(cli, "importlib", SimpleNamespace(import_module=lambda *names: SimpleNamespace(
        Config=preview.Config, run=stopped)))
    assert cli.main(["miniature", "all"]) == 130
    assert len(ran) == 1
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert cli.main(["miniature", "all"]) == 0, "torchrun starts anew what does not return 0"


@pytest.mark.parametrize(("arguments", "code"), [([], 2), (["miniature", "vea"], 2), (["--help"], 0)])
def test_a_wrong_stage_gets_the_usage(arguments, code, capsys):
    assert cli.main(arguments) == code
    assert "in their order: scenes, vae, text, base" in capsys.readouterr().out


def test_a_folder_that_cannot_be_is_one_sentence(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(["miniature", "scenes", "--out", str(tmp_path / "file"), "--bundled", str(tmp_path / "s.png")]) == 1
    assert capsys.readouterr().err.startswith("sda: ")


def test_ctrl_c_before_a_run_has_begun_is_one_sentence(monkeypatch, capsys):
    def loading(config: preview.Config) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "importlib", SimpleNamespace(import_module=lambda *names: SimpleNamespace(Config=preview.Config, run=loading)))
    assert cli.main(["miniature", "scenes"]) == 130
    assert capsys.readouterr().err == "sda: stopped; the same command goes on where it was.\n"


def test_no_library_heads_a_command_with_words_of_its_own(tmp_path):
    """`sda plan` imports all that a training does."""
    pytest.importorskip("torchao", reason="torchao is not installed: pip install -e '.[training]'")
    found = subprocess.run([sys.executable, "-P", "-m", "semantic_diffusion_adapter.training.cli", "plan", "--help"], cwd=tmp_path,
                           capture_output=True, text=True, timeout=120) if sys.version_info >= (3, 11) else pytest.skip("no -P")
    assert found.returncode == 0 and "torchao` Tensor" not in found.stderr + found.stdout and found.stderr == ""
