"""The recipes: each is read and planned, and trains a step of one full-width block of each kind as far as a CPU can."""
from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install -e '.[training]'")
pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install -e '.[training]'")

from safetensors.torch import save_file  # noqa: E402
from semantic_diffusion_adapter.kernels import checkpoint  # noqa: E402
from semantic_diffusion_adapter.kernels.precision import resolve  # noqa: E402
from semantic_diffusion_adapter.kernels.vision.known import KNOWN_TOWERS  # noqa: E402
from semantic_diffusion_adapter.training.config import from_toml  # noqa: E402
from semantic_diffusion_adapter.training.engine import World  # noqa: E402
from semantic_diffusion_adapter.training.engine.learner import Learner  # noqa: E402
from semantic_diffusion_adapter.training.frozen.base import load_flux  # noqa: E402
from semantic_diffusion_adapter.training.frozen.flux import build_flux, to_bfl  # noqa: E402
from semantic_diffusion_adapter.training.objectives.reconstruct import named_hierarchy  # noqa: E402
from semantic_diffusion_adapter.training.plan import plan  # noqa: E402
from semantic_diffusion_adapter.training.plan.costs import FLUX1_DEV  # noqa: E402
from semantic_diffusion_adapter.training.stages import adapter, settings  # noqa: E402
from semantic_diffusion_adapter.training.stages.adapter import AdapterStage  # noqa: E402

CONFIGS = Path(plan.__file__).parents[1] / "configs"
RECIPES = sorted(p.stem for p in CONFIGS.glob("*.toml") if not any(word in p.name for word in ("editor", "gate", "judge", "invert")))
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_read_and_holds_together(name):
    config = from_toml(settings.Config, CONFIGS / f"{name}.toml")
    settings.check_settings(config)
    assert config.run.out.name == name and config.run.max_steps % config.run.save_every == 0
    gpus = {"flux1_dev_8x80gb": 8, "flux1_dev_32xh100": 32}.get(name, 1)
    assert all(len(World(rank, gpus, rank % 8, 8, CPU).share(config.run.batch, config.run.micro)) > 0 for rank in range(gpus))
    text = (CONFIGS / f"{name}.toml").read_text()
    assert "sda " in text and f"configs/{name}.toml" in text, "a recipe says by which lines it is used"
    if "--max-restarts" in text:
        assert "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in text and ("--standalone" in text or "--rdzv-backend c10d" in text)
    if name.endswith("32xh100"):
        assert "srun torchrun" in text and "#SBATCH" in text


@pytest.mark.parametrize("name", ["flux1_dev_editor_24gb", "flux1_dev_editor_llm_24gb"])
def test_a_recipe_of_the_editor_goes_on_from_that_of_its_adapter(name):
    """With the towers that this one looks through, and with the DINOv2 that it tunes and exports."""
    pytest.importorskip("peft", reason="peft is not installed: pip install -e '.[training]'")
    from semantic_diffusion_adapter.training.stages import editor_settings

    recipe = from_toml(editor_settings.Config, CONFIGS / f"{name}.toml")
    with pytest.raises(ValueError, match="adapter: there is no runs/flux1_dev_24gb/export/semantic_adapters/flux1_dev_24gb"):
        editor_settings.check(recipe, World(0, 1, 0, 1, CPU))  # all else that is checked before is in order
    before = from_toml(settings.Config, CONFIGS / "flux1_dev_24gb.toml")
    (clip, clip_id), (_, dinov2_id) = before.vision.named()
    tuned = before.run.out / "export" / "clip_vision" / f"{before.run.out.name}_{dinov2_id}.safetensors"
    assert recipe.vision.named() == [(clip, clip_id), (tuned, "")] and KNOWN_TOWERS[dinov2_id].kind == "dinov2"
    table = named_hierarchy(before.adapter.table)
    assert all(len(named_hierarchy(preset).index_in(table)) for preset in recipe.presets)


@pytest.mark.parametrize("memory", ["24gb", "80gb"])
def test_a_recipe_of_the_gate_goes_on_from_that_of_its_adapter(memory):
    pytest.importorskip("peft", reason="peft is not installed: pip install -e '.[training]'")
    from semantic_diffusion_adapter.training.stages import gate_settings

    name = f"flux1_dev_gate_{memory}"
    recipe = from_toml(gate_settings.Config, CONFIGS / f"{name}.toml")
    before = from_toml(settings.Config, CONFIGS / f"flux1_dev_{memory}.toml")
    with pytest.raises(ValueError, match=f"adapter: there is no runs/flux1_dev_{memory}/export/semantic_adapters/flux1_dev_{memory}"):
        gate_settings.check(recipe, World(0, 1, 0, 1, CPU))  # all else that is checked before is in order
    *others, (_, dinov2) = before.vision.named()
    tuned = before.run.out / "export" / "clip_vision" / f"{before.run.out.name}_{dinov2}.safetensors"
    assert recipe.vision.named() == [*others, (tuned, "")] and recipe.run.out.name == name
    assert recipe.base.flux == before.base.flux and recipe.base.precision == before.base.precision
    assert f"configs/{name}.toml" in (CONFIGS / f"{name}.toml").read_text()


def test_the_recipe_of_an_editor_from_fits_reads_what_the_inversion_writes():
    pytest.importorskip("peft", reason="peft is not installed: pip install -e '.[training]'")
    from semantic_diffusion_adapter.training.stages import editor_settings, invert_settings

    name = "flux1_dev_editor_from_fits_24gb"
    recipe = from_toml(editor_settings.Config, CONFIGS / f"{name}.toml")
    with pytest.raises(ValueError, match="fits: there is no runs/flux1_dev_fits"):
        editor_settings.check(recipe, World(0, 1, 0, 1, CPU))  # all else that is checked before is in order
    fitted = from_toml(invert_settings.Config, CONFIGS / "flux1_dev_invert_16gb.toml")
    assert recipe.presets == (fitted.preset,) == (recipe.validation.preset,) and fitted.start == "mean"
    text = (CONFIGS / f"{name}.toml").read_text()
    assert f"--source {recipe.data.index} --out {recipe.fits}" in text and f"configs/{name}.toml" in text


@pytest.fixture(scope="module")
def full_width(tmp_path_factory, toy_parts) -> Path:
    """FLUX.1-dev's widths with one block of each kind, random, in BFL's layout as flux1-dev.safetensors is."""
    folder = tmp_path_factory.mktemp("full")
    torch.manual_seed(0)
    with torch.device("meta"):
        shape = build_flux({**FLUX1_DEV, "depth": 1, "depth_single_blocks": 1}).state_dict()
    row = torch.empty(1 << 20, dtype=torch.bfloat16).normal_(std=0.02)
    state = {k: torch.ones(v.shape, dtype=torch.bfloat16) if "norm_" in k and v.ndim == 1 else
             row.repeat(-(-v.numel() // len(row)))[:v.numel()].view(v.shape) for k, v in shape.items()}
    save_file(to_bfl(state), folder / "flux.safetensors")
    return toy_parts(folder)


@pytest.fixture(scope="module")
def nf4(full_width):
    """That base in NF4, once for all that goes through it: a CPU takes long to quantise it."""
    pytest.importorskip("bitsandbytes")
    return load_flux(full_width / "flux.safetensors", "nf4", CPU)


@pytest.mark.parametrize("precision", ["nf4", "bf16"])
def test_a_recipe_trains_a_step_at_full_width(full_width, tmp_path, precision, request, monkeypatch):
    """What the recipes of this precision ask for, but small pictures, towers and VAE, two adapter layers, no compiler, and
    float32 for bf16 where this CPU computes that faster."""
    computed = resolve("auto", CPU) if precision == "bf16" else precision
    names = [n for n in RECIPES if n.startswith("flux1")
             and from_toml(settings.Config, CONFIGS / f"{n}.toml").base.precision == precision]
    assert names
    if precision == "nf4":
        loaded = request.getfixturevalue("nf4")
        monkeypatch.setattr(adapter, "load_flux", lambda *given: loaded)
    stage = None
    for name in names:
        config = from_toml(settings.Config, CONFIGS / f"{name}.toml")
        parts = full_width
        config = dataclasses.replace(
            config, base=dataclasses.replace(config.base, precision=computed, flux=parts / "flux.safetensors",
                                             vae=parts / "vae.safetensors",
                                             text=parts / "text.safetensors"),
            vision=settings.Vision((parts / "clip.safetensors", parts / "dino.safetensors")),
            data=dataclasses.replace(config.data, index=str(parts / "photos"), held_out=2, resolutions=((1.0, 64),)),
            validation=dataclasses.replace(config.validation, resolution=64),
            adapter=dataclasses.replace(config.adapter, layers=2),
            run=dataclasses.replace(config.run, out=tmp_path / name, batch=2, micro=2, device="cpu", compile=False))
        if stage is None:
            stage = AdapterStage(config, CPU)
        else:  # the networks are the same; the recipe's own objective goes on with them
            stage.config, stage.objective.settings = config, config.objective
        learner = Learner(stage, config.run, World.start("cpu"))
        last = config.run.max_steps - 1
        before = {k: v.clone() for k, v in stage.trainables.state_dict().items() if k.startswith("tuned") or "queries" in k}
        learner.set_rates(last // 2)  # within the plateau and, by the scales, before the unlock
        parts_of_loss, norm = learner.gradients(learner.steps(last // 2))
        learner.step()
        learner.clear()
        assert all(map(torch.isfinite, map(torch.tensor, [*parts_of_loss.values(), norm]))) and norm > 0, name
        after = stage.trainables.state_dict()
        assert not torch.equal(after["adapter.queries"], before["adapter.queries"])
        assert all(torch.equal(after[k], v) for k, v in before.items() if k.startswith("tuned")), "locked until its phase"
    assert stage.objective.flux.config.joint_attention_dim == 4096 and stage.objective.flux.config.pooled_projection_dim == 768
    stage.export(1)
    record = checkpoint.read_header(next((config.run.out / "export").rglob("*.safetensors")), "adapter")
    assert record["widths"] == {"text": 4096, "pooled": 768} and record["base_precision"] == computed


def test_a_gates_lora_learns_on_a_full_width_base_in_nf4(nf4):
    pytest.importorskip("peft", reason="peft is not installed: pip install -e '.[training]'")
    from semantic_diffusion_adapter.training.engine import Step
    from semantic_diffusion_adapter.training.objectives.gate import GateObjective, GateTraining, add_gate_lora, lora_state

    flux = nf4
    add_gate_lora(flux, 4)
    flux.enable_gradient_checkpointing()
    draw = torch.Generator().manual_seed(0)
    pictures = torch.rand(2, 1, 3, 64, 64, generator=draw)
    latents = torch.randn(2, 1, 16, 8, 8, generator=draw)
    loss, _ = GateObjective(flux, GateTraining(rank=4)).loss(
        torch.randn(1, 64, 4096, generator=draw), torch.zeros(1, 768), named_hierarchy("tree64"), tuple(pictures), *latents,
        Step(0, 10, 0, "gate", CPU, range(1), 1))
    loss.backward()
    state = lora_state(flux)
    assert len(state) == 2 * (6 + 5) and torch.isfinite(loss)
    assert all(tensor.dtype == torch.float32 and torch.isfinite(tensor.grad).all() for tensor in state.values())
    assert all(tensor.grad.abs().sum() > 0 for name, tensor in state.items() if ".lora_B." in name), "zero at the start, and learns"
