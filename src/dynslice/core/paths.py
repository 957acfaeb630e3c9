"""Every place on disk that dynslice reads or writes.

DYNSLICE_CACHE moves the downloads, DYNSLICE_OUTPUT moves what a run writes (results, figures,
rendered notebooks); both default to the checkout, or to the working directory when dynslice was
installed without one.
"""

import os
from pathlib import Path

_CHECKOUT = Path(__file__).resolve().parents[3]

ROOT = _CHECKOUT if (_CHECKOUT / "pyproject.toml").is_file() else Path.cwd()

CACHE = Path(os.environ.get("DYNSLICE_CACHE", ROOT / "data" / "cache")).resolve()

OUTPUT = Path(os.environ.get("DYNSLICE_OUTPUT", ROOT)).resolve()

ASSET_MANIFEST = ROOT / "data" / "assets.json"

PUBLISHED = ROOT / "data" / "published"

BENCH = ROOT / "data" / "bench"

NOTEBOOKS = ROOT / "notebooks"

PROFILES = Path(__file__).parents[1] / "profiles"


def results(profile: str) -> Path:
    """Where a run of `profile` keeps one JSON file per measurement."""
    return OUTPUT / "data" / "results" / profile


def record(profile: str) -> Path:
    """The committed results of record of `profile`."""
    return ROOT / "data" / "record" / profile


def figures(profile: str) -> Path:
    """Figures and tables of `profile`."""
    return OUTPUT / "figures" / profile


def rendered(profile: str) -> Path:
    """Executed notebooks of `profile`."""
    return OUTPUT / "notebooks" / "rendered" / profile


def shown_path(path: Path) -> str:
    return os.path.relpath(path)
