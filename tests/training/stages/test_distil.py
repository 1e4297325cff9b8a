"""An adapter that learns from fitted embeddings beside the flow loss."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install -e '.[training]'")
pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install -e '.[training]'")
pytest.importorskip("tensorboard", reason="tensorboard is not installed: pip install -e '.[training]'")

from semantic_diffusion_adapter.training import cli  # noqa: E402
from semantic_diffusion_adapter.training.config import from_toml, write_toml  # noqa: E402
from semantic_diffusion_adapter.training.data.index import Index  # noqa: E402
from semantic_diffusion_adapter.training.engine import Step  # noqa: E402
from semantic_diffusion_adapter.training.objectives.reconstruct import named_hierarchy  # noqa: E402
from semantic_diffusion_adapter.training.stages import invert_settings, settings  # noqa: E402
from semantic_diffusion_adapter.training.stages.adapter import AdapterStage  # noqa: E402
from semantic_diffusion_adapter.training.stages.fits import file_of  # noqa: E402

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def fits(parts, tmp_path_factory) -> Path:
    """All photographs but those of one bucket, fitted to global16."""
    out = tmp_path_factory.mktemp("distil") / "fits"
    base = invert_settings.Base(parts / "flux.safetensors", parts / "vae.safetensors", parts / "text.safetensors", "fp32")
    made = invert_settings.Config(str(parts / "photos"), out, base, preset="global16", resolution=64, steps=3, batch=8, device="cpu")
    write_toml(made, out.with_suffix(".toml"))
    assert cli.main(["invert", "--config", str(out.with_suffix(".toml"))]) == 0
    index = Index.read(str(parts / "photos"))
    assert len(list(out.glob("*.safetensors"))) == len({file_of(index[row]) for row in range(len(index))}) == 19
    return out


def flags(fits: Path, weight: float = 1.0) -> list[str]:
    return ["--fits", str(fits), "--objective.distil", str(weight)]


def test_the_distance_falls(toml, fits, tmp_path):
    file = toml(run=dict(max_steps=40, lr=1e-2, validate_every=40, save_every=40), objective=dict(growth=((1.0, "global16"),)))
    assert cli.main(["train", "adapter", "--config", str(file), *flags(fits)]) == 0
    lines = [json.loads(line) for line in (tmp_path / "toy" / "metrics.jsonl").read_text().splitlines()]
    apart = [line["distil"] for line in lines if "loss" in line]
    assert sum(apart[-8:]) < 0.7 * sum(apart[:8])
    assert all(line["loss"] == pytest.approx(line["flow"] + 0.02 * line["similarity"] + line["distil"], rel=1e-4)
               for line in lines if "loss" in line)


def test_only_its_preset_and_only_what_is_fitted_counts(toml, fits):
    config = from_toml(settings.Config, toml(objective=dict(distil=1.0, growth=((1.0, "global16", "tree64"),)), extra=dict(fits=fits)))
    stage = AdapterStage(config, CPU)
    tokens = torch.randn(2, 16, 20)
    fitted = torch.stack([tokens[0] + stage.adapter.text_std, torch.full((16, 20), torch.nan)])
    sixteen, tree = map(named_hierarchy, ("global16", "tree64"))
    assert stage.objective.distance(tokens, fitted, sixteen).item() == pytest.approx(0.5, rel=1e-4)
    assert stage.objective.distance(tokens, fitted, tree) == 0 == stage.objective.distance(tokens, None, sixteen)
    index = stage.plan.index
    (fits / file_of(index[0])).rename(fits / "away")
    try:
        again = AdapterStage(config, CPU)
        assert again.fits.tokens(index, 0).isnan().all() and again.fits.tokens(index, 1).isfinite().all()
        assert again.identity["fits"] != stage.identity["fits"]
        assert torch.isfinite(again.loss(Step(0, 4, 0, "adapter", CPU, range(4), 4))[0])
    finally:
        (fits / "away").rename(fits / file_of(index[0]))


@pytest.mark.parametrize("growth, weight, words", [
    (((1.0, "tree64"),), 1.0, "are of the preset global16, which objective.growth never takes"),
    (((1.0, "global16"),), 0.0, "Fits and objective.distil belong together"),
])
def test_what_does_not_fit_is_one_sentence(toml, fits, capsys, growth, weight, words):
    file = toml(objective=dict(growth=growth))
    assert cli.main(["train", "adapter", "--config", str(file), *flags(fits, weight)]) == 1
    assert words in capsys.readouterr().err


def test_fits_through_another_base_are_refused(toml, fits, parts, tmp_path, capsys):
    from semantic_diffusion_adapter.kernels import checkpoint

    tensors, record = checkpoint.load(parts / "flux.safetensors", "flux")
    checkpoint.save(tmp_path / "other.safetensors", tensors, "flux", record["config"], step=1)
    file = toml(base=dict(flux=tmp_path / "other.safetensors"), objective=dict(growth=((1.0, "global16"),)))
    assert cli.main(["train", "adapter", "--config", str(file), *flags(fits)]) == 1
    assert "were fitted through another base than" in capsys.readouterr().err
