"""How a slice stores what stands around the widths: the vocabulary's table, and bases."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from dynslice.core.errors import RequestError

# LR of a layer below which places before and after it have no directions in common.
TURN = 0.5


@dataclass(frozen=True)
class Layout:
    """By default the layout of SliceGPT: head and embedding apart, a basis for each place.

    tied: embedding and head stay one table [V, d] in the coordinates of the dense model; a map
    [d, w_0] takes the embedding into the first basis. basis_groups: how many consecutive places
    share one basis, group by group; inside a group the stream is cut or padded with zeros, and has
    no shortcut. plain: one basis and one width for all places and the head, which makes an
    ordinary checkpoint of that hidden size. Raises RequestError for parts that exclude each other.
    """

    tied: bool = False
    basis_groups: tuple[Annotated[int, Field(ge=1)], ...] | None = None
    plain: bool = False

    def __post_init__(self):
        if self.plain and (self.tied or self.basis_groups):
            raise RequestError(
                "a plain checkpoint has one basis, and a head apart from its embedding; leave tied "
                "and basis_groups out"
            )

    @property
    def shares_bases(self) -> bool:
        """Whether several places have one basis."""
        return self.plain or self.basis_groups is not None


PUBLISHED = Layout()


def basis_groups(
    blocks: int, layers: int, basis_layers: int | str, lr: Sequence[float] | None = None
) -> tuple[int, ...]:
    """Groups of places that share a basis: runs of `basis_layers` layers ("all": of any length).

    blocks: places in a layer. A run ends after a layer whose LR is below TURN; without LR that is
    layer 0, as in every model that was looked at.
    """
    runs, length = [], 0
    for layer in range(layers):
        length += 1
        turns = layer == 0 if lr is None else lr[layer] < TURN
        if turns or length == basis_layers or layer == layers - 1:
            runs.append(length * blocks)
            length = 0
    return tuple(runs)
