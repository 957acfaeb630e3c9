"""Every place on disk that dynslice reads or writes.

DYNSLICE_CACHE moves the downloads, DYNSLICE_OUTPUT the results, figures and rendered notebooks of
a run; both default to the checkout, or to the working directory of an installed dynslice.
"""

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
PROFILES = PACKAGE / "profiles"

_CHECKOUT = PACKAGE.parents[1]
ROOT = _CHECKOUT if (_CHECKOUT / "pyproject.toml").is_file() else Path.cwd()
ASSET_MANIFEST = ROOT / "data" / "assets.json"
PUBLISHED = ROOT / "data" / "published"
BENCH = ROOT / "data" / "bench"
NOTEBOOKS = ROOT / "notebooks"

CACHE = Path(os.environ.get("DYNSLICE_CACHE") or ROOT / "data" / "cache").resolve()
TASK_FILES = CACHE / "lm_eval_tasks"
SCRATCH = ".unfinished-"  # what the names of scratch folders start with
OUTPUT = Path(os.environ.get("DYNSLICE_OUTPUT") or ROOT).resolve()


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


def report(profile: str) -> Path:
    """The static pages of `profile`."""
    return OUTPUT / "report" / profile


def embedded_model(name: str) -> Path:
    """Where an embedded model is kept once it has been made."""
    return CACHE / "models" / name


def shown_path(path: Path) -> str:
    """A path as a reader of messages wants it: from here."""
    return os.path.relpath(path)
