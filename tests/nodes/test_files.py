"""Save and Load Embedding in core's folders: names, workflow, thumbnail, cache, and refusals at queue time."""

from __future__ import annotations

import json
import os
import re
import struct
import sys
from functools import partial
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("comfy.sd", reason="no ComfyUI here: set COMFYUI_PATH, or `python3 run.py test` makes one")

import execution  # noqa: E402
import folder_paths  # noqa: E402
from comfy.cli_args import args  # noqa: E402
from comfy_api.latest import io  # noqa: E402
from comfy_execution.graph import DynamicPrompt  # noqa: E402
from comfy_execution.utils import CurrentNodeContext  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from semantic_diffusion_adapter.kernels import checkpoint, embedding_file  # noqa: E402
from semantic_diffusion_adapter.nodes import types  # noqa: E402
from semantic_diffusion_adapter.nodes.files import LoadEmbedding, SaveEmbedding  # noqa: E402

import nodes as stock  # noqa: E402

PROMPT = {"1": {"class_type": "X"}}
EXTRA = {"extra_pnginfo": {"workflow": {"nodes": [1]}, "sda": 1}}


@pytest.fixture
def folders(tmp_path, monkeypatch) -> SimpleNamespace:
    """Core's folders, empty."""
    made = SimpleNamespace(**{name: tmp_path / name for name in ("input", "output", "temp")})
    for name, path in vars(made).items():
        path.mkdir()
        monkeypatch.setattr(folder_paths, f"{name}_directory", str(path))
    return made


def save(e, prefix="embeddings/embedding", image=None, within=None) -> str:
    """Through the node, `within` a prompt as core calls it; the text that it shows."""
    node = SaveEmbedding
    if within is not None:
        *_, hidden = execution.get_input_data({}, SaveEmbedding, "9", dynprompt=DynamicPrompt(within), extra_data=EXTRA)
        node = SaveEmbedding.PREPARE_CLASS_CLONE(hidden)
    return node.execute(e, prefix, image).ui.as_dict()["text"][0]


def load(file: str):
    assert LoadEmbedding.validate_inputs(file) is True
    return LoadEmbedding.execute(file).result


def options() -> list[str]:
    return LoadEmbedding.GET_SCHEMA().inputs[0].options


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_saved_files_are_numbered_and_found_again(folders, embedding):
    e = embedding(batch=2)
    assert save(e) == f"embeddings/embedding_00001_.safetensors ({size(folders, 'embeddings/embedding_00001_')} KB)"
    assert save(e).startswith("embeddings/embedding_00002_.safetensors (")
    assert save(e, "mine").startswith("mine_00001_.safetensors (")
    assert save(e, "%width%/a", torch.zeros(1, 8, 40, 3)).startswith("40/a_00001_.safetensors (")
    (folders.input / "sub").mkdir()
    embedding_file.save(folders.input / "sub" / "b.safetensors", e)
    embedding_file.save(folders.input / "a.safetensors", e)
    (folders.input / "picture.png").write_bytes(b"")
    assert options() == [
        "a.safetensors", "sub/b.safetensors", "40/a_00001_.safetensors [output]",
        "embeddings/embedding_00001_.safetensors [output]", "embeddings/embedding_00002_.safetensors [output]",
        "mine_00001_.safetensors [output]",
    ]  # fmt: skip
    for name in (*options(), "a.safetensors [input]"):
        loaded, thumbnail = load(name)
        assert torch.equal(loaded.tokens, e.tokens.half().float()) and loaded.hierarchy() == e.hierarchy(), name
        assert thumbnail.ndim == 4 and (thumbnail == 0.5).all() or name.startswith("40")


def size(folders, name: str) -> str:
    return f"{(folders.output / f'{name}.safetensors').stat().st_size / 1024:.0f}"


@pytest.mark.skipif(sys.platform == "win32", reason="links need special rights on Windows")
def test_links_are_followed_but_not_in_circles(folders, embedding, tmp_path):
    (tmp_path / "shared").mkdir()
    embedding_file.save(tmp_path / "shared" / "a.safetensors", embedding())
    (folders.output / "shared").symlink_to(tmp_path / "shared", target_is_directory=True)
    (folders.output / "again").symlink_to(folders.output, target_is_directory=True)
    assert options() == ["shared/a.safetensors [output]"]
    load("shared/a.safetensors [output]")


def test_the_graph_is_found_from_the_file(folders, embedding, monkeypatch):
    save(embedding(), "a", within=PROMPT)
    found = metadata(folders.output / "a_00001_.safetensors")
    assert json.loads(found["prompt"]) == PROMPT
    assert json.loads(found["workflow"]) == {"nodes": [1]}
    assert json.loads(found["sda"])["kind"] == "embedding", "another pack's entry must not hide our record"
    monkeypatch.setattr(args, "disable_metadata", True)
    save(embedding(), "b", within=PROMPT)
    assert metadata(folders.output / "b_00001_.safetensors").keys() == {"sda"}


def test_name_and_size_are_written_into_the_node(folders, embedding, monkeypatch):
    told = []
    server = SimpleNamespace(send_progress_text=lambda text, node: told.append((text, node)))
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=server)))
    save(embedding(), "a", within=PROMPT)
    assert told == [], "outside of a run there is no node to write into"
    with CurrentNodeContext("a run", "9"):
        text = save(embedding(), "b", within=PROMPT)
    assert told == [(text, "9")]


def test_the_thumbnail_is_small_and_keeps_its_aspect(folders, embedding):
    image = torch.zeros(2, 300, 900, 4)
    image[0, :, 450:, 0], image[..., 3] = 1, 1
    save(embedding(), "a", image)
    _, thumbnail = load("a_00001_.safetensors [output]")
    assert thumbnail.shape == (1, 85, 256, 3) and thumbnail.dtype == torch.float32
    assert thumbnail[0, :, 140:, 0].min() > 0.9 and thumbnail[0, :, :115].max() < 0.1
    save(embedding(), "b", torch.rand(1, 3, 1, 3) * 3 - 1)
    assert load("b_00001_.safetensors [output]")[1].shape == (1, 3, 1, 3), "a small picture is not enlarged"


def test_the_thumbnail_shows_no_colour_that_alpha_hides(folders, embedding):
    save(embedding(), "a", torch.tensor([0.0, 0.5, 0.5, 0.0]).expand(1, 8, 8, 4))
    assert load("a_00001_.safetensors [output]")[1].min() > 0.98


def jpeg(width: int, height: int) -> bytes:
    """A white JPEG whose header claims this size."""
    made = BytesIO()
    Image.new("L", (8, 8), 255).save(made, "JPEG")
    return made.getvalue().replace(struct.pack(">HH", 8, 8), struct.pack(">HH", height, width), 1)


@pytest.mark.parametrize("damaged", [b"no picture", b"GIF89a", b"", jpeg(8, 8)[:200], jpeg(9000, 2), jpeg(65000, 65000)])
def test_a_damaged_thumbnail_becomes_grey(folders, embedding, damaged):
    embedding_file.save(folders.input / "a.safetensors", embedding(), damaged)
    assert (load("a.safetensors")[1] == 0.5).all()


@pytest.mark.parametrize("prefix", ["../a", "a/../../b", "/tmp/a", "C:\\a", "\\\\host\\a", "..\\a", ".", "a/.."])
def test_no_prefix_leads_out_of_the_output_folder(folders, embedding, prefix):
    refused(folders, embedding(), prefix, "leads out of the output folder")


def refused(folders, e, prefix: str, words: str) -> None:
    """In one sentence, when it is queued as when it runs, and nothing is written."""
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        save(e, prefix)
    assert SaveEmbedding.validate_inputs(prefix) == str(caught.value)
    assert str(caught.value).endswith(".") and str(caught.value).isprintable() and len(str(caught.value)) < 250
    assert not any(folders.output.iterdir())


@pytest.mark.parametrize(
    ("prefix", "words"),
    [
        ("", "is empty"),
        (" ", "is empty"),
        ("...", "nothing but dots and spaces"),
        ("embeddings/. .", "nothing but dots and spaces"),
        ("a" * 300, "is too long (300 bytes): shorten it to 200"),
        ("脸" * 67, "is too long (201 bytes)"),
        ("a/" + "b" * 300 + "/c", "is too long"),
        ("a\0b", "cannot be seen"),
        ("a\nb", "cannot be seen"),
        ("a\ud800", "cannot be seen"),
        ("<img src=x onerror=alert(1)>", "has the sign <, which Windows"),
        ("a/b?", "has the sign ?"),
        ("con/a", "has 'con', which Windows keeps for a device"),
        ("a/LPT1.b", "has 'LPT1.b'"),
    ],
)
def test_a_name_that_cannot_be_stored_everywhere_is_refused(folders, embedding, prefix, words):
    refused(folders, embedding(), prefix, words)


def test_ordinary_names_in_any_language_are_taken(folders, embedding):
    for prefix in ("Console", "com", "nul und nichtig", "脸" * 66, "顔　1", "été & hiver", "a.b", "100%", "👩‍🎨", "x" * 200):
        assert save(embedding(), f"a/{prefix}").startswith(f"a/{prefix}_00001_.safetensors (")
    assert save(embedding(), "one\\two").startswith("one/two_00001_.safetensors ("), "one name on every system"
    assert SaveEmbedding.validate_inputs() is True, "a linked name is not known when core asks"


def test_only_embeddings_that_can_be_shared_are_offered(folders, embedding):
    embedding_file.save(folders.input / "a.safetensors", embedding())
    checkpoint.save(folders.input / "vae.safetensors", {"x": torch.ones(1)}, "vae", {})
    save_file({"x": torch.ones(1)}, folders.input / "lora.safetensors")
    (folders.input / "cut.safetensors").write_bytes((folders.input / "a.safetensors").read_bytes()[:-5])
    if sys.platform != "win32":
        embedding_file.save(folders.output / "<img src=x onerror=alert(1)>.safetensors", embedding())
    assert options() == ["a.safetensors"]


def test_a_folder_that_cannot_be_used_is_named(folders, embedding):
    (folders.output / "embeddings").write_bytes(b"a file")
    with pytest.raises(ValueError, match="folder of 'embeddings/embedding' cannot be used .*: choose another name"):
        save(embedding())


def test_what_cannot_be_loaded_is_refused_when_queued(folders, embedding, tmp_path):
    embedding_file.save(tmp_path / "secret.safetensors", embedding())
    embedding_file.save(folders.temp / "t.safetensors", embedding())
    outside = [
        "../secret.safetensors", str(tmp_path / "secret.safetensors"), "../secret.safetensors [output]",
        "sub/../../secret.safetensors", "..\\secret.safetensors", "C:secret.safetensors", "t.safetensors [temp]",
    ]  # fmt: skip
    (folders.input / "cut.safetensors").write_bytes((tmp_path / "secret.safetensors").read_bytes()[:-5])
    checkpoint.save(folders.input / "vae.safetensors", {"x": torch.ones(1)}, "vae", {})
    save_file({"x": torch.ones(1)}, folders.input / "lora.safetensors")
    expected = dict.fromkeys(outside, "outside ComfyUI's input and output folders") | {
        "absent.safetensors": "no embedding 'absent.safetensors' in",
        "": "No embedding is chosen",
        " [output]": "No embedding is chosen",
        "a" * 300 + ".safetensors": "no embedding 'aaaa",
        "a\0.safetensors": "no embedding 'a\\x00.safetensors'",
        "cut.safetensors": "cut short",
        "vae.safetensors": "kind 'vae' where 'embedding'",
        "lora.safetensors": "no Semantic Diffusion Adapter record",
    }
    for file, words in expected.items():
        said = LoadEmbedding.validate_inputs(file)
        assert isinstance(said, str) and words in said and said.endswith(".") and "\n" not in said, (file, said)
        with pytest.raises(ValueError, match=words.split("'")[0]):
            LoadEmbedding.execute(file)
    assert LoadEmbedding.validate_inputs() is True, "a linked name is not known when core asks"


def test_the_fingerprint_is_the_content(folders, embedding):
    path = folders.input / "a.safetensors"
    embedding_file.save(path, embedding())
    before = LoadEmbedding.fingerprint_inputs("a.safetensors")
    os.utime(path, (0, 0))
    assert before == LoadEmbedding.fingerprint_inputs("a.safetensors") and len(before) == 64
    embedding_file.save(path, embedding(seed=1))
    assert before != LoadEmbedding.fingerprint_inputs("a.safetensors")
    assert LoadEmbedding.fingerprint_inputs() == LoadEmbedding.fingerprint_inputs("absent.safetensors") == ""


@pytest.fixture
def run(queue, folders, embedding, monkeypatch):
    """`queue` with the two nodes and `Source`, which gives an embedding."""

    class Source(io.ComfyNode):
        @classmethod
        def define_schema(cls):
            return io.Schema(node_id="Source", category="test", inputs=[], outputs=[types.Embedding.Output()])

        @classmethod
        def execute(cls):
            return io.NodeOutput(embedding())

    ours = {"Source": Source, "SDASaveEmbedding": SaveEmbedding, "SDALoadEmbedding": LoadEmbedding}
    monkeypatch.setattr(stock, "NODE_CLASS_MAPPINGS", stock.NODE_CLASS_MAPPINGS | ours)
    return partial(queue, extra_pnginfo={"workflow": {"id": "mine"}})


def test_saved_in_one_prompt_and_loaded_in_the_next(run, folders, embedding):
    saving = {
        "source": {"class_type": "Source", "inputs": {}},
        "save": {"class_type": "SDASaveEmbedding", "inputs": {"embedding": ["source", 0], "filename_prefix": "a"}},
    }
    assert run(saving) == ({"source", "save"}, [])
    found = metadata(folders.output / "a_00001_.safetensors")
    assert json.loads(found["prompt"]) == saving and json.loads(found["workflow"]) == {"id": "mine"}

    file = "a_00001_.safetensors [output]"
    loading = {
        "load": {"class_type": "SDALoadEmbedding", "inputs": {"file": file}},
        "show": {"class_type": "PreviewImage", "inputs": {"images": ["load", 1]}},
        "save": {"class_type": "SDASaveEmbedding", "inputs": {"embedding": ["load", 0], "filename_prefix": "b"}},
    }
    assert run(loading) == ({"load", "show", "save"}, [])
    assert torch.equal(load("b_00001_.safetensors [output]")[0].tokens, load(file)[0].tokens)
    assert run(loading) == (set(), []), "the same file again must come from the cache"
    embedding_file.save(folders.output / "a_00001_.safetensors", embedding(seed=1))
    assert run(loading) == ({"load", "show", "save"}, [])

    (folders.output / "a_00001_.safetensors").unlink()
    ran, (said,) = run(loading)
    assert not ran and "no embedding 'a_00001_.safetensors'" in said
