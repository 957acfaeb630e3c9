"""Exit 0 when the running Python has dynslice from this checkout and all that it needs."""

import sys
import tomllib
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def problems() -> list[str]:
    """What is missing or of the wrong version."""
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    found = []
    for requirement in map(Requirement, wanted):
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            found.append(f"{requirement} is not installed")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            found.append(f"{requirement} is wanted, {version} is installed")
    import dynslice

    if not Path(dynslice.__file__).is_relative_to(ROOT):
        found.append(f"dynslice is installed from {dynslice.__file__}, not from this checkout")
    return found


if __name__ == "__main__":
    sys.exit("\n".join(problems()) or 0)
