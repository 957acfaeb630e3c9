"""How exact the rotated maps of a slice are: measured against float64, and bounded."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dynslice.errors import RunError

ROWS = 16384  # of an embedding or a head that are changed at once
CHECKED = 64  # rows of each map, and columns of each basis, that are computed again in float64


class Exactness:
    """What float arithmetic and the stored dtype leave of folding and rotating.

    rotation_error: the largest relative error (Frobenius norm) of a stored map, against float64,
    over rows evenly spaced. basis_error: the largest entry of |Q^T Q - 1| over columns evenly
    spaced. Both are measured on every map and basis of a slice.
    """

    def __init__(self):
        self._rotation: list[Tensor] = []
        self._basis: list[Tensor] = []

    def rotated(
        self, rows: Tensor, Q: Tensor, dtype: torch.dtype, fold: Callable = lambda rows: rows
    ) -> Tensor:
        """rows [n, d] in coordinates of the stream, folded, in the basis Q: [n, w] in `dtype`."""
        made = by_rows(rows, lambda part: (fold(part.float()) @ Q.float()).to(dtype))
        some = slice(None, None, math.ceil(len(rows) / CHECKED))
        folded = fold(rows[some].double())
        difference = made[some].double() - folded @ Q
        self._rotation.append(difference.norm() / folded.norm().clamp(min=1e-30))
        return made

    def basis(self, V: Tensor) -> None:
        """Look at a basis V [d, d]."""
        some = V[:, :: math.ceil(len(V) / CHECKED)]
        unit = torch.eye(len(V), dtype=V.dtype, device=V.device)
        unit = unit[:, :: math.ceil(len(V) / CHECKED)]
        self._basis.append((V.T @ some - unit).abs().max())

    @property
    def rotation_error(self) -> float:
        """The largest relative error of a stored map."""
        return torch.stack(self._rotation).max().item()

    @property
    def basis_error(self) -> float:
        """The largest deviation from an orthonormal basis."""
        return torch.stack([torch.zeros_like(self._rotation[0]), *self._basis]).max().item()

    def check(self, d: int, dtype: torch.dtype) -> None:
        """Raise RunError where an error is larger than rounding explains.

        Rounding the result to `dtype` takes its epsilon, products of d terms in float32 at most d
        times theirs; a basis in float64 likewise.
        """
        limit = torch.finfo(dtype).eps + d * torch.finfo(torch.float32).eps
        basis_limit = 100 * d * torch.finfo(torch.float64).eps
        errors = {
            "rotation": (self.rotation_error, limit),
            "basis": (self.basis_error, basis_limit),
        }
        for name, (error, bound) in errors.items():
            if not error <= bound:
                raise RunError(
                    f"the {name} error of the slice is {error:.1e}, and rounding explains "
                    f"{bound:.1e}; use --dtype float32, and report it if that does not help"
                )


def by_rows(table: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """A table [n, ..] changed part by part: in float32 a whole one can take gigabytes."""
    if len(table) <= ROWS:
        return change(table)
    changed = None
    for start in range(0, len(table), ROWS):
        part = change(table[start : start + ROWS])
        if changed is None:
            changed = part.new_empty(len(table), part.shape[1])
        changed[start : start + ROWS] = part
    return changed
