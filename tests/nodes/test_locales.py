"""The texts of the nodes in every language: complete, in step with the schemas, and as ComfyUI's frontend can show them."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("comfy.sd", reason="no ComfyUI here: set COMFYUI_PATH, or `python3 run.py test` makes one")

import folder_paths  # noqa: E402
import semantic_diffusion_adapter  # noqa: E402
from comfy_api.latest import io  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
LOCALES = ROOT / "locales"
WIDGETS = ROOT / "web" / "js"
TRANSLATED = ("ja", "zh")
LANGUAGES = ("en", *TRANSLATED)
STAYS = {"x", "y", "cfg", "clip", "vae", "Latent"}  # names that these communities write in Latin letters
KANA, HAN = r"[\u3041-\u30ff]", r"[\u4e00-\u9fff]"


@pytest.fixture
def schemas(assets) -> list[io.Schema]:
    extension = asyncio.run(semantic_diffusion_adapter.comfy_entrypoint())
    return [node.GET_SCHEMA() for node in asyncio.run(extension.get_node_list())]


def load(language: str, name: str = "nodeDefs") -> dict:
    return json.loads((LOCALES / language / f"{name}.json").read_text(encoding="utf-8"))


def leaves(tree: dict, *path: str) -> dict[tuple[str, ...], str]:
    """Every text by its path of keys, in the file's order."""
    found = {}
    for key, value in tree.items():
        found |= leaves(value, *path, key) if isinstance(value, dict) else {(*path, key): value}
    return found


def from_schemas(schemas: list[io.Schema]) -> dict[tuple[str, ...], str]:
    """The English texts by the paths under which the frontend looks for them: a dot in a key would be a step of the path."""
    tree = {}
    for schema in schemas:
        tree[schema.node_id] = {"display_name": schema.display_name, "description": schema.description}
        tree[schema.node_id]["inputs"] = {
            i.id.replace(".", "_"): {"name": i.display_name or i.id, "tooltip": i.tooltip} for i in schema.inputs
        }
        tree[schema.node_id]["outputs"] = {
            str(index): {"name": o.display_name, "tooltip": o.tooltip} for index, o in enumerate(schema.outputs)
        }
    return leaves(tree)


def placeholders(text: str) -> set[str]:
    return set(re.findall(r"%\w+", text))


def shown(name: str) -> str:
    """A node's name without what stands in brackets, as other nodes' texts may call it."""
    return re.split(r" \(|（", name)[0]


def test_the_languages():
    assert {folder.name for folder in LOCALES.iterdir()} == set(LANGUAGES)


def test_english_equals_the_schemas(schemas):
    assert leaves(load("en")) == from_schemas(schemas)


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_node_input_and_output_in_the_order_of_the_nodes(schemas, language):
    assert list(leaves(load(language))) == list(from_schemas(schemas))


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_category(schemas, language):
    assert list(load(language, "main")["nodeCategories"]) == sorted({schema.category for schema in schemas})


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_widgets_on_the_page_have_their_texts(language):
    code = [path.read_text(encoding="utf-8") for path in WIDGETS.glob("*.js")]
    used = [re.findall(r'\bsay\("(\w+)"', each) for each in code]
    # say(`${name}Tip`): for every name that a file has a use for.
    endings = {ending for each in code for ending in re.findall(r"\bsay\(`\$\{\w+\}(\w+)`", each)}
    words = {word for each in code for word in re.findall(r"\w+", each)}
    used.append([f"{word}{ending}" for word in words for ending in endings if f"{word}{ending}" in load("en", "main")["semanticDiffusion"]])
    texts, english = (load(each, "main")["semanticDiffusion"] for each in (language, "en"))
    assert list(texts) == list(english) and set(texts) == set().union(*used)
    assert {name: placeholders(text) for name, text in texts.items()} == {name: placeholders(text) for name, text in english.items()}


@pytest.mark.parametrize("name", ("main", "nodeDefs"))
@pytest.mark.parametrize("language", LANGUAGES)
def test_files_are_readable_utf8(language, name):
    raw = (LOCALES / language / f"{name}.json").read_bytes().decode("utf-8")
    assert raw == json.dumps(json.loads(raw), ensure_ascii=False, indent=2) + "\n"


@pytest.mark.parametrize("language", LANGUAGES)
def test_texts_are_shown_as_they_stand(language):
    for path, text in (leaves(load(language)) | leaves(load(language, "main"))).items():
        assert text and text == text.strip(), path
        assert not re.search(r"[{}@|<>]", text), f"{path}: vue-i18n reads more than the character in {text!r}"


@pytest.mark.parametrize("language", TRANSLATED)
def test_nothing_is_left_in_another_language(language):
    for path, text in (leaves(load(language)) | leaves(load(language, "main"))).items():
        if path[-1] == "name" and text in STAYS:
            continue
        assert re.search(f"{KANA}|{HAN}", text), path
        if language == "zh":
            assert not re.search(KANA, text), path
        if path[-1] in ("description", "tooltip"):
            assert text.endswith("。"), path
            assert language != "ja" or re.search(KANA, text), path


@pytest.mark.parametrize("language", TRANSLATED)
def test_figures_are_those_of_the_english_text(schemas, language):
    translated = leaves(load(language))
    for path, text in from_schemas(schemas).items():
        if path[-1] in ("description", "tooltip"):
            assert set(re.findall(r"\d+", translated[path])) == set(re.findall(r"\d+", text)), path


@pytest.mark.parametrize("language", TRANSLATED)
def test_options_are_called_as_the_combo_calls_them(schemas, language):
    translated = leaves(load(language))
    for schema in schemas:
        for i in schema.inputs:
            if isinstance(i, io.Combo.Input):
                named = [option for option in i.options if re.search(rf"\b{re.escape(option)}\b", i.tooltip)]
                missing = [option for option in named if option not in translated[schema.node_id, "inputs", i.id, "tooltip"]]
                assert not missing, f"{schema.node_id}.{i.id}: {missing}"


@pytest.mark.parametrize("language", TRANSLATED)
def test_nodes_call_one_another_by_their_names(schemas, language):
    translated = leaves(load(language))
    names = {shown(s.display_name): shown(translated[s.node_id, "display_name"]) for s in schemas}
    assert len(set(names.values())) == len(schemas)
    for path, text in from_schemas(schemas).items():
        for english, name in names.items():
            if path[-1] in ("description", "tooltip") and english in text:
                assert name in translated[path], f"{path} does not mention {name}"


def test_comfyui_serves_them(tmp_path):
    """By core's own manager, in a process of its own: core's package `utils` must not meet another module of that name."""
    shutil.copytree(LOCALES, tmp_path / "pack" / "locales")
    ask = (
        "import json, sys; core, pack = sys.argv[1:]; sys.path.insert(0, core); sys.argv[1:] = ['--cpu'];"
        "import folder_paths; folder_paths.get_folder_paths = lambda name: [pack];"
        "from app.custom_node_manager import CustomNodeManager;"
        "print(json.dumps(CustomNodeManager().build_translations()))"
    )
    core = str(Path(folder_paths.__file__).parent)
    asked = subprocess.run([sys.executable, "-c", ask, core, str(tmp_path)], capture_output=True, text=True, check=True)
    served = json.loads(asked.stdout.splitlines()[-1])
    assert served == {language: load(language, "main") | {"nodeDefs": load(language)} for language in LANGUAGES}
