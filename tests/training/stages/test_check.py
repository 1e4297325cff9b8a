from __future__ import annotations

import pytest
import torch

pytest.importorskip("tyro", reason="tyro is not installed: pip install -e '.[training]'")

from semantic_diffusion_adapter.kernels import checkpoint  # noqa: E402
from semantic_diffusion_adapter.training.cli import main  # noqa: E402


def test_files_of_any_size_are_checked_on_request(tmp_path, capsys, miniature, monkeypatch):
    path, old = tmp_path / "a.safetensors", next((miniature / "vae").iterdir())
    checkpoint.save(path, {"x": torch.ones(8)}, "adapter", {})
    monkeypatch.setattr(checkpoint, "QUICK", 0)
    assert main(["check", str(path), str(old)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{path} is as it was saved.", f"{old} was saved before there were digests: only its form is checked.",
    ]  # fmt: skip
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    assert main(["check", str(path)]) == 1
    assert "numbers in its tensors were changed" in capsys.readouterr().err
