"""Compensation in closed form: what slicing took is given back by the maps that write the stream.

Ridge regression of what the sliced stream lacks of the dense one; docs/method.md has the equations.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from dynslice.core.errors import RequestError, RunError
from dynslice.core.tensors import check_finite
from dynslice.method.activations import Activations, BlockInPlace, run_block
from dynslice.method.numerics import TINY, add_gram
from dynslice.method.slicing import Step

RIDGE = 0.1


@dataclass(frozen=True)
class Compensation:
    """How the written stream is corrected.

    ridge: relative to the inputs, see above; small ones fit the calibration text too closely.
    shortcut: whether shortcuts are corrected too, or the writing maps alone. Raises RequestError
    for a ridge that is not positive and finite.
    """

    ridge: float = RIDGE
    shortcut: bool = True

    def __post_init__(self):
        if not (math.isfinite(self.ridge) and self.ridge > 0):
            raise RequestError(
                f"ridge {self.ridge} is no positive number; give one such as {RIDGE}"
            )

    def __call__(self, x: Activations) -> Step:
        """A step past each block that starts at the first stream x, of both networks."""
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

    sizes: how many inputs belong to each matrix, k in all. Products are float32, as the ridge
    keeps the system well conditioned; sums and solution are float64.
    """

    def __init__(self, sizes: list[int], d: int, device: torch.device):
        self._sizes = sizes
        k = sum(sizes)
        self._gram = torch.zeros(k, k, dtype=torch.float64, device=device)
        self._cross = torch.zeros(k, d, dtype=torch.float64, device=device)

    def add(self, inputs: Tensor, x: Tensor, h: Tensor) -> None:
        """A batch of tokens: the inputs [.., k], what the stream is and what it should be."""
        z, x, h = (part.flatten(0, -2).float() for part in (inputs, x, h))
        size = h.pow(2).mean(-1, keepdim=True).sqrt().clamp(min=TINY)
        z, e = z / size, (h - x) / size
        add_gram(self._gram, z)
        self._cross += z.T @ e

    def solve(self, ridge: float) -> Tensor:
        """D [k, d] in float64, so that z D comes near to what is missing; used up by it.

        Raises RequestError for activations that are not finite, RunError where rounding makes the
        system indefinite.
        """
        check_finite(self._gram, "the inputs of a map that writes the residual stream")
        check_finite(self._cross, "what the sliced residual stream lacks")
        for part in self._gram.diagonal().split(self._sizes):
            part += ridge * part.mean().clamp(min=TINY)  # inputs that are zero take no correction
        factor, failed = torch.linalg.cholesky_ex(self._gram, upper=True)
        if failed:
            raise RunError(
                f"ridge {ridge} is too small for the inputs of a writing map, whose sizes differ "
                "too much; give a larger one, such as 1.0"
            )
        return torch.cholesky_solve(self._cross, factor, upper=True)


@torch.inference_mode()
def compensate_block(
    h: Activations,
    compensation: Compensation,
    x: Activations,
    Q: Tensor,
    R: Tensor,
    block: BlockInPlace,
    _is_needed: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """As `run_block`, and then x <- x + z D, the ridge regression of what x lacks of h.

    h, the dense stream, is taken to the next place first. z holds the coordinates x Q [w] and the
    inputs [k] of the writing maps. Returns the corrected residual connection [w, d] and what is
    added to the writing maps {name: [d, k]}, in the coordinates of the stream. Blocks after the
    last place that is cut run too: what was lost before can still be made good there.
    """
    run_block(h, R[:, :0], block)  # the dense network cuts nothing
    writes = [block.layer.get_submodule(name) for name in block.block.writes]
    known = Q if compensation.shortcut else Q[:, :0]
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
    D = regression.solve(compensation.ridge)
    seen = iter(z)
    x.update(lambda stream: stream.add_(next(seen) @ D.to(stream.dtype)))
    z.clear()
    to_shortcut, *to_maps = D.split(sizes)
    added = dict(zip(block.block.writes, (part.T for part in to_maps), strict=True))
    return (Q.T + to_shortcut if compensation.shortcut else Q.T), added
