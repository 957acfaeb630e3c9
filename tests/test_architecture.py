"""The packages stand on floors, and imports run downwards only (docs/architecture.md)."""

import ast
import re
import shutil
from pathlib import Path

import pytest

from dynslice.core import paths

FLOORS = (
    ("core",),
    ("method",),
    ("inputs", "evaluate", "extensions"),
    ("experiment",),
    ("report",),
    ("cli",),
)
FLOOR = {package: floor for floor, packages in enumerate(FLOORS) for package in packages}
SOURCE = paths.ROOT / "src" / "dynslice"
LONGEST_MODULE, LONGEST_FUNCTION = 400, 60


def imported(tree):
    """The packages of dynslice that a module imports, wherever it does."""
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module == "dynslice":
            names = [f"dynslice.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = ["." * node.level + (node.module or "")]
        for name in names:
            assert not name.startswith("."), "relative imports hide the floor"
            if name.startswith("dynslice."):
                yield name.split(".")[1]


def wrong_imports(source):
    """Imports that lead up or sideways, as `package/module.py imports package`."""
    found = []
    for path in sorted(p for p in source.glob("*/*.py") if p.parent.name in FLOOR):
        package = path.parent.name
        for other in imported(ast.parse(path.read_text(encoding="utf-8"))):
            if other != package and FLOOR[other] >= FLOOR[package]:
                found.append(f"{package}/{path.name} imports {other}")
    return found


def test_imports_run_downwards_only():
    assert {path.parent.name for path in SOURCE.glob("*/__init__.py")} == set(FLOOR)
    assert wrong_imports(SOURCE) == []


@pytest.mark.parametrize(
    ("module", "wrong", "said"),
    [
        ("method/slicing.py", "from dynslice.inputs import models", "imports inputs"),
        ("method/plan.py", "import dynslice.experiment.store", "imports experiment"),
        ("evaluate/speed.py", "from dynslice.inputs.models import load", "imports inputs"),
        ("core/files.py", "def f():\n    from dynslice import method", "imports method"),
    ],
)
def test_a_wrong_import_is_noticed(module, wrong, said, tmp_path):
    shutil.copytree(SOURCE, tmp_path / "dynslice")
    path = tmp_path / "dynslice" / module
    path.write_text(f"{path.read_text()}\n{wrong}\n")
    assert wrong_imports(tmp_path / "dynslice") == [f"{module} {said}"]


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: p.stem)
def test_a_module_is_one_idea_and_a_function_a_screen(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGEST_MODULE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno + 1 <= LONGEST_FUNCTION, node.name


def test_the_map_names_every_module():
    map_ = (paths.ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    parts = dict(part.split("\n", 1) for part in map_.split("\n## ")[1:])
    for package in FLOOR:
        named = set(re.findall(r"`(\w+)`", parts[package]))
        modules = {path.stem for path in (SOURCE / package).glob("[a-z]*.py")}
        assert modules <= named, modules - named


def test_packages_load_nothing_by_themselves():
    assert all(not Path(init).read_text() for init in SOURCE.glob("*/__init__.py"))
