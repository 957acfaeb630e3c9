"""Scores as numbers: LR by layer, and normalised.

Apart from `redundancy`, which measures them, so that a report needs no torch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from dynslice.core.errors import RequestError
from dynslice.core.files import validated

SCORES = ("cosine", "angular", "update")


def scores_of(layers: list[dict], score: str = "cosine") -> list[float]:
    """A redundancy score per layer, high where a layer changes little, from the JSON form.

    cosine is LR itself; angular is one minus the angular distance; update is minus the relative
    norm of the update. Only differences matter, since schedules normalise.
    Raises RequestError for an unknown score.
    """
    if score not in SCORES:
        raise RequestError(f"score {score!r} is unknown; use {', '.join(SCORES)}")
    try:
        if score == "cosine":
            return [layer["lr"] for layer in layers]
        if score == "angular":
            return [1 - layer["angular_distance"] for layer in layers]
        return [-layer["update_norm"] for layer in layers]
    except KeyError as error:
        raise RequestError(
            f"the LR result holds no {error}; delete it, it will be measured anew"
        ) from error


def normalise(lr: Sequence[float]) -> tuple[float, ...]:
    """n_i = (LR_i - min LR) / (max LR - min LR); where all LR are equal, every n_i is 1."""
    low, high = min(lr), max(lr)
    if high == low:
        return (1.0,) * len(lr)
    return tuple((value - low) / (high - low) for value in lr)


@dataclass(frozen=True)
class _Layer:
    lr: Annotated[float, Field(ge=-1 - 1e-6, le=1 + 1e-6, allow_inf_nan=False)]  # a cosine
    index: int | None = None
    normalised: float | None = None


@dataclass(frozen=True)
class _LrFile:
    layers: Annotated[list[_Layer], Field(min_length=1)]


def lr_of(values: dict) -> list[float]:
    """The LR per layer in the JSON of `dynslice lr`. Raises RequestError when it is none."""
    layers = validated(_LrFile, values, "LR file", "`dynslice lr`").layers
    if any(layer.index not in (None, i) for i, layer in enumerate(layers)):
        raise RequestError("the LR file lists its layers out of order; make it with `dynslice lr`")
    scores = [layer.lr for layer in layers]
    for layer, n in zip(layers, normalise(scores), strict=True):
        if layer.normalised is not None and not math.isclose(layer.normalised, n, abs_tol=1e-9):
            raise RequestError(
                "the scores of the LR file and their normalised values do not fit together: it was "
                "altered; make it anew with `dynslice lr`"
            )
    return scores
