"""A study: the measurements of one profile, and their results; only what is missing is computed."""

import re
import sys
from collections.abc import Iterable
from typing import Any

from dynslice.core import paths
from dynslice.core.errors import RequestError, RunError
from dynslice.experiment.ablation import Ablations
from dynslice.experiment.alternatives import Alternatives
from dynslice.experiment.equal_size import EqualSize
from dynslice.experiment.executor import run_all
from dynslice.experiment.profile import Profile, is_text, load, parse_value
from dynslice.experiment.requests import Design, Point
from dynslice.experiment.store import Request, Result, Store, unique


class Study:
    """The measurements of one profile and where their results are kept."""

    def __init__(self, settings: Profile, store: Store, device: str, from_record: bool = False):
        self.profile, self.store = settings, store
        self.device, self.from_record = device, from_record
        self.design = design = Design(settings)  # the main comparison
        self.ablation = Ablations(design)  # notebook 04
        self.beyond = EqualSize(design)  # notebook 07
        self.instead = Alternatives(design, self.beyond)  # notebook 09
        # A report asks for these so often that a study offers them itself.
        self.points, self.task_points = design.points, design.task_points
        self.lr_request, self.lr_requests = design.lr_request, design.lr_requests
        self.slice_request, self.task_request = design.slice_request, design.task_request
        self.perplexity_request = design.perplexity_request
        self.selection_request = design.selection_request

    @classmethod
    def open(
        cls,
        profile: str = "quick",
        /,
        from_record: bool = False,
        device: str = "auto",
        **overrides: Any,
    ) -> "Study":
        """The study of a profile, measuring for itself or reading the committed record.

        Raises RequestError for an unknown profile, key, value or device.
        """
        if not isinstance(from_record, bool):
            raise RequestError(f"from_record {from_record!r} is neither true nor false; use one")
        if not re.fullmatch("auto|cpu|cuda(:[0-9]+)?", str(device)):
            raise RequestError(f"device {device!r} is unknown; use auto, cpu, cuda or cuda:N")
        settings = load(profile, overrides)
        folder = paths.record if from_record else paths.results
        store = Store(folder(settings.stored_as), of_record=from_record)
        return cls(settings, store, device, from_record)

    @classmethod
    def from_notebook(cls, variables: dict[str, Any]) -> "Study":
        """The study of a notebook's `globals()` after its parameters cell (see `parameters`).

        Raises RequestError for a name that is no parameter.
        """
        name, fixed, overrides = parameters(variables)
        return cls.open(name, **fixed, **overrides)

    @property
    def name(self) -> str:
        """What its folders are called."""
        return self.profile.name

    def requests(self) -> list[Request]:
        """Everything, each once."""
        design = self.design
        every = [*design.redundancy_requests(), *design.perplexity_requests()]
        every += [*design.task_requests(), *self.ablation.requests()]
        every += [*design.efficiency_requests(), *self.beyond.requests()]
        every += self.instead.requests()
        return unique(every)

    def missing(self, requests: Iterable[Request]) -> list[Request]:
        """Those without a usable result."""
        return [request for request in requests if self.store.get(request) is None]

    def ensure(
        self, requests: list[Request], executor: str = "local", address: str | None = None
    ) -> int:
        """Compute what is missing, here or by Ray; how many measurements that were.

        Raises RunError when reading from a record that lacks some, and at the end when some
        failed; RequestError where Ray is asked for and cannot start.
        """
        missing = self.missing(requests)
        if not missing:
            return 0
        if self.from_record:
            raise RunError(
                f"the record of {self.profile.stored_as!r} lacks {len(missing)} of {len(requests)} "
                "measurements; run without --from-record to measure them"
            )
        return run_all(missing, self.profile, self.store, self.device, executor, address)

    def get(self, request: Request) -> Result:
        """A result, measured now if need be."""
        if (found := self.store.get(request)) is None:
            self.ensure([request])
            found = self.store.get(request)
        return found

    def perplexity(self, point: Point, text: str) -> float:
        """Perplexity of a network on the reported windows of a text."""
        return self.get(self.perplexity_request(point, text)).value["perplexity"]

    def size(self, point: Point) -> int:
        """Stored parameters of a network, shortcuts included."""
        return self.get(self.slice_request(point)).value["parameters"]

    def lr(self, request: Request | None = None) -> list[float]:
        """LR of every layer, by default on the profile's own text."""
        return [x["lr"] for x in self.get(request or self.lr_request()).value["layers"]]


def parameters(variables: dict[str, Any]) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """What a notebook's parameters cell sets: profile, `from_record` and `device`, overrides.

    None keeps the value of the profile, or the default. Text (from `papermill -p`) is read by the
    type of its parameter.
    """
    plain = (str, int, float, list, tuple, set, dict)
    given = {k: v for k, v in variables.items() if isinstance(v, plain) and k[:1] != "_"}
    for name in ("In", "Out", *_of_start_up(variables)):
        given.pop(name, None)
    given = {k: _typed(k, v) for k, v in given.items()}
    fixed = {k: given.pop(k, None) for k in ("profile", "from_record", "device")}
    fixed = {k: v for k, v in fixed.items() if v is not None}
    return str(fixed.pop("profile", "quick")), fixed, given


def _typed(name: str, value: Any) -> Any:
    if is_text(name) and type(value) is int:  # papermill makes one of a name such as 7
        return str(value)
    is_value = isinstance(value, str) and (value == "null" or not is_text(name))
    return parse_value(value, name) if is_value else value


def _of_start_up(variables: dict[str, Any]) -> list[str]:
    """The names that a start-up file of IPython defined and no cell sets anew."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    cells = "\n".join(variables.get("In", []))
    return [
        name
        for name, value in getattr(shell, "user_ns_hidden", {}).items()
        if variables.get(name) is value and not re.search(rf"^{name}\s*=[^=]", cells, re.MULTILINE)
    ]
