"""`sda plan gate`: the model against what PyTorch counts and keeps, and the recipes' cards."""
from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install -e '.[training]'")
pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install -e '.[training]'")
pytest.importorskip("peft", reason="peft is not installed: pip install -e '.[training]'")

from semantic_diffusion_adapter.kernels.hierarchy import PRESETS  # noqa: E402
from semantic_diffusion_adapter.training import cli  # noqa: E402
from semantic_diffusion_adapter.training.config import from_toml  # noqa: E402
from semantic_diffusion_adapter.training.frozen.flux import build_flux  # noqa: E402
from semantic_diffusion_adapter.training.objectives.gate import GateObjective, GateTraining, add_gate_lora, lora_layers  # noqa: E402
from semantic_diffusion_adapter.training.plan import costs  # noqa: E402
from semantic_diffusion_adapter.training.plan import gate as plan  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

from .test_plan import CONFIG, counted, kept_by  # noqa: E402

CONFIGS = Path(cli.__file__).parent / "configs"
RANK, SIDE, TREE = 4, 8, PRESETS["tree64"]  # SIDE: patches


def gated() -> GateObjective:
    torch.manual_seed(0)
    flux = build_flux(CONFIG)
    add_gate_lora(flux, RANK)
    return GateObjective(flux, GateTraining(rank=RANK))


@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_flops_of_a_step_are_what_pytorch_counts(checkpointing):
    objective, out = gated(), []
    flux = objective.flux
    if checkpointing:
        flux.enable_gradient_checkpointing()
    picture, t = torch.randn(2, 1, 4, 2 * SIDE, 2 * SIDE), torch.tensor([0.5])
    with sdpa_kernel(SDPBackend.MATH):  # the one whose products the counter knows on a CPU
        forward = counted(lambda: out.append(
            objective.velocity(picture[0], t, torch.randn(1, 64, 64), None, TREE, picture[1], torch.ones(1, SIDE, SIDE), 1.0)))
        backward = counted(lambda: out[0].sum().backward())
    ahead, back, again = costs.flux_flops(flux.config, 2 * SIDE**2, 64, checkpointing, pooled=False)
    lora = costs.lora_flops(lora_layers(build_flux(CONFIG)), RANK, 2 * SIDE**2, 64)
    assert forward == pytest.approx(ahead + lora, rel=0.02)
    assert backward == pytest.approx(back + again + (3 if checkpointing else 2) * lora, rel=0.04)


def test_the_blocks_keep_for_their_backward_what_the_plan_says():
    objective, side = gated(), 16  # as many patches as take the kernel of long sequences
    flux, gates = objective.flux.bfloat16(), torch.ones(1, side, side)
    for parameter in flux.parameters():
        parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    weights = {p.untyped_storage().data_ptr() for p in flux.parameters()}
    length = 64 + 2 * side**2
    x, text = (torch.randn(1, n, 256, dtype=torch.bfloat16, requires_grad=True) for n in (length - 64, 64))
    given = dict(hidden_states=x, encoder_hidden_states=text, temb=torch.randn(1, 256, dtype=torch.bfloat16),
                 image_rotary_emb=flux.pos_embed(torch.rand(length, 3)))
    with objective.reading(TREE, gates) as regions:
        objective.attention.regions = regions
        for block, kind in ((flux.transformer_blocks[0], "double"), (flux.single_transformer_blocks[0], "single")):
            expected, found = costs.KEPT[kind] + costs.KEPT_BY_LORA[kind], kept_by(block, given, weights)
            assert found / (length * 256) == pytest.approx(expected, rel=0.1), kind
            with torch.autocast("cpu", torch.bfloat16):
                assert kept_by(block, given, weights) < found


def verdict(capsys, recipe: str, *flags: str) -> tuple[int, str]:
    code = cli.main(["plan", "gate", "--config", str(CONFIGS / f"{recipe}.toml"), *flags])
    return code, capsys.readouterr().out


def test_a_recipe_fits_the_card_it_is_named_after_and_a_smaller_one_is_told_what_to_change(capsys):
    for recipe, gpu in (("flux1_dev_gate_24gb", "4090"), ("flux1_dev_gate_80gb", "h100")):
        code, told = verdict(capsys, recipe, "--gpu", gpu)
        assert code == 0 and "11,901,408,320 frozen" in told and "adapter runs/" in told, recipe
        assert f"plan gate --config training/configs/{recipe}.toml" in (CONFIGS / f"{recipe}.toml").read_text(encoding="utf-8")
    code, told = verdict(capsys, "flux1_dev_gate_80gb", "--gpu", "4090")
    assert code == 1 and 'Change run.micro = 4 (the same batch in more passes), or base.precision = "nf4".' in told


def test_what_learns_is_the_lora_and_a_drift_costs_half_a_forward_more():
    config = from_toml(plan.Config, CONFIGS / "flux1_dev_gate_24gb.toml")
    one = plan.Estimate(config)
    with torch.device("meta"):
        flux = build_flux(costs.FLUX1_DEV)
        add_gate_lora(flux, config.objective.rank)
    assert one.learning == sum(p.numel() for p in flux.parameters() if p.requires_grad)
    straight = plan.Estimate(dataclasses.replace(config, objective=dataclasses.replace(config.objective, drift=0.0)))
    assert one.phases[0].flops.forward == pytest.approx(1.5 * straight.phases[0].flops.forward)
    fits = dataclasses.replace(config, adapter=None, vision=type(config.vision)(()), fits=Path("fits"), presets=("tree128",))
    assert plan.Estimate(fits).most < one.most - 2
