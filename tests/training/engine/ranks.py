"""Not a test: the adapter through a toy Flux on one process, on two (DDP), and on two with the base sharded (FSDP2).

usage: ranks.py FOLDER. Writes gradients and figures of every case there, for test_ranks.py to compare.
"""
from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch._dynamo  # noqa: F401  (what an optimizer imports, and the run folder: here, so that forked processes have it)
import torch.utils.tensorboard  # noqa: F401
from processes import run
from safetensors.torch import save_file
from semantic_diffusion_adapter.kernels.adapter import Adapter, AdapterConfig
from semantic_diffusion_adapter.kernels.hierarchy import PRESETS
from semantic_diffusion_adapter.kernels.vision.towers import TowerConfig, build_tower
from semantic_diffusion_adapter.training.config import RunConfig, free
from semantic_diffusion_adapter.training.engine import World, shard_base, train
from semantic_diffusion_adapter.training.engine.learner import Learner
from semantic_diffusion_adapter.training.frozen.flux import build_flux
from semantic_diffusion_adapter.training.frozen.region_attention import attend_by_region
from semantic_diffusion_adapter.training.objectives.reconstruct import AdapterObjective, AdapterTraining, Batch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

DIM = 20
TOWER = TowerConfig("dino", "dinov2", {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56,
                                       "patch_size": 14, "mlp_ratio": 2}, 56, 14, 16, (0.5,) * 3, (0.5,) * 3)
FLUX = dict(hidden_size=24, num_heads=2, depth=2, depth_single_blocks=3, axes_dim=[4, 4, 4], context_in_dim=DIM, vec_in_dim=6,
            in_channels=4, guidance_embed=False, patch_size=2)


@dataclass(frozen=True)
class Config:
    run: RunConfig
    shard: bool = free(False)
    checkpointing: bool = free(False)


class ToyAdapter:
    """The real adapter, tower, Flux and objective at toy width on random pictures; grows at half of the run and unlocks the
    tower's last block at three quarters."""

    name = "adapter"
    identity: dict = {}
    stop_at: int | None = None

    def __init__(self, config: Config, world: World):
        torch.manual_seed(0)
        self.config = config
        self.flux = build_flux(FLUX).eval().requires_grad_(False)
        for parameter in self.flux.parameters():
            nn.init.normal_(parameter, std=0.2)
        attention = attend_by_region(self.flux)
        adapter = Adapter(AdapterConfig(PRESETS["tree128"].to_json(), (TOWER,), width=32, heads=2, layers=2, out_dim=DIM))
        self.objective = AdapterObjective(self.flux, attention, adapter, {"dino": build_tower(TOWER).requires_grad_(False)},
                                          AdapterTraining(growth=((0.5, "global16"), (1.0, "tree64", "tree128"))))
        self.trainables = nn.ModuleDict({"adapter": adapter, "tuned": nn.ParameterList(self.objective.unlock())})
        if config.checkpointing:
            self.flux.enable_gradient_checkpointing()
        if config.shard:
            shard_base(self.flux, world)

    def loss(self, step):
        if step.number == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return self.objective.loss(Batch(step.randn(4, 8, 8), step.rand(3, 64, 64)), step)

    def scales(self, step):
        return {"tuned": 0.1 if step >= 0.75 * self.config.run.max_steps else 0.0}

    def validate(self):
        return {"weight": float(sum(p.double().sum() for p in self.trainables.parameters()))}

    def export(self, step):
        with open(self.config.run.out / "exports", "a") as file:
            file.write("once\n")


def base_weights(stage: ToyAdapter) -> dict[str, torch.Tensor]:
    return {k: (v.full_tensor() if isinstance(v, DTensor) else v).clone() for k, v in stage.flux.state_dict().items()}


def settings(out: Path, micro: int = 2) -> RunConfig:
    return RunConfig(out, max_steps=8, batch=4, micro=micro, warmup=1, precision="fp32", device="cpu", clip=1e9, log_every=1,
                     save_every=4, validate_every=4)


def case(root: Path, name: str, shard: bool = False, micro: int = 2, whole: bool = True) -> None:
    """Gradients of an early and a late step, then, where asked for, a whole run, then what is left of the base."""
    config = Config(settings(root / name, micro), shard)
    world = World.start("cpu")
    stage = ToyAdapter(config, world)
    before = base_weights(stage)
    numel = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in stage.flux.parameters())
    learner = Learner(stage, config.run, world)
    counts, gradients = {}, {}
    for number in (0, 7):  # before and after growth and unlock
        learner.set_rates(number)
        if world.size == 1 or micro == 1:  # whose collectives nobody compares
            learner.gradients(learner.steps(number))
        else:
            with profile(activities=[ProfilerActivity.CPU]) as seen:
                learner.gradients(learner.steps(number))
            counts[number] = {e.key[6:]: e.count for e in seen.key_averages() if e.key.startswith("c10d::")}
        gradients |= {f"{number}.{k}": p.grad.clone() for k, p in stage.trainables.named_parameters() if p.grad is not None}
        learner.clear()
    ended = train(stage, config, world) if whole else None
    after = base_weights(stage)
    untouched = all(torch.equal(before[k], after[k]) for k in before) and not any(p.grad is not None for p in stage.flux.parameters())
    if world.main:
        save_file(gradients, root / f"{name}.safetensors")
    told = {"ended": ended, "untouched": untouched, "counts": counts, "base_numbers": numel, "blocks": 5}
    (root / f"{name}.{world.rank}.json").write_text(json.dumps(told))
    world.leave()


def moved(root: Path, shard: bool, stop_at: int | None) -> None:
    """The same run, or a part of it: SIGTERM comes in step `stop_at`."""
    config = Config(settings(root / "moved"), shard, checkpointing=shard)
    world = World.start("cpu")
    stage = ToyAdapter(config, world)
    stage.stop_at = stop_at
    assert train(stage, config, world) is (stop_at is None)
    world.leave()


if __name__ == "__main__":
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    run(1, lambda: case(root, "alone"))
    run(2, lambda: case(root, "ddp"))
    run(2, lambda: case(root, "sharded", shard=True, whole=False))
    run(2, lambda: case(root, "small", micro=1, whole=False))
    run(1, lambda: moved(root, False, 2))
    run(2, lambda: moved(root, True, None))
