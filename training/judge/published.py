"""Published figures to compare with: each with its source and with what it was measured on.

None of them was measured by this protocol, and each table has its own. Figures can be compared within a table; across
tables only their order of magnitude can. `read` says whether a figure was read in the paper's own text or code
("primary") or in another paper's table or a model card ("secondary"). Measures are named as in
`training/judge/measures.py`.
"""
from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    method: str
    values: dict[str, float]
    source: str
    read: str = "primary"


@dataclass(frozen=True)
class Table:
    """A published table. task: "reconstruction" or "edits", whose means are shown above the rows. protocol: what was
    measured, and on what."""

    title: str
    task: str
    protocol: str
    rows: tuple[Row, ...]


_OPENVISION, _UNILIP, _REPTOK = "OpenVision 3", "UniLIP (nnnth/UniLIP)", "review of RepTok"
_FIREFLOW, _PROEDIT = "FireFlow, arXiv 2412.07517", "FireFlow, arXiv 2412.07517, and ProEdit"
_EDITS = "table of Emu Edit's comparisons"
_FLUXSPACE, _SECOND = "FluxSpace, arXiv 2412.09611", "secondary"

TABLES = (
    Table("Reconstruction from a representation", "reconstruction",
          "ImageNet or the paper's own set, 224 to 448 px; data and sizes differ from row to row", (
              Row("FLUX VAE (ceiling), 256 px", {"psnr": 32.86, "ssim": 0.917, "lpips": 0.044}, _OPENVISION),
              Row("UniLIP, tuned CLIP, 32x down", {"psnr": 22.99, "ssim": 0.747}, _UNILIP),
              Row("RAE on CLIP, 256 px", {"psnr": 17.44, "ssim": 0.403, "lpips": 0.324}, _OPENVISION),
              Row("RepTok, 1 token (ablation)", {"psnr": 14.94}, _REPTOK, _SECOND),
              Row("Emu2, CLIP tokens and a diffusion decoder, 448 px", {"psnr": 13.49, "ssim": 0.423}, _UNILIP,
                  _SECOND),
          )),
    Table("Reconstruction by inversion of FLUX.1-dev", "reconstruction",
          "first 1,000 pictures of DCI, no reuse of features", (
              Row("plain rectified flow, 60 evaluations", {"lpips": 0.504, "ssim": 0.563, "psnr": 16.57}, _FIREFLOW),
              Row("RF-Solver, 120 evaluations", {"lpips": 0.293, "ssim": 0.708, "psnr": 20.05}, _FIREFLOW),
              Row("FireFlow, 62 evaluations", {"lpips": 0.158, "ssim": 0.816, "psnr": 23.87}, _FIREFLOW),
          )),
    Table("Likeness to a subject", "reconstruction",
          "DreamBench: a subject in new scenes, not a scene repainted", (
              Row("FLUX IP-Adapter", {"dino": 0.582, "clip_i": 0.820}, "USO"),
              Row("UNO", {"dino": 0.760, "clip_i": 0.835}, "USO"),
              Row("another real picture of the subject", {"dino": 0.774, "clip_i": 0.885}, "USO"),
          )),
    Table("Edits against the true edited picture", "edits",
          "MagicBrush test set; measures between the edit and the set's target picture; CLIP-T with the "
          "target's caption", (
              Row("InstructPix2Pix", {"clip_i": 0.837, "clip_t": 0.245, "l1": 0.093, "dino": 0.767}, _EDITS, _SECOND),
              Row("MagicBrush", {"clip_i": 0.883, "clip_t": 0.261, "l1": 0.058, "dino": 0.871}, _EDITS, _SECOND),
              Row("Emu Edit", {"clip_i": 0.897, "clip_t": 0.261, "l1": 0.052, "dino": 0.879}, _EDITS, _SECOND),
          )),
    Table("Edits against the source picture", "edits",
          "Emu Edit test set; measures between the edit and the source; CLIP-T with the target's caption", (
              Row("InstructPix2Pix", {"clip_i_source": 0.834, "clip_t": 0.219, "l1_source": 0.121,
                                      "dino_source": 0.762},
                  _EDITS, _SECOND),
              Row("MagicBrush", {"clip_i_source": 0.838, "clip_t": 0.222, "l1_source": 0.100, "dino_source": 0.776},
                  _EDITS, _SECOND),
              Row("Emu Edit", {"clip_i_source": 0.859, "clip_t": 0.231, "l1_source": 0.094, "dino_source": 0.819},
                  _EDITS, _SECOND),
          )),
    Table("Semantic edits of FluxSpace", "edits",
          "one attribute added to generated faces; measures between the edit and the source", (
              Row("FluxSpace, eyeglasses", {"clip_i_source": 0.9417, "dino_source": 0.9402}, _FLUXSPACE, _SECOND),
              Row("FluxSpace, smile", {"clip_i_source": 0.9038, "dino_source": 0.9347}, _FLUXSPACE, _SECOND),
          )),
    Table("Edits by inversion of FLUX.1-dev", "edits",
          "PIE-Bench, 700 pictures; structure distance to the source, CLIP-T of the whole picture; no true "
          "edited picture", (
              Row("RF-Inversion, 28 steps", {"structure_source": 0.0406, "clip_t": 0.2520}, _PROEDIT),
              Row("RF-Solver, 15 steps", {"structure_source": 0.0311, "clip_t": 0.2600}, _PROEDIT),
              Row("FireFlow, 15 steps", {"structure_source": 0.0283, "clip_t": 0.2598}, _PROEDIT),
              Row("FireFlow, 8 steps", {"structure_source": 0.0271, "clip_t": 0.2602}, _FIREFLOW),
              Row("FlowEdit, 28 steps", {"structure_source": 0.0290, "clip_t": 0.2588}, "DecFlowEdit"),
              Row("UniEdit-Flow, strength 0.8", {"structure_source": 0.0269, "clip_t": 0.2697}, "ProEdit"),
          )),
)
