"""The sentences of notebooks and pages, as sentences.yaml words them."""

from functools import cache
from pathlib import Path

import yaml


def say(name: str, /, **values: object) -> str:
    """A sentence with values in its places."""
    return _sentences()[name].format(**values)


@cache
def _sentences() -> dict[str, str]:
    text = Path(__file__).with_name("sentences.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)
