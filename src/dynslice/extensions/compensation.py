"""Compensation in closed form: what slicing took is given back by the maps that write the stream.

Ridge regression of what the sliced stream lacks of the dense one; docs/method.md has the equations.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial

import torch
from torch import Tensor, nn

from dynslice.core.errors import RequestError, RunError
from dynslice.core.tensors import check_finite
from dynslice.method.activations import Activations, BlockInPlace, run_block
from dynslice.method.numerics import TINY, add_gram
from dynslice.method.slicing import Step

RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # that held-out calibration tokens choose from
START = 3.0
SKETCH = 64  # random directions of the stream in which they are compared


@dataclass(frozen=True)
class Compensation:
    """How the written stream is corrected.

    ridge: relative to the mean square of the inputs; None lets the calibration tokens choose one
    for each block from RIDGES, or no correction where none lowers the held-out error. shortcut:
    whether shortcuts are corrected too, or the writing maps alone. chosen: the ridge of each block
    of the last slice, None where nothing was corrected. Raises RequestError for a ridge that is not
    positive and finite.
    """

    ridge: float | None = None
    shortcut: bool = True
    chosen: list[float | None] = field(default_factory=list, init=False, compare=False)

    def __post_init__(self):
        if self.ridge is not None and not (math.isfinite(self.ridge) and self.ridge > 0):
            raise RequestError(f"ridge {self.ridge} is no positive number; give one such as 0.1")

    def __call__(self, x: Activations) -> Step:
        """A step past each block that starts at the first stream x, of both networks."""
        self.chosen.clear()
        return partial(compensate_block, x.copied(), self)


@contextmanager
def inputs_of(maps: list[nn.Module]) -> Iterator[list[Tensor]]:
    """What the maps are given while the context lasts, in their order; filled when it ends."""
    seen: dict[int, Tensor] = {}

    def note(index: int):
        def hook(_map, args):
            seen[index] = args[0]

        return hook

    handles = [map_.register_forward_pre_hook(note(i)) for i, map_ in enumerate(maps)]
    inputs: list[Tensor] = []
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()
    inputs += [seen[i] for i in range(len(maps))]


class Regression:
    """Ridge regression of what the stream [.., d] lacks on the inputs [.., k], batch by batch.

    sizes: how many inputs belong to each matrix, k in all. Sums are kept in two halves, of windows
    in turn, so that one can judge what the other one gives. Products are float32, as the ridge
    keeps the system well conditioned; sums and solution are float64.
    """

    def __init__(self, sizes: list[int], d: int, device: torch.device):
        self._sizes, self._windows = sizes, 0
        k, exact = sum(sizes), {"dtype": torch.float64, "device": device}
        self._grams = [torch.zeros(k, k, **exact) for _ in range(2)]
        self._crosses = [torch.zeros(k, d, **exact) for _ in range(2)]

    def add(self, inputs: Tensor, x: Tensor, h: Tensor) -> None:
        """A batch of windows: inputs [b, T, k], what the stream [b, T, d] is and should be."""
        size = h.float().pow(2).mean(-1, keepdim=True).sqrt().clamp(min=TINY)
        z, e = inputs.float() / size, (h.float() - x.float()) / size
        first, self._windows = self._windows, self._windows + len(z)
        for half in (0, 1):
            rows, missing = (part[(half - first) % 2 :: 2].flatten(0, 1) for part in (z, e))
            if len(rows):
                add_gram(self._grams[half], rows)
                self._crosses[half] += rows.T @ missing

    def choose(self) -> float | None:
        """The ridge of RIDGES with the least held-out error; None where no one lowers it.

        D comes from one half. The squared error that it leaves on the other one, up to what is
        missing anyway, is tr(D^T G D) - 2 tr(D^T C), compared in SKETCH random directions. From
        START the ridges go up or down as long as it falls. A single window leaves nothing to judge
        by, so it corrects nothing.
        """
        d = self._crosses[0].shape[1]
        directions = torch.randn(d, SKETCH, generator=torch.Generator().manual_seed(0))
        sketch = directions.to(self._crosses[0]) if d > SKETCH else None
        fit, test = (gram.float() for gram in self._grams)
        C, unseen = ((c if sketch is None else c @ sketch).float() for c in self._crosses)
        above = torch.triu(test, 1)
        test.triu_()

        @cache
        def error(place: int) -> float:
            if not 0 <= place < len(RIDGES):
                return math.inf
            D = _solution(fit.clone(), C, self._penalties(RIDGES[place]).float())
            if D is None:
                return math.inf
            return ((D * (test @ D + above.T @ D)).sum() - 2 * (D * unseen).sum()).item()

        best = RIDGES.index(START)
        step = 1 if error(best + 1) < error(best) else -1
        while error(best + step) < error(best):
            best += step
        return RIDGES[best] if error(best) < 0 else None

    def solve(self, ridge: float) -> Tensor:
        """D [k, d] in float64, so that z D comes near to what is missing; used up by it.

        Raises RequestError for activations that are not finite, RunError where rounding makes the
        system indefinite.
        """
        penalties = self._penalties(ridge)
        gram, cross = (halves[0].add_(halves.pop()) for halves in (self._grams, self._crosses))
        D = _solution(gram, cross, penalties)
        if D is None:
            raise RunError(
                f"ridge {ridge} is too small for the inputs of a writing map, whose sizes differ "
                "too much; give a larger one, such as 1.0"
            )
        return D

    def check(self) -> None:
        """Raise RequestError for activations that are not finite."""
        for gram, cross in zip(self._grams, self._crosses, strict=True):
            check_finite(gram, "the inputs of a map that writes the residual stream")
            check_finite(cross, "what the sliced residual stream lacks")

    def _penalties(self, ridge: float) -> Tensor:
        """What is added to the diagonal [k]; inputs that are zero take no correction."""
        diagonal = self._grams[0].diagonal() + self._grams[1].diagonal()
        means = [part.mean().clamp(min=TINY) for part in diagonal.split(self._sizes)]
        sizes = torch.tensor(self._sizes, device=diagonal.device)
        return ridge * torch.stack(means).repeat_interleave(sizes)


def _solution(gram: Tensor, cross: Tensor, penalties: Tensor) -> Tensor | None:
    """(G + diag(penalties))^-1 C by the upper triangle of G, which is used up; None if singular."""
    gram.diagonal().add_(penalties)
    factor, failed = torch.linalg.cholesky_ex(gram, upper=True)
    return None if failed else torch.cholesky_solve(cross, factor, upper=True)


def compensate_block(
    h: Activations,
    compensation: Compensation,
    x: Activations,
    Q: Tensor,
    R: Tensor,
    block: BlockInPlace,
    _is_needed: bool,
    has_shortcut: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`corrected` at a block, past which the dense stream h is taken first.

    Blocks after the last place that is cut run too: what was lost before can still be made good.
    """
    run_block(h, None, block)
    return corrected(h, compensation, x, Q, R, block, has_shortcut)


@torch.inference_mode()
def corrected(
    h: Activations,
    compensation: Compensation,
    x: Activations,
    Q: Tensor,
    R: Tensor,
    block: BlockInPlace,
    has_shortcut: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """As `run_block`, and then x <- x + z D, the ridge regression of what x lacks of h.

    h is what x should be behind the block. z holds the inputs [k] of the writing maps, and the
    coordinates x Q [w] where a shortcut can be corrected too. Returns the corrected residual
    connection [w, d] and what is added to the writing maps {name: [d, k]}, in the coordinates of
    the stream.
    """
    writes = [block.layer.get_submodule(name) for name in block.block.writes]
    known = Q if compensation.shortcut and has_shortcut else Q[:, :0]
    sizes = [known.shape[1], *(map_.in_features for map_ in writes)]
    regression, z, dense = Regression(sizes, len(Q), x.device), x.empty_store(), iter(h)

    def past(stream: Tensor) -> Tensor:
        cut = R.to(stream.dtype)
        stream -= stream @ cut @ cut.T
        coordinates = stream @ known.to(stream.dtype)
        with inputs_of(writes) as inputs:
            output = block(stream)
        stream += output
        inputs = torch.cat([coordinates, *inputs], dim=-1)
        regression.add(inputs, stream, next(dense))
        z.append(inputs)
        return stream

    x.update(past)
    regression.check()
    ridge = compensation.ridge or regression.choose()
    compensation.chosen.append(ridge)
    if ridge is None:
        z.clear()
        return Q.T, {}
    D = regression.solve(ridge)
    seen = iter(z)
    x.update(lambda stream: stream.add_(next(seen) @ D.to(stream.dtype)))
    z.clear()
    to_shortcut, *to_maps = D.split(sizes)
    added = dict(zip(block.block.writes, (part.T for part in to_maps), strict=True))
    return (Q.T + to_shortcut if known.shape[1] else Q.T), added
