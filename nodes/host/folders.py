"""Model folders: ours registered beside what is there, and the bundled miniature's folders added to them."""

from __future__ import annotations

from pathlib import Path

import folder_paths

from ...kernels.checkpoint import parts
from .names import fault

MINIATURE = Path(__file__).resolve().parents[2] / "assets" / "miniature"
OURS = ("semantic_adapters", "edit_decoders")
# Only our nodes search it, beside core's folder: core's Load CLIP Vision would offer the miniature's towers first.
BESIDE = {"clip_vision": "miniature_vision"}
EXTENSIONS = {".safetensors"}
SOURCES = {
    "semantic_adapters": "`sda` trains one; Load Miniature brings one along",
    "edit_decoders": "`sda` trains one; Load Miniature brings one along",
    "clip_vision": "the help page of Load Vision Encoders says where the public ones are",
}


def register() -> None:
    """Make our folders known and list the miniature's files; calling it again changes nothing."""
    for folder in OURS:
        _add(folder, Path(folder_paths.models_dir) / folder)
        _add(folder, MINIATURE / folder)
    for folder, ours in BESIDE.items():
        _add(ours, MINIATURE / folder)


def files(folder: str) -> list[str]:
    """The safetensors files that a combo of this model folder offers, by name."""
    known = {name for place in _places(folder) for name in folder_paths.get_filename_list(place)}
    return sorted(name for name in known if name.endswith(".safetensors") and fault(name) is None)


def find(folder: str, name: str) -> str:
    """The full path of a model file. ValueError says which folder it belongs into, and where such files come from."""
    path = _path(folder, name)
    if path is None:
        missing = f"There is no {name!r} in models/{folder}" if name.strip() else f"No file of models/{folder} is chosen"
        raise ValueError(f"{missing}: put the file there ({SOURCES[folder]}) and refresh the page (R).")
    return path


def fingerprint(folder: str, name: str | None) -> str:
    """Changes when the file does, or one of its parts.

    Empty for a missing file or a linked name, not known to core yet.
    """
    path = _path(folder, name) if name else None
    return "+".join(map(stamp, parts(path))) if path else ""


def stamp(path: Path) -> str:
    """Size and time of a file, "" if there is none."""
    if not path.is_file():
        return ""
    state = path.stat()
    return f"{path}:{state.st_size}:{state.st_mtime_ns}"


def _places(folder: str) -> list[str]:
    return [folder, BESIDE[folder]] if folder in BESIDE else [folder]


def _path(folder: str, name: str) -> str | None:
    found = (folder_paths.get_full_path(place, name) for place in _places(folder))
    return next((path for path in found if path is not None), None)


def _add(folder: str, path: Path) -> None:
    paths, extensions = folder_paths.folder_names_and_paths.get(folder, ([], EXTENSIONS))
    if str(path) not in paths:
        folder_paths.folder_names_and_paths[folder] = ([*paths, str(path)], set(extensions))
