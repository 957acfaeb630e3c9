"""Write requirements-cpu.lock: the pins of requirements.lock with the SHA-256 of their files.

As the index tells them, for Python 3.11 on Linux (x86-64), which the Dockerfile has. Usage: python
tools/hash_lock.py --torch WHEEL, the CPU build: that of the index brings CUDA libraries, which no
pin names.
"""

import argparse
import json
import re
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from hashlib import file_digest
from pathlib import Path

from packaging.utils import (
    InvalidSdistFilename,
    InvalidWheelFilename,
    parse_sdist_filename,
    parse_wheel_filename,
)

PINS = Path(__file__).resolve().parents[1] / "requirements.lock"
LOCK = PINS.with_name("requirements-cpu.lock")
HEADER = """\
# The pins of requirements.lock with hashes, for Python 3.11 on Linux (x86-64), torch as a CPU
# build; made by tools/hash_lock.py:
#   pip install --no-deps --require-hashes --extra-index-url https://download.pytorch.org/whl/cpu \\
#       -r requirements-cpu.lock && pip install --no-deps -e .
"""
INDEX = "https://pypi.org/simple"
PLATFORM = re.compile(r"any|manylinux.*_x86_64")
PYTHONS = {"py3", "cp311"}


def version_of(file: str) -> str | None:
    """The version of a file that such a machine can install; None for any other file."""
    try:
        if not file.endswith(".whl"):
            return str(parse_sdist_filename(file)[1])
        _, version, _, tags = parse_wheel_filename(file)
    except (InvalidSdistFilename, InvalidWheelFilename):
        return None
    fits = any(
        PLATFORM.fullmatch(tag.platform)
        and (tag.interpreter in PYTHONS or tag.abi == "abi3")
        and not tag.abi.endswith("t")
        for tag in tags
    )
    return str(version) if fits else None


def hashes(pin: str) -> list[str]:
    """The SHA-256 of every such file of a pin, in order."""
    name, version = pin.split("==")
    accept = {"Accept": "application/vnd.pypi.simple.v1+json, text/html;q=0.1"}
    with urllib.request.urlopen(urllib.request.Request(f"{INDEX}/{name}/", headers=accept)) as page:
        text = page.read().decode()
    if text.startswith("{"):
        files = [(f["filename"], f["hashes"]["sha256"]) for f in json.loads(text)["files"]]
    else:
        files = re.findall(r'/([^"#/]+)#sha256=([0-9a-f]{64})', text)
    return sorted({sha for file, sha in files if version_of(file) == version})


def main() -> None:
    """Write the lock file."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--torch", type=Path, required=True, metavar="WHEEL")
    pins = [line for line in PINS.read_text(encoding="utf-8").splitlines() if "==" in line]
    with options.parse_args().torch.open("rb") as file:
        build = file_digest(file, "sha256").hexdigest()
    with ThreadPoolExecutor(6) as pool:
        found = dict(zip(pins, pool.map(hashes, pins), strict=True))
    rows = []
    for pin, known in found.items():
        known = [build] if pin.startswith("torch==") else known
        if not known:
            raise SystemExit(f"the index lists no file of {pin}")
        rows.append(" \\\n".join([pin, *(f"    --hash=sha256:{sha}" for sha in known)]))
    LOCK.write_text(HEADER + "\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
