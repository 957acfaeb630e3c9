"""Redundancy scores as numbers: which ones there are, and their place between least and most.

Apart from `redundancy`, which measures them, so that a report needs no torch.
"""

from dynslice.errors import RequestError

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
