"""`sda train gate`: a LoRA with which the frozen FLUX.1 reads a source picture by a gate, on prepared edits."""
from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ...kernels import checkpoint
from ...kernels.precision import autocast
from ..config import build
from ..data.index import Index
from ..engine import Step, World, compile_blocks, launch
from ..files import DTYPES, code_version
from ..frozen.base import load_flux
from ..frozen.encoders import load_vae
from ..frozen.paint import paint
from ..objectives.gate import GateObjective, add_gate_lora, changed_patches, lora_name, lora_state
from ..objectives.lora import Learned
from ..objectives.reconstruct import named_hierarchy
from .edit_reader import EditReader, Side
from .editor import EditorStage
from .editor_export import learnt
from .gate_settings import Config, check


class GateStage(EditorStage):
    """Reads the edits as the edit decoder's stage does."""

    name, check = "gate", staticmethod(check)

    def reader(self, index: Index, resolutions: tuple[int, ...]) -> EditReader:
        return self.space.reader(index, resolutions, True)

    def networks(self, world: World) -> None:
        config, base, device = self.config, self.config.base, self.device
        self.check_base()
        self.space.load()
        self.flux, self.vae = load_flux(base.flux, base.precision, device), load_vae(base.vae, device)
        add_gate_lora(self.flux, config.objective.rank)
        self.objective = GateObjective(self.flux, config.objective, self.space.masked)
        if base.checkpointing:
            self.flux.enable_gradient_checkpointing()
        if config.run.compile:
            compile_blocks(self.space.blocks, self.flux.transformer_blocks, self.flux.single_transformer_blocks)
        self.trainables = nn.ModuleDict({"lora": Learned(self.flux)})
        self.frozen = {**self.space.frozen, "flux": self.flux, "vae": self.vae.vae}

    def fingerprint(self) -> dict:
        return {"data": self.plan.hash, "held_out": self.held.hash, **self.space.identity, "gate": self.config.objective.rank}

    def losses(self, source: Side, target: Side, texts: list[str], preset: str,
               step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        hierarchy = named_hierarchy(preset)
        tokens, pooled = self.space.embed([target], hierarchy)
        reference, (mean, deviation) = self.vae.moments(source[0])[0], self.vae.moments(target[0])
        x0 = mean + deviation * step.randn(*mean.shape[1:])
        return self.objective.loss(tokens, pooled, hierarchy, (source[0], target[0]), reference, x0, step)

    def measuring(self, now: bool) -> None:
        pass  # a LoRA computes the same

    def paints(self) -> bool:
        return True

    def painted(self, source: Side, target: Side, texts: list[str], seeds: list[int]) -> Tensor:
        """[B, 3, H, 3 W] in [0, 1]: source, painted from the embedding of the edited picture beside the source, edited picture."""
        settings, hierarchy = self.config.validation, named_hierarchy(self.config.validation.preset)
        height, width = source[0].shape[-2:]
        tokens, pooled = self.space.embed([target], hierarchy)
        rows, cols = (side // (2 * self.vae.downsample) for side in (height, width))
        gates = 1 - changed_patches(source[0], target[0], rows, cols, self.config.objective.threshold, 1)
        reference = self.vae.moments(source[0])[0]
        with autocast(self.device, self.config.run.precision), self.objective.reading(hierarchy, gates) as regions:
            found = paint(self.flux, self.vae, tokens, pooled, regions, height, width, seeds, settings.steps, settings.guidance,
                          reference)
        return torch.cat([source[0], found, target[0]], 3)

    def export(self, step: int) -> None:
        write_gate(self.config, self.identity, lora_state(self.flux), step)


def write_gate(config: Config, identity: dict, state: dict[str, Tensor], step: int, to: Path | None = None,
               dtype: str | None = None) -> Path:
    """Write loras/<run>.safetensors, which ComfyUI's *Load LoRA* and diffusers read. Returns its path."""
    name = config.run.out.name
    path = (to or config.run.out / "export") / "loras" / f"{name}.safetensors"
    checkpoint.save(path, state, kind="gate_lora", config={"rank": config.objective.rank}, dtype=DTYPES[dtype or "bf16"], step=step,
                    steps_planned=config.run.max_steps, base_sha256=identity["base"], licence=config.licence,
                    code=code_version(), run=name, **learnt(identity))
    return path


def export_gate(folder: Path, record: dict, to: Path, dtype: str | None) -> Path:
    """Write the averaged weights of a checkpoint; none of the run's inputs is needed."""
    state = {**load_file(folder / "trainables.safetensors"), **load_file(folder / "average.safetensors")}
    tensors = {lora_name(name.removeprefix("lora.").replace("/", ".")): tensor for name, tensor in state.items()}
    return write_gate(build(Config, record["config"], str(folder)), record["identity"], tensors, record["step"], to, dtype)


def run(config: Config) -> bool:
    return launch(GateStage, config)
