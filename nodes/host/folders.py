"""Model folders: ours registered beside what is there, and the bundled miniature's folders added to them."""

from __future__ import annotations

from pathlib import Path

import folder_paths

MINIATURE = Path(__file__).resolve().parents[2] / "assets" / "miniature"
OURS = ("semantic_adapters", "edit_decoders")
EXTENSIONS = {".safetensors"}
SOURCES = {
    "semantic_adapters": "`sda` trains one; Load Miniature brings one along",
    "edit_decoders": "`sda` trains one; Load Miniature brings one along",
    "clip_vision": "the help page of Load Vision Encoders says where the public ones are",
}


def register() -> None:
    """Make `semantic_adapters` and `edit_decoders` known and list the miniature's files; calling it again changes nothing."""
    for folder in OURS:
        _add(folder, Path(folder_paths.models_dir) / folder)
    for folder in (*OURS, "clip_vision"):
        _add(folder, MINIATURE / folder)


def files(folder: str) -> list[str]:
    """The safetensors files that a combo of this model folder offers."""
    return [name for name in folder_paths.get_filename_list(folder) if name.endswith(".safetensors")]


def find(folder: str, name: str) -> str:
    """The full path of a model file. ValueError says which folder it belongs into, and where such files come from."""
    path = folder_paths.get_full_path(folder, name)
    if path is None:
        raise ValueError(
            f"There is no {name!r} in models/{folder}: put the file there ({SOURCES[folder]}) and refresh the page (R)."
        )
    return path


def fingerprint(folder: str, name: str | None) -> str:
    """Changes when the file does. Empty for a missing file or a linked name, which core does not know yet."""
    path = folder_paths.get_full_path(folder, name) if name else None
    return stamp(Path(path)) if path else ""


def stamp(path: Path) -> str:
    """Size and time of a file, "" if there is none."""
    if not path.is_file():
        return ""
    state = path.stat()
    return f"{path}:{state.st_size}:{state.st_mtime_ns}"


def _add(folder: str, path: Path) -> None:
    paths, extensions = folder_paths.folder_names_and_paths.get(folder, ([], EXTENSIONS))
    if str(path) not in paths:
        folder_paths.folder_names_and_paths[folder] = ([*paths, str(path)], set(extensions))
