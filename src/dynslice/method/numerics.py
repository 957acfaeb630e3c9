"""Bases in float64, and how exact the rotated maps of a slice are: measured and bounded."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from dynslice.core.errors import RunError
from dynslice.core.tensors import check_finite

TINY = 1e-30  # smaller than any size that counts


@torch.inference_mode()
def covariance(x: Iterable[Tensor]) -> Tensor:
    """sum X^T X [d, d] over batches of hidden states [.., d], its upper triangle, in float64.

    Products in float32 turn the leading subspace by enough to move perplexity.
    """
    total = doubles = None
    for part in x:
        d = part.shape[-1]
        if total is None:
            total = torch.zeros(d, d, dtype=torch.float64, device=part.device)
        if doubles is None or len(doubles) < len(part):
            # One buffer for all batches: mapping memory anew takes time.
            doubles = torch.empty_like(part, dtype=torch.float64)
        rows = doubles[: len(part)].copy_(part).view(-1, d)
        add_gram(total, rows)
    return total


@torch.inference_mode()
def principal_basis(covariance: Tensor, centred: bool = False) -> Tensor:
    """The eigenvectors of a covariance [d, d], largest eigenvalue first, as columns [d, d].

    Of the covariance the upper triangle counts, and is used up. SliceGPT's code adds 1 % of the
    mean diagonal to the diagonal, which moves all eigenvalues equally and no eigenvector, so it is
    left out here. centred: the stream has no mean over d, and the direction of the mean comes last,
    also where other directions are empty too.
    """
    return spectrum(covariance, centred)[1]


@torch.inference_mode()
def spectrum(covariance: Tensor, centred: bool = False) -> tuple[Tensor, Tensor]:
    """`principal_basis`, and before it its eigenvalues [d]."""
    check_finite(covariance, "the residual stream")
    if centred:
        # d t 1 1^T / d: below all others
        covariance -= (covariance.trace() or 1.0) / len(covariance)
    values, vectors = torch.linalg.eigh(covariance, UPLO="U")  # ascending
    return values.flip(-1), vectors.flip(-1)


ROWS = 16384  # of an embedding or a head that are changed at once
CHECKED = 64  # rows of each map, and columns of each basis, that are computed again in float64


class RoundingAudit:
    """What float arithmetic and the stored dtype leave of folding and rotating.

    rotation_error: the largest relative error (Frobenius norm) of a stored map, against float64,
    over rows evenly spaced. basis_error: the largest entry of |Q^T Q - 1| over columns evenly
    spaced. Both are measured on every map and basis of a slice. arbitrary_places: how many places
    keep more directions than the calibration tokens have.
    """

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype  # of what is stored
        self._rotation: list[Tensor] = []
        self._basis: list[Tensor] = []
        self._lacking: list[Tensor] = []

    def rotated(self, rows: Tensor, Q: Tensor, fold: Callable[[Tensor], Tensor]) -> Tensor:
        """rows [n, d] in coordinates of the stream, folded, in the basis Q: [n, w] in `dtype`."""
        made = by_rows(rows, lambda part: (fold(part.float()) @ Q.float()).to(self.dtype))
        some = slice(None, None, math.ceil(len(rows) / CHECKED))
        folded = fold(rows[some].double())
        difference = made[some].double() - folded @ Q
        self._rotation.append(difference.norm() / folded.norm().clamp(min=TINY))
        return made

    def basis(self, values: Tensor, V: Tensor, width: int) -> Tensor:
        """A basis V [d, d] of which so many columns are kept, looked at; values: see `spectrum`."""
        least = values.max() * len(V) * torch.finfo(values.dtype).eps
        self._lacking.append((values > least).sum() < width)
        some = V[:, :: math.ceil(len(V) / CHECKED)]
        unit = torch.eye(len(V), dtype=V.dtype, device=V.device)
        unit = unit[:, :: math.ceil(len(V) / CHECKED)]
        self._basis.append((V.T @ some - unit).abs().max())
        return V

    @property
    def rotation_error(self) -> float:
        """The largest relative error of a stored map."""
        return torch.stack(self._rotation).max().item()

    @property
    def basis_error(self) -> float:
        """The largest deviation from an orthonormal basis."""
        return torch.stack([torch.zeros_like(self._rotation[0]), *self._basis]).max().item()

    @property
    def arbitrary_places(self) -> int:
        """How many bases keep directions that the calibration tokens do not have."""
        return int(torch.stack(self._lacking).sum()) if self._lacking else 0

    @property
    def found(self) -> dict[str, float]:
        """All of it, by name."""
        names = ("rotation_error", "basis_error", "arbitrary_places")
        return {name: getattr(self, name) for name in names}

    def check(self, d: int) -> None:
        """Raise RunError where an error is larger than rounding explains.

        Rounding the result takes its epsilon, products of d terms in float32 at most d
        times theirs; a basis in float64 likewise.
        """
        limit = torch.finfo(self.dtype).eps + d * torch.finfo(torch.float32).eps
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


def add_gram(total: Tensor, X: Tensor) -> None:
    """total [k, k] += X^T X for X [n, k], on and above the diagonal only, as it is symmetric.

    Products are of the type of X. What reads the total has to read its upper triangle.
    """
    k = X.shape[-1]
    step = math.ceil(k / 4)
    for start in range(0, k, step):
        rows, left = slice(start, start + step), X[:, start : start + step].T
        if total.dtype == X.dtype:
            total[rows, start:].addmm_(left, X[:, start:])
        else:
            total[rows, start:] += left @ X[:, start:]
