"""What can be typed: the options of every command of `dynslice`."""

import argparse
import re
from collections.abc import Callable
from functools import partial

_TEXT = "corpus name, UTF-8 file or directory"


def parser(runs: dict[str, Callable], description: str) -> argparse.ArgumentParser:
    """The parser of all commands; `options.run` is that of the command, with its docstring as help.

    runs: what runs each command.
    """
    parser = _Parser(prog="dynslice", description=description, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    for name, run in runs.items():
        text = run.__doc__
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(run=run)
        for flag, settings in [*_COMMON, *_OPTIONS[name]]:
            sub.add_argument(flag, **settings)
    return parser


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, without the usage text before it."""

    def error(self, message: str):
        sentence = " ".join(message.split())  # what was typed may have several lines
        self.exit(2, f"{self.prog}: {sentence}; see {self.prog} --help\n")


def _at_least(least: int, text: str, below: int = 2**63) -> int:
    if not re.fullmatch("-?[0-9]{1,99}", text) or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text} is no whole number of at least {least}")
    if int(text) >= below:
        raise argparse.ArgumentTypeError(f"{text} is too large; give less than {below}")
    return int(text)


_positive = partial(_at_least, 1)

_seed = partial(_at_least, 0, below=2**32)  # what every random generator takes


def _windows(text: str) -> int | None:
    return None if text == "all" else _positive(text)


def _option(flag: str, text: str | None = None, kind: Callable = str, **settings) -> tuple:
    """An option as `add_argument` takes it; `text` is its help, `kind` reads its value."""
    return flag, {"help": text, "type": kind, **settings}


def _flag(flag: str, text: str) -> tuple:
    return flag, {"help": text, "action": "store_true"}


def _window(default: int) -> tuple:
    return _option("--window", f"tokens [{default}]", partial(_at_least, 2), default=default)


def _model(required: bool = True) -> list[tuple]:
    return [
        _option("--model", "embedded:NAME, directory or hub id", required=required),
        _option("--revision", "revision of a hub model"),
    ]


_COMMON = [
    _flag("--json", "print one JSON object on stdout"),
    _option("--device", "auto, cpu, cuda or cuda:N", default="auto"),
    _option("--dtype", "auto, float32, bfloat16 or float16", default="auto"),
    _option(
        "--seed",
        "of what the command samples: windows, stratified items, random weights and tokens",
        _seed,
    ),
]

_OUT = _option("--out", "also write the JSON here", metavar="FILE")

_LOADED = [*_model(), _flag("--spread", "place the layers over all GPUs, host and disk")]

_ROUND_TO = _option("--round-to", "multiple for widths [8]", _positive)

_PLAN = [
    _option("--slice-percentage", "share, e.g. 0.25", float, metavar="SP"),
    _option("--slice-base", "share cut everywhere", float, metavar="SB"),
    _option(
        "--schedule",
        "dynamic: the paper's; lr, first, embedding and sensitivity store no more than constant "
        "slicing at SP",
        choices=["constant", "dynamic", "lr", "first", "embedding", "sensitivity"],
    ),
    _option(
        "--lr",
        "output of `dynslice lr`; slice measures it on the calibration windows where it is missing",
        metavar="FILE",
    ),
    _option("--sensitivity", "output of `dynslice sensitivity`", metavar="FILE"),
    _ROUND_TO,
]

_VALIDATED = [
    *_model(),
    _option("--calibration", f"{_TEXT}, for the bases", required=True),
    _option("--text", f"{_TEXT}, for the losses", required=True),
    _option("--windows", "of each text [8]", _positive, default=8),
    _window(512),
    _option("--slice-percentage", None, float, required=True, metavar="SP"),
    _ROUND_TO,
    _OUT,
]

_OPTIONS = {
    "assets": [_option("action", choices=["fetch", "verify", "list"])],
    "lr": [
        *_LOADED,
        _option("--text", _TEXT, required=True),
        _option("--split", "train, validation [default of a corpus] or test"),
        _option("--max-tokens", None, _positive),
        _window(1024),
        _option("--stride", "tokens [256]", _positive, default=256),
        _option("--last-layer", choices=["raw", "normed"], default="raw"),
        _OUT,
    ],
    "plan": [
        *_model(required=False),
        *_PLAN,
        _option(
            "--match-parameters", "constant plan of the stored size of this plan", metavar="PLAN"
        ),
        _OUT,
    ],
    "slice": [
        *_model(),
        _option("--plan", "output of `dynslice plan`", metavar="FILE"),
        *_PLAN,
        _option("--calibration", _TEXT, required=True),
        _option("--windows", "count, or all [128]", _windows, default=128),
        _window(2048),
        _option("--out", required=True, metavar="DIR"),
        _flag("--compensate", "refit what writes the stream, in closed form"),
        _option("--ridge", "of --compensate [0.1]", float),
        _option("--recovery-steps", "then fine-tune with LoRA, merged", _positive, metavar="N"),
        _flag("--stream", "read the model layer by layer, write it by shards"),
        _option("--host-memory", "budget of --stream", float, metavar="GIB"),
        _option("--device-memory", "the same on a GPU", float, metavar="GIB"),
    ],
    "sensitivity": [
        *_VALIDATED,
        _option("--reach", "share of SP by which a place differs [0.4]", float, default=0.4),
    ],
    "search": [*_VALIDATED, _option("--evaluations", "slices to try [24]", _positive, default=24)],
    "ppl": [
        *_LOADED,
        _option("--text", _TEXT, required=True),
        _option("--split", "validation [default of a corpus], test or train"),
        _option("--windows", "count, or all [all]", _windows),
        _window(2048),
    ],
    "tasks": [
        *_LOADED,
        _option("--tasks", "comma-separated names", required=True),
        _option("--limit", "items per task", _positive),
        _option(
            "--subset",
            "which: the first ones, of each subject for mmlu [default], or stratified ones",
            choices=("first", "stratified"),
            default="first",
        ),
        _option("--batch-size", None, _positive, default=8),
    ],
    "bench": [
        *_model(required=False),
        _option("--shape", "random weights of this shape: llama-3-8b or mistral-7b"),
        _option("--calibration", f"{_TEXT} [sotu]", metavar="T"),
        _option("--windows", "count [16]", _positive, default=16),
        _window(512),
        _option("--slice-percentage", None, float, default=0.25, metavar="SP"),
        _option("--repeats", "timed repeats [3]", _positive, default=3),
        _OUT,
    ],
    "reproduce": [
        _option("--profile", "name or YAML file [quick]", default="quick"),
        _option("--set", "override", action="append", default=[], metavar="KEY=VALUE"),
        _option("--only", "number or name, e.g. 02", nargs="+", metavar="NOTEBOOK"),
        _flag("--dry-run", "list what would be measured"),
        _flag("--from-record", "render the committed results"),
        _option("--executor", "who measures [local]", choices=("local", "ray"), default="local"),
        _option("--address", "a running Ray cluster: auto or host:port [a local one]"),
    ],
    "record": [_option("--profile", required=True)],
}
