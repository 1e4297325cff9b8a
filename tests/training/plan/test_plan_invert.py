"""`sda plan invert`, and the recipes of `sda invert`."""
from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install -e '.[training]'")
pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install -e '.[training]'")

from semantic_diffusion_adapter.training import cli  # noqa: E402
from semantic_diffusion_adapter.training.config import from_toml  # noqa: E402
from semantic_diffusion_adapter.training.plan import invert as plan  # noqa: E402
from semantic_diffusion_adapter.training.stages import invert_settings  # noqa: E402

CONFIGS = Path(cli.__file__).parent / "configs"


def planned(capsys, *flags: str) -> tuple[int, str]:
    code = cli.main(["plan", "invert", "--config", str(CONFIGS / "flux1_dev_invert_16gb.toml"), *flags])
    return code, capsys.readouterr().out


def test_the_plan_counts_a_fit_of_flux1_dev(capsys):
    code, told = planned(capsys, "--pictures", "100")
    assert code == 0 and "11,901,408,320 frozen (int8)" in told and "(128 tokens)" in told and "GB of 16 on a 4080" in told
    assert "48.3 TFLOP" in told and "100 pictures on 1 x 4080" in told
    assert planned(capsys, "--base.precision", "nf4")[0] == 0
    code, told = planned(capsys, "--base.precision", "bf16", "--batch", "2")
    assert code == 1 and 'Change batch = 1, or base.precision = "nf4" (or "int8")' in told
    config = from_toml(plan.Config, CONFIGS / "flux1_dev_invert_16gb.toml")
    one = plan.Estimate(config)
    assert plan.Estimate(dataclasses.replace(config, minutes=0.5)).seconds == 30 < one.seconds
    assert plan.Estimate(dataclasses.replace(config, gpus=4)).hours == pytest.approx(one.hours / 4)
    assert plan.Estimate(dataclasses.replace(config, steps=200)).seconds == pytest.approx(2 * one.seconds, rel=0.03)
    with pytest.raises(ValueError, match="Unknown preset"):
        plan.Estimate(dataclasses.replace(config, preset="tree65"))


@pytest.mark.parametrize("name", ["flux1_dev_invert_16gb", "miniature_cpu_invert"])
def test_a_recipe_says_by_which_lines_it_is_used(name):
    config = from_toml(invert_settings.Config, CONFIGS / f"{name}.toml")
    assert config.out.name == name
    text = (CONFIGS / f"{name}.toml").read_text(encoding="utf-8")
    assert f"sda invert --config training/configs/{name}.toml" in text and f"sda plan invert --config training/configs/{name}.toml" in text
