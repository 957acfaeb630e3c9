"""Scores as numbers: redundancy of layers between least and most, and losses by place.

Apart from `redundancy` and `sensitivity`, which measure them, so that a report needs no torch.
"""

import math
from statistics import StatisticsError, fmean

from dynslice.core.errors import RequestError

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


def normalise(lr: tuple[float, ...]) -> tuple[float, ...]:
    """Scale LR to [0, 1]; where all layers are equally redundant, every score is 1."""
    low, high = min(lr), max(lr)
    if high == low:
        return (1.0,) * len(lr)
    return tuple((value - low) / (high - low) for value in lr)


def rises(value: dict) -> list[dict[float, float]]:
    """At each place, the rise of the mean NLL against the plan by the share that is cut there.

    value: what `sensitivity.place_losses` gave. The share of the plan, with no rise, is among them.
    """
    plan, found = fmean(value["plan"]), []
    for place in value["places"]:
        pairs = zip(value["shares"], place["losses"], strict=True)
        found.append({place["share"]: 0.0} | {share: fmean(nll) - plan for share, nll in pairs})
    return found


def read_rises(values: dict) -> list[dict[float, float]]:
    """The rises in the JSON of `dynslice sensitivity`. Raises RequestError when there are none."""
    try:
        found = rises(values)
        if all(math.isfinite(x) for place in found for pair in place.items() for x in pair):
            return found
    except (KeyError, TypeError, ValueError, AttributeError, StatisticsError):
        pass
    raise RequestError("the sensitivity file lists no losses; make it with `dynslice sensitivity`")


def lr_of(values: dict) -> list[float]:
    """The LR per layer in the JSON of `dynslice lr`. Raises RequestError when it is none."""
    try:
        layers = values["layers"]
        scores = [float(layer["lr"]) for layer in layers]
        told = [float(layer["normalised"]) for layer in layers if "normalised" in layer]
    except (KeyError, TypeError, ValueError) as error:
        raise RequestError("the LR file lists no layers; make it with `dynslice lr`") from error
    if [layer.get("index", i) for i, layer in enumerate(layers)] != list(range(len(scores))):
        raise RequestError("the LR file lists its layers out of order; make it with `dynslice lr`")
    if not scores or not all(map(math.isfinite, scores)):
        raise RequestError("the LR file holds no finite scores; make it with `dynslice lr`")
    if max(map(abs, scores)) > 1 + 1e-6:
        raise RequestError(
            f"the LR file holds scores from {min(scores)} to {max(scores)}, and LR is a cosine; "
            "make it with `dynslice lr`"
        )
    pairs = zip(told, normalise(tuple(scores)), strict=bool(told))
    if not all(math.isclose(*pair, rel_tol=1e-9, abs_tol=1e-9) for pair in pairs):
        raise RequestError(
            "the scores of the LR file and their normalised values do not fit together: it was "
            "altered; make it anew with `dynslice lr`"
        )
    return scores
