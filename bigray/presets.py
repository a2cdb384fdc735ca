"""Where the shipped `cluster/`, `tuning/` and `serve/` files are: inside the wheel, or at the root of a checkout."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parent


def find_preset(path: str | Path) -> Path:
    """The user's own file where it exists, else the shipped one of the same name, else the path unchanged."""
    own = Path(path)
    if own.exists() or own.is_absolute():
        return own
    shipped = preset_root() / own
    return shipped if shipped.exists() else own


def preset_root() -> Path:
    """The folder that holds the preset folders."""
    packaged = _PACKAGE / "_presets"
    return packaged if packaged.is_dir() else _PACKAGE.parent
