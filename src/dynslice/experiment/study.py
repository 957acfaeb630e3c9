"""A study: the measurements of one profile, and their results; only what is missing is computed."""

from collections.abc import Iterable
from typing import Any

from dynslice.core import paths
from dynslice.core.errors import RunError
from dynslice.experiment.ablation import Ablations
from dynslice.experiment.alternatives import Alternatives
from dynslice.experiment.equal_size import EqualSize
from dynslice.experiment.executor import run_all
from dynslice.experiment.profile import Profile, load, parse_value
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

        Raises RequestError for an unknown profile, key or value.
        """
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

    Profile keys that are None keep the profile's value; text (from `papermill -p`) is read as YAML
    where the key is no string.
    """
    plain = (str, int, float, list, dict, type(None))
    given = {k: v for k, v in variables.items() if isinstance(v, plain) and k[:1] != "_"}
    for name in ("In", "Out"):  # IPython's
        given.pop(name, None)
    fixed = {name: given.pop(name) for name in ("from_record", "device") if name in given}
    chosen = given.pop("profile", "quick")
    return chosen, fixed, {k: _from_text(k, v) for k, v in given.items() if v is not None}


def _from_text(name: str, value: Any) -> Any:
    field = Profile.model_fields.get(name)
    is_text = field is not None and field.annotation in (str, str | None) and value != "null"
    return parse_value(value, name) if isinstance(value, str) and not is_text else value
