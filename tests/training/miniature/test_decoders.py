"""The comparison of the edit decoders, on a miniature of random weights."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install -e '.[training]'")

from semantic_diffusion_adapter.benchmarks import decoders  # noqa: E402
from semantic_diffusion_adapter.kernels import checkpoint  # noqa: E402
from semantic_diffusion_adapter.kernels.edit_decoder import LLMEditDecoder, LLMEditDecoderConfig, T5EditDecoder  # noqa: E402
from semantic_diffusion_adapter.training.objectives.edit import load_editor  # noqa: E402

pytestmark = pytest.mark.usefixtures("few_steps")
CPU = torch.device("cpu")


@pytest.fixture
def files(toy_assets, tmp_path) -> dict[str, Path]:
    """A T5 that answers at random, and an LLM that copies its source."""
    t5 = toy_assets / "edit_decoders" / "miniature_editor.safetensors"
    config = load_editor(t5, CPU)[0].config
    llm = LLMEditDecoder(LLMEditDecoderConfig(config.dim, config.text_dim, config.hierarchy, {
        "model_type": "qwen3", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8}))
    path = tmp_path / "llm.safetensors"
    checkpoint.save(path, llm.state_dict(), "edit_decoder", llm.config.to_json(), step=7)
    return {"t5": t5, "llm": path}


def test_the_page_says_what_each_decoder_does_and_costs(toy_assets, files, capsys, monkeypatch):
    monkeypatch.setattr(decoders, "TURNS", 1)
    monkeypatch.setattr(decoders, "MANY", 2)
    flags = ["--t5", str(files["t5"]), "--llm", str(files["llm"]), "--scenes", "5", "--json", "--assets", str(toy_assets)]
    before = decoders.PAGE.read_bytes() if decoders.PAGE.exists() else None
    assert decoders.main(flags) == 0
    *lines, last = capsys.readouterr().out.strip().splitlines()
    results = json.loads(last)
    ways = ["T5, parallel", "T5, autoregressive", "causal LLM, parallel"]
    assert list(results["quality"]) == [*ways, "oracle", "copy"] and list(results["time_of_one"]) == ways
    assert results["quality"]["causal LLM, parallel"] == results["quality"]["copy"], "it copies"
    assert results["steps"] == {"t5": 0, "llm": 7} and results["time_of_many"]["T5, parallel"] == 1.0
    assert results["parameters"]["llm"] == sum(p.numel() for p in load_editor(files["llm"], CPU)[0].parameters())
    assert isinstance(load_editor(files["t5"], CPU)[0], T5EditDecoder) and isinstance(load_editor(files["llm"], CPU)[0], LLMEditDecoder)
    rows = [line for line in lines if line.startswith(("| T5", "| causal", "| oracle", "| copy"))]
    assert len(rows) == 8 and f"| {results['parameters']['llm']:,} | 7 |" in rows[-1]
    assert (decoders.PAGE.read_bytes() if decoders.PAGE.exists() else None) == before, "only the default run is kept"


def test_both_are_trained_by_their_stages_for_the_same_steps(monkeypatch):
    calls = []
    monkeypatch.setattr(decoders.cli, "main", lambda argv: calls.append(argv) or 0)
    files = decoders.train(300)
    assert [call[:2] for call in calls] == [["miniature", "editor"], ["miniature", "editor-llm"]]
    for call, name in zip(calls, files):
        flags = dict(zip(call[2::2], call[3::2]))
        assert flags["--run.max-steps"] == "300" and flags["--export"] == str(files[name])
    monkeypatch.setattr(decoders.cli, "main", lambda argv: 130)
    with pytest.raises(SystemExit) as stopped:
        decoders.train(300)
    assert stopped.value.code == 130


def test_what_is_missing_is_said(toy_assets, files, tmp_path, capsys):
    for flags in ([], ["--t5", "x"], ["--train", "5", "--t5", "x"], ["--train", "0"]):
        with pytest.raises(SystemExit):
            decoders.main(flags)
        assert "--train" in capsys.readouterr().err
    torch.manual_seed(0)
    flags = ["--t5", str(tmp_path / "gone.safetensors"), "--llm", str(files["llm"]), "--scenes", "2", "--assets", str(toy_assets)]
    assert decoders.main(flags) == 1
    assert "gone.safetensors: put the file there" in capsys.readouterr().err.splitlines()[-1]
