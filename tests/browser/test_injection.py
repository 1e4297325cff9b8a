"""Names and texts of files and workflows are shown as they stand: no markup of a stranger's ever runs in the page."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from semantic_diffusion_adapter.kernels import embedding_file
from semantic_diffusion_adapter.kernels.embedding import from_hierarchy
from semantic_diffusion_adapter.kernels.hierarchy import hierarchy
from semantic_diffusion_adapter.runner.server import Server

if TYPE_CHECKING:
    from .conftest import Desk

pytestmark = pytest.mark.browser

MARKUP = "<img src=x onerror='window.ran=1'>"  # no slash: it can be a file's name
RAN = "window.ran ?? 0"


def poisoned(path: Path, adapter: str) -> str:
    """An embedding that says it is of this adapter; the name of the file."""
    grids = hierarchy("global16")
    tokens = torch.randn(1, grids.token_count, 24, generator=torch.Generator().manual_seed(0))
    embedding_file.save(path, from_hierarchy(tokens, grids, None, {"adapter": adapter}))
    return path.name


def workflow(*nodes: dict, links: list | None = None) -> dict:
    placed = [{"id": at, "pos": [at * 420 - 400, 0], "size": [380, 200], "mode": 0} | node for at, node in enumerate(nodes, 1)]
    return {"last_node_id": len(nodes), "last_link_id": 9, "nodes": placed, "links": links or [], "version": 0.4}


def loader(file: str, link: int) -> dict:
    output = {"name": "embedding", "type": "SDA_EMBEDDING", "links": [link]}
    return {"type": "SDALoadEmbedding", "title": MARKUP, "outputs": [output], "widgets_values": [file]}


def sink(kind: str, values: list, *inputs: tuple[str, int]) -> dict:
    sockets = [{"name": name, "type": "SDA_EMBEDDING", "link": link} for name, link in inputs]
    return {"type": kind, "title": MARKUP, "inputs": sockets, "widgets_values": values}


def tells(desk: Desk, words: str) -> None:
    """The page was told so, and shows what it shows of it: today's pages a part, behind a button."""
    told = "words => JSON.stringify([app.lastNodeErrors, app.lastExecutionError]).includes(words)"
    desk.page.wait_for_function(told, arg=words)
    desk.page.wait_for_timeout(500)
    more = desk.page.get_by_role("button", name="View details")
    if more.is_visible():
        more.click()


def nothing_ran(desk: Desk) -> None:
    desk.page.wait_for_timeout(500)  # an image that fails tells so after it was looked for
    assert desk.page.evaluate(RAN) == 0
    assert desk.page.locator("img[src='x']").count() == 0


@pytest.fixture
def files(server: Server) -> tuple[str, str]:
    """Two embeddings whose adapters cannot be combined, and say so in markup."""
    folder = server.base / "input"
    return poisoned(folder / "one.safetensors", f"{MARKUP}1"), poisoned(folder / "other.safetensors", f"{MARKUP}2")


def test_the_detector_detects(desk: Desk) -> None:
    desk.page.evaluate("html => document.body.append(document.createRange().createContextualFragment(html))", MARKUP)
    desk.page.wait_for_function("window.ran === 1")
    desk.page.evaluate("document.querySelector(\"img[src='x']\").remove(); window.ran = 0")


@pytest.mark.parametrize("prefix", [MARKUP, "a&lt;img src=x onerror='window.ran=1'&gt;", "www.a.b 'onclick=window.ran=1"])
def test_a_prefix_in_a_workflow(desk: Desk, files: tuple[str, str], prefix: str) -> None:
    """It is refused, in a sentence that shows it, or saved and written into the node."""
    link, prefix = [1, 1, 0, 2, 0, "SDA_EMBEDDING"], f"{prefix} {desk.modern}"  # ComfyUI does not run one prompt twice
    desk.load(workflow(loader(files[0], 1), sink("SDASaveEmbedding", [prefix], ("embedding", 1)), links=[link]))
    if "<" in prefix:
        desk.page.evaluate("app.queuePrompt(0)")
        tells(desk, "which Windows cannot store in a name")
    else:
        desk.run()
    nothing_ran(desk)
    desk.page.keyboard.press("Escape")


def test_what_a_file_says_in_a_sentence_of_a_run(desk: Desk, files: tuple[str, str]) -> None:
    links = [[at, at, 0, 3, at - 1, "SDA_EMBEDDING"] for at in (1, 2)] + [[3, 3, 0, 4, 0, "SDA_EMBEDDING"]]
    blend = sink("SDABlendEmbeddings", [0.5, "slerp", "all"], ("embedding_a", 1), ("embedding_b", 2))
    blend["outputs"] = [{"name": "embedding", "type": "SDA_EMBEDDING", "links": [3]}]
    shown = sink("SDAPreviewEmbedding", ["strength"], ("embedding", 3))
    desk.load(workflow(*(loader(file, at) for at, file in enumerate(files, 1)), blend, shown, links=links))
    desk.run()
    tells(desk, "Embeddings of different adapters")
    nothing_ran(desk)
    desk.page.keyboard.press("Escape")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows stores no such name")
def test_names_in_the_list_of_files(desk: Desk, server: Server, files: tuple[str, str]) -> None:
    poisoned(server.base / "input" / f"{MARKUP}.safetensors", "mine")
    desk.page.evaluate("app.refreshComboInNodes()")
    desk.load(workflow(loader(f"{MARKUP}.safetensors", 1)))  # a workflow may name it all the same
    options = desk.page.evaluate("async () => (await (await fetch('/object_info/SDALoadEmbedding')).json())")
    assert files[0] in json.dumps(options) and "<img" not in json.dumps(options)
    nothing_ran(desk)


@pytest.mark.parametrize("kind", ["SDACompose", "SDAPlace", "SDARegionalPrompt", "SDAStrength"])
def test_texts_of_a_workflow_on_the_canvas(desk: Desk, kind: str) -> None:
    """Titles, texts where numbers belong, and the names of the pictures to draw."""
    picture = {"type": "LoadImage", "title": MARKUP, "widgets_values": [f"{MARKUP}.png", "image"]}
    desk.load(workflow(picture | {"outputs": [{"name": "IMAGE", "type": "IMAGE", "links": []}]}, {"type": kind, "title": MARKUP}))
    desk.page.evaluate(
        """markup => {
            const node = app.graph.nodes.find(({ type }) => type.startsWith("SDA"));
            for (const widget of node.widgets) if (!widget.element) widget.value = markup;
            node.onExecuted?.({ images: [{ filename: markup, subfolder: markup, type: markup }] });
        }""",
        MARKUP,
    )
    nothing_ran(desk)
