"""What can be typed: the commands, with the options of options.yaml."""

import argparse
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import yaml

from dynslice.core.errors import removed


def parser(runs: dict[str, Callable], description: str) -> argparse.ArgumentParser:
    """The parser of commands and what `runs` them, with its docstring as help, as `options.run`."""
    parser = _Parser(prog="dynslice", description=description, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    table = yaml.safe_load(Path(__file__).with_name("options.yaml").read_text(encoding="utf-8"))
    for name, run in runs.items():
        text = run.__doc__
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(run=run)
        for group in (table["common"], *table[name]):
            for option, settings in group.items():
                kind = {} if "action" in settings else {"type": _TYPES[settings.get("type")]}
                sub.add_argument(option, **settings | kind)
    return parser


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, without the usage text before it."""

    def error(self, message: str):
        sentence = " ".join(message.split())  # what was typed may have several lines
        self.exit(2, f"{self.prog}: {sentence}{removed(sentence)}; see {self.prog} --help\n")


def _text(text: str) -> str:
    if not text.strip():  # as a path it would be the working directory
        raise argparse.ArgumentTypeError("the value is empty; give one, or leave the option out")
    return text


def _at_least(least: int, text: str, below: int = 2**63) -> int:
    if not re.fullmatch("-?[0-9]{1,99}", text) or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text} is no whole number of at least {least}")
    if int(text) >= below:
        raise argparse.ArgumentTypeError(f"{text} is too large; give less than {below}")
    return int(text)


def _size(text: str) -> str:
    number, unit = re.fullmatch(r"(.*?)\s*([a-zA-Z]*)", text, re.DOTALL).groups()
    known = unit.upper() in ("", "K", "M", "B", "KB", "MB", "GB")
    if not (known and re.fullmatch(r"[0-9]{1,15}(\.[0-9]{1,15})?", number)):
        raise argparse.ArgumentTypeError(
            f"{text} is no size; give a share (0.84), parameters (113M) or bytes (0.5GB)"
        )
    if not unit and float(number) > 1:
        raise argparse.ArgumentTypeError(
            f"{text} is no share of the dense model; give one up to 1, or a unit such as {text}M"
        )
    return text


_TYPES = {
    None: _text,
    "number": float,
    "size": _size,
    "layers": lambda text: text if text == "all" else _at_least(1, text),
    "positive": partial(_at_least, 1),
    "count": partial(_at_least, 0),
    "window": partial(_at_least, 2),
    "windows": lambda text: None if text == "all" else _at_least(1, text),
    "seed": partial(_at_least, 0, below=2**32),  # what every random generator takes
}
