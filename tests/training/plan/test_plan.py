"""`sda plan`: the model against what PyTorch counts and keeps, at every part, and the verdict on cards."""
from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install -e '.[training]'")

from diffusers import AutoencoderKL  # noqa: E402
from semantic_diffusion_adapter.kernels import precision as machine  # noqa: E402
from semantic_diffusion_adapter.kernels.adapter import Adapter, AdapterConfig  # noqa: E402
from semantic_diffusion_adapter.kernels.hierarchy import PRESETS  # noqa: E402
from semantic_diffusion_adapter.kernels.vision.known import KNOWN_TOWERS  # noqa: E402
from semantic_diffusion_adapter.kernels.vision.towers import TowerConfig, VisionTower  # noqa: E402
from semantic_diffusion_adapter.training import cli  # noqa: E402
from semantic_diffusion_adapter.training.config import from_toml  # noqa: E402
from semantic_diffusion_adapter.training.data import index  # noqa: E402
from semantic_diffusion_adapter.training.engine import Step  # noqa: E402
from semantic_diffusion_adapter.training.frozen import base, region_attention  # noqa: E402
from semantic_diffusion_adapter.training.frozen.flux import build_flux, to_bfl, velocity  # noqa: E402
from semantic_diffusion_adapter.training.frozen.random_base import random_flux  # noqa: E402
from semantic_diffusion_adapter.training.frozen.region_attention import attend_by_region  # noqa: E402
from semantic_diffusion_adapter.training.objectives.reconstruct import regions_for  # noqa: E402
from semantic_diffusion_adapter.training.plan import costs, plan  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

CONFIGS = Path(plan.__file__).parents[1] / "configs"
CONFIG = dict(hidden_size=256, num_heads=2, depth=2, depth_single_blocks=3, axes_dim=[16, 56, 56], context_in_dim=64, vec_in_dim=32,
              in_channels=4, patch_size=2, guidance_embed=True)


def counted(call) -> float:
    with FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_flops_of_a_step_through_the_base_are_what_pytorch_counts(checkpointing, pooled):
    torch.manual_seed(0)
    flux = build_flux(CONFIG).requires_grad_(False)
    attention = attend_by_region(flux)
    attention.regions = regions_for(PRESETS["tree128"], (8, 8), torch.device("cpu"))
    if checkpointing:
        flux.enable_gradient_checkpointing()
    tokens, vector = torch.randn(1, 128, 64).requires_grad_(), torch.randn(1, 32, requires_grad=pooled)
    out = []
    forward = counted(lambda: out.append(velocity(flux, torch.randn(1, 4, 16, 16), torch.tensor([0.5]), tokens, vector, torch.ones(1))))
    backward = counted(lambda: out[0].sum().backward())
    ahead, back, again = costs.flux_flops(flux.config, 64, 128, checkpointing, pooled)
    assert forward == pytest.approx(ahead, rel=0.01) and backward == pytest.approx(back + again, rel=0.02)


def test_flux1_dev_costs_what_is_known_of_it():
    """11.9 billion weights; 33 and 48 TFLOP at 512 px with 128 tokens, 147 and 214 at 1024 px."""
    with torch.device("meta"):
        flux = build_flux(costs.FLUX1_DEV)
    assert costs.parameters(flux) == 11_901_408_320
    found = [sum(costs.flux_flops(flux.config, n, 128, ck)) / 1e12 for n in (1024, 4096) for ck in (False, True)]
    assert found == pytest.approx([33, 48, 147, 214], rel=0.03)
    assert [round(costs.base_bytes(flux, p) / 1e9, 1) for p in ("bf16", "int8", "nf4")] == [23.8, 12.0, 6.2]


def test_the_flops_of_the_adapter_are_what_pytorch_counts():
    towers = [TowerConfig(n, "dinov2", {"patch_size": 14}, 56, 14, w, (0.5,) * 3, (0.5,) * 3) for n, w in (("a", 48), ("b", 96))]
    config = AdapterConfig(PRESETS["tree64"].to_json(), tuple(towers), 128, 4, 3, 256)
    with torch.device("meta"):
        adapter = Adapter(config)
    features = {t.id: torch.empty(1, 16, t.width, device="meta") for t in towers}

    def call():
        with torch.device("meta"):
            tokens, _ = adapter(features)
        tokens.sum().backward()

    assert costs.adapter_flops(config, 64) == pytest.approx(counted(call), rel=0.03)


@pytest.mark.parametrize("name", ["dfn5b-vit-h-14-378", "siglip2-so400m-14-378", "dinov2-reg-giant-378", "internvit-300m-448"])
def test_the_towers_have_the_weights_that_the_plan_says(name):
    with torch.device("meta"):
        tower = VisionTower(KNOWN_TOWERS[name])
    blocks = costs.parameters(tower.blocks)
    assert costs.tower_parameters(tower.config) == pytest.approx(blocks, rel=0.05)


def test_the_flops_of_towers_and_vae_are_what_pytorch_counts():
    config = TowerConfig("t", "dinov2", {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 112,
                                         "patch_size": 14}, 112, 14, 64, (0.5,) * 3, (0.5,) * 3)
    with torch.device("meta"):
        tower = VisionTower(config).requires_grad_(False)
    found = counted(lambda: tower.model(torch.empty(1, 3, 112, 112, device="meta")))
    assert costs.tower_flops(config) == pytest.approx(found, rel=0.05)
    with torch.device("meta"):
        vae = AutoencoderKL(in_channels=3, out_channels=3, latent_channels=4, layers_per_block=2, block_out_channels=[32, 64, 64],
                            down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3)
    found = counted(lambda: vae.encoder(torch.empty(1, 3, 64, 96, device="meta")))
    assert costs.vae_flops(vae.config, 64, 96) == pytest.approx(found, rel=0.05)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "nf4"])
def test_the_bytes_of_the_base_are_those_of_the_loaded_one(tmp_path, monkeypatch, precision):
    monkeypatch.setattr(machine, "fast_dtype", lambda device: torch.bfloat16)  # as on every card of the plan
    if precision in base.LIBRARY:
        pytest.importorskip(base.LIBRARY[precision])
    from safetensors.torch import save_file

    flux = build_flux(CONFIG)
    save_file(to_bfl(flux.state_dict()), tmp_path / "flux.safetensors")
    loaded, held = base.load_flux(tmp_path / "flux.safetensors", precision), 0
    for module in loaded.modules():
        for parameter in module.parameters(recurse=False):
            data = parameter.data
            held += sum(getattr(data, n).nbytes for n in ("qdata", "scale")) if hasattr(data, "qdata") else data.nbytes
            state = getattr(parameter, "quant_state", None)
            held += state.absmax.nbytes + state.state2.absmax.nbytes if state is not None else 0
    assert costs.base_bytes(flux, precision) == pytest.approx(held, rel=0.02)


def kept_by(block, given: dict, weights: set[int]) -> int:
    """Bytes that a block keeps for its backward, beside its weights."""
    kept: dict[int, int] = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        block(**given)
    return sum(size for place, size in kept.items() if place not in weights)


def block_inputs(flux) -> dict:
    x, text = (torch.randn(1, n, 256, dtype=torch.bfloat16, requires_grad=True) for n in (256, 64))
    return dict(hidden_states=x, encoder_hidden_states=text, temb=torch.randn(1, 256, dtype=torch.bfloat16, requires_grad=True),
                image_rotary_emb=flux.pos_embed(torch.rand(320, 3)))


def test_the_blocks_keep_for_their_backward_what_the_plan_says(monkeypatch):
    monkeypatch.setattr(region_attention, "SHORT", 0)  # the kernel that long sequences take
    flux = build_flux(CONFIG).bfloat16().requires_grad_(False)
    attend_by_region(flux).regions = regions_for(PRESETS["tree64"], (16, 16), torch.device("cpu"))
    weights = {p.untyped_storage().data_ptr() for p in flux.parameters()}
    given = block_inputs(flux)
    for block, kind in ((flux.transformer_blocks[0], "double"), (flux.single_transformer_blocks[0], "single")):
        assert kept_by(block, given, weights) / (320 * 256) == pytest.approx(costs.KEPT[kind], rel=0.1), kind


def test_a_block_in_int8_keeps_its_weights_unpacked(monkeypatch):
    pytest.importorskip("torchao", reason="torchao is not installed: pip install -e '.[training]'")
    monkeypatch.setattr(machine, "fast_dtype", lambda device: torch.bfloat16)  # as on every card of the plan
    found = {}
    for precision in ("bf16", "int8"):
        flux = random_flux(CONFIG, precision, torch.device("cpu"))
        attend_by_region(flux)
        weights = {p.untyped_storage().data_ptr() for p in flux.parameters() if type(p.data) is torch.Tensor}
        found[precision] = [kept_by(block, block_inputs(flux), weights)
                            for block in (*flux.transformer_blocks, *flux.single_transformer_blocks)]
    more = [after - before for before, after in zip(found["bf16"], found["int8"])]
    assert costs.unpacked_bytes(build_flux(CONFIG), "int8", True) == pytest.approx(max(more), rel=0.03)
    assert costs.unpacked_bytes(build_flux(CONFIG), "int8", False) == pytest.approx(sum(more), rel=0.03)


def verdict(capsys, recipe: str, *flags: str) -> tuple[int, str]:
    code = cli.main(["plan", "--config", str(CONFIGS / f"{recipe}.toml"), *flags])
    return code, capsys.readouterr().out


def test_a_smaller_card_than_a_recipe_is_named_after_fits_as_its_head_says(capsys):
    flags = re.search(r"--base.sharded.*?,", (CONFIGS / "flux1_dev_8x80gb.toml").read_text())[0].rstrip(",").split()
    assert verdict(capsys, "flux1_dev_8x80gb", "--gpus", "8", "--gpu", "a100-40", *flags)[0] == 0


def test_every_recipe_fits_the_card_it_is_named_after_and_no_smaller_one(capsys):
    for recipe, gpus, gpu in (("flux1_dev_24gb", 1, "4090"), ("flux1_dev_80gb", 1, "h100"), ("flux1_dev_8x80gb", 8, "a100"),
                              ("flux1_dev_32xh100", 32, "h100")):
        code, told = verdict(capsys, recipe, "--gpus", str(gpus), "--gpu", gpu)
        assert code == 0 and "11,901,408,320 frozen" in told and "does not fit" not in told, recipe
    code, told = verdict(capsys, "flux1_dev_80gb", "--gpu", "4090")
    assert code == 1 and "This does not fit" in told and 'base.precision = "nf4"' in told and "run.micro = 4" in told


def test_more_cards_are_faster_and_sharding_is_smaller():
    def estimate(**fields) -> plan.Estimate:
        return plan.Estimate(from_toml(plan.Config, CONFIGS / "flux1_dev_8x80gb.toml", **fields))

    one, eight = estimate(gpus=1), estimate(gpus=8)
    assert one.hours / eight.hours == pytest.approx(8, rel=0.05)
    config = from_toml(plan.Config, CONFIGS / "flux1_dev_8x80gb.toml", gpus=8)
    sharded = plan.Estimate(dataclasses.replace(config, base=dataclasses.replace(config.base, sharded=True)))
    assert sharded.most < eight.most - 15 and sharded.hours > eight.hours
    with pytest.raises(ValueError, match="cannot be shared by 7 processes"):
        estimate(gpus=7)


def test_the_start_is_counted_and_what_is_compiled(capsys):
    code, told = verdict(capsys, "flux1_dev_80gb")
    assert code == 0 and "text encoder, once, by the first process: 9.5 GB" in told
    assert "models/FLUX.1-dev" in told and "so taken to be FLUX.1-dev's and unchecked" in told
    shapes, counts, graphs = map(int, re.search(r"(\d+) buckets x (\d+) numbers of tokens = (\d+) graphs", told).groups())
    config = from_toml(plan.Config, CONFIGS / "flux1_dev_80gb.toml")
    assert shapes == len({b for pixels in config.data.pixels() for b in index.buckets(pixels)}) and graphs == shapes * counts
    drawn = {config.objective.draw(Step(n, 2000, 0, "adapter", torch.device("cpu"), range(1), 1)).token_count for n in range(2000)}
    assert drawn == config.objective.token_counts() and len(drawn) == counts
    assert "compiled" not in verdict(capsys, "flux1_dev_24gb")[1]


def test_the_start_weighs_what_the_parts_weigh(capsys, tmp_path):
    from safetensors.torch import save_file
    from transformers import T5Config, T5EncoderModel

    with torch.device("meta"):
        t5 = T5EncoderModel(T5Config(vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
                                     feed_forward_proj="gated-gelu"))
    assert costs.parameters(t5) == costs.T5_PARAMETERS

    def estimate(**fields) -> plan.Estimate:
        config = from_toml(plan.Config, CONFIGS / "flux1_dev_8x80gb.toml", gpus=8)
        return plan.Estimate(dataclasses.replace(config, base=dataclasses.replace(config.base, **fields)))

    save_file({"text_mean": torch.zeros(4096), "text_std": torch.ones(4096)}, tmp_path / "text.safetensors")
    assert list(estimate().host.values()) == [pytest.approx(9.5, abs=0.1), 0]
    assert list(estimate(text=tmp_path / "text.safetensors", sharded=True).host.values()) == [0, pytest.approx(8 * 23.8, rel=0.01)]
    whole = estimate()
    assert 24 < whole.starting < whole.most, "a card holds more while it trains"


def test_what_a_run_may_not_do_is_refused_in_a_plan(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    for flags, words in ((["--run.micro", "3"], "run.batch 64 is not a multiple of run.micro 3"),
                         (["--base.sharded"], "nothing to shard over"), (["--run.out", str(tmp_path / "file")], "is a file; give a folder"),
                         (["--base.flux", str(tmp_path / "file")], "not a safetensors file")):
        assert cli.main(["plan", "--config", str(CONFIGS / "flux1_dev_80gb.toml"), *flags]) == 1
        assert words in capsys.readouterr().err, flags
