"""The node Fit Embedding on a miniature of random weights."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("comfy.sd", reason="no ComfyUI here: set COMFYUI_PATH, or `python3 run.py test` makes one")

from semantic_diffusion_adapter.nodes import decode  # noqa: E402
from semantic_diffusion_adapter.nodes.fit import FitEmbedding  # noqa: E402
from semantic_diffusion_adapter.nodes.host import fits, miniature  # noqa: E402
from semantic_diffusion_adapter.nodes.prompt import words  # noqa: E402


@pytest.fixture
def run(assets):
    model, clip, vae = miniature.load()
    picture = torch.rand(1, 64, 48, 3, generator=torch.Generator().manual_seed(0))

    def execute(prompt: str = "", embedding=None, image=picture, **changes):
        widgets = {
            "preset": "tree64", "steps": 2, "minutes": 0.0, "rate": 0.1, "order": "all levels", "fit_pooled": False, "seed": 0,
        } | changes  # fmt: skip
        with torch.inference_mode():
            return FitEmbedding.execute(model, vae, clip, image, prompt=prompt, embedding=embedding, **widgets).result

    execute.clip, execute.model = clip, model
    yield execute
    fits._kept.clear()


def test_an_embedding_and_its_curve(run):
    fitted, curve = run()
    assert fitted.tokens.shape == (1, 64, 24) and fitted.pooled.shape[0] == 1
    assert (fitted.source["start"], fitted.source["fit"]["steps"]) == ("mean", 2)
    assert curve.shape[0] == 1 and curve.shape[-1] == 3
    (positive,) = decode.EmbeddingToConditioning.execute(fitted).result
    assert torch.isfinite(positive[0][0]).all()


def test_a_prompt_is_where_it_begins(run):
    tokens, pooled = words(run.clip, "a red circle")
    fitted, _ = run("a red circle", rate=0.001, steps=1)
    count = tokens.shape[1]
    assert torch.allclose(fitted.tokens[:, :count], tokens, atol=0.01)
    assert fitted.source["start"] == "prompt" and torch.equal(fitted.pooled, pooled.float())


def test_an_embedding_is_refined_and_keeps_where_it_comes_from(run, embedding):
    start = embedding("quad64")
    fitted, _ = run("a circle", embedding=start, fit_pooled=True)
    assert torch.equal(fitted.boxes, start.boxes) and not torch.equal(fitted.pooled, start.pooled)


def test_a_batch_of_pictures_gives_as_many_embeddings(run):
    pictures = torch.rand(2, 64, 48, 4, generator=torch.Generator().manual_seed(1))
    fitted, _ = run("a circle", image=pictures, steps=1)
    assert fitted.batch == 2 and not torch.equal(fitted.tokens[0], fitted.tokens[1])
