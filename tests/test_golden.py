"""What the code asked and showed before it was made smaller: a refactoring changes none of it."""

import hashlib
import json
from pathlib import Path

import pytest

from dynslice.core import paths
from dynslice.experiment.profile import by_model
from dynslice.experiment.study import Study

GOLDEN = json.loads((Path(__file__).parent / "data/golden/requests.json").read_text())


def studies():
    """Every study of the built-in profiles: its name and its model's overrides."""
    for path in sorted(paths.PROFILES.glob("*.yaml")):
        for chosen in by_model(path.stem, {}):
            yield Study.open(path.stem, **chosen)


@pytest.mark.parametrize("study", [*studies()], ids=lambda study: study.name)
def test_a_study_asks_for_what_it_asked_for(study):
    """Keys of results: whoever has measured a profile need not measure it again."""
    keys = sorted(request.key for request in study.requests())
    digest = hashlib.sha256("\n".join(keys).encode()).hexdigest()
    assert {"requests": len(keys), "sha256": digest} == GOLDEN[study.name]
