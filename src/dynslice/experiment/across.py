"""Several models next to each other: those of one profile, and those of recorded profiles."""

from typing import Any

from dynslice.core import paths
from dynslice.experiment.profile import by_model, load
from dynslice.experiment.study import Study, parameters


class Across:
    """The studies that notebook 08 compares.

    studies: one for each model of the profile, then those of the records that its key `next_to`
    names. absent: the profiles named there that have no record yet. name: the folder of what is
    written about all of them.
    """

    def __init__(self, name: str, studies: list[Study], absent: list[str]):
        self.name, self.studies, self.absent = name, studies, absent

    @classmethod
    def open(
        cls, profile: str, from_record: bool = False, device: str = "auto", **overrides: Any
    ) -> "Across":
        """The studies of a profile. Raises RequestError for an unknown profile, key or value."""
        settings = load(profile, overrides)
        own = [Study.open(profile, from_record, device, **x) for x in by_model(profile, overrides)]
        absent = []
        for other in settings.next_to:
            recorded = [Study.open(other, True, device, **x) for x in by_model(other, {})]
            if all(paths.record(study.profile.stored_as).is_dir() for study in recorded):
                own += recorded
            else:
                absent.append(other)
        return cls(settings.folder, own, absent)

    @classmethod
    def from_notebook(cls, variables: dict[str, Any]) -> "Across":
        """The studies of a notebook's `globals()` after its parameters cell."""
        profile, fixed, overrides = parameters(variables)
        return cls.open(profile, **fixed, **overrides)

    def ensure(self) -> None:
        """Measure what is missing of what is not read from a record; raises as `Study.ensure`."""
        for study in self.studies:
            study.ensure(study.requests())
