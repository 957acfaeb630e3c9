"""Rotate and slice: the paper's method in one function, and SliceGPT's algorithm below it.

A *place* is where a block (attention or MLP) reads the residual stream x. At each place Q [d, w]
holds the leading w directions of x over the calibration tokens, and R [d, d - w] the others, which
are cut. Equations and the published protocol: docs/method.md.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from dynslice.core.tensors import check_finite, check_tokens, evaluating, synchronise
from dynslice.method.activations import (
    Activations,
    BlockInPlace,
    centring,
    residual_stream,
    run_block,
)
from dynslice.method.architectures import check_plan, dims_of, empty_sliced, family_of
from dynslice.method.bases import Bases, Use
from dynslice.method.modeling_sliced import Family, subtracts_mean
from dynslice.method.numerics import RoundingAudit, by_rows
from dynslice.method.plan import SlicePlan, check_request, final_slices, rounded_widths
from dynslice.method.redundancy import layer_redundancy
from dynslice.method.scores import normalise

# How x goes past one block: the residual connection from x in its basis [w, d], and what is added
# to the writing maps {name: [d, k]}. It is told whether a later basis depends on x, and whether the
# residual connection is stored, as a shortcut.
Step = Callable[[Activations, Tensor, Tensor, BlockInPlace, bool, bool], tuple[Tensor, dict]]


@dataclass(frozen=True)
class Sliced:
    """A sliced model (None where it was only written), its plan, its cost, and how exact it is.

    rotation_error, basis_error: see `RoundingAudit`. recovery_seconds: of fine-tuning afterwards.
    arbitrary_places: how many keep more directions than the calibration tokens have.
    """

    model: PreTrainedModel | None
    plan: SlicePlan
    seconds: float
    rotation_error: float
    basis_error: float
    recovery_seconds: float = 0.0
    arbitrary_places: int = 0


def dynamic_slicing(
    model: PreTrainedModel,
    lr_windows: Tensor,
    calibration: Tensor,
    slice_percentage: float,
    slice_base: float = 0.0,
    round_to: int = 8,
    start: Callable[[Activations], Step] | None = None,
) -> Sliced:
    """The paper's method: layer redundancy decides how wide the stream stays at each layer.

    lr_windows [m, T], calibration [n, T']: token ids. slice_percentage (SP) is the mean share of
    the width that is removed, slice_base (SB) the share removed from every layer; SB = SP is
    constant slicing. round_to: widths are multiples of it. start: see `sliced_weights`. The dense
    model is left as it was. Raises RequestError for shares that no plan has, and as
    `layer_redundancy` and `sliced_weights` do. Source: the paper's section 3.
    """
    SP, SB, dims = slice_percentage, slice_base, dims_of(model.config)
    check_request(dims, SP, SB, round_to)
    LR = layer_redundancy(model, lr_windows).lr  # LR_i: mean over tokens of cos(x_i, x_{i+1})
    n = normalise(LR)  # n_i = (LR_i - min LR) / (max LR - min LR)
    most = 1 - round_to / dims.hidden_size
    FS = final_slices(n, SP, SB, most)  # FS_i = SB + SLR_i, SLR_i = (SP - SB) n_i / mean(n)
    w = rounded_widths(FS, dims.hidden_size, round_to)  # w_i = d (1 - FS_i)
    plan = SlicePlan("dynamic", SP, SB, round_to, FS, w, dims)
    return slice_model(model, calibration, plan, start)


def slice_model(
    model: PreTrainedModel,
    windows: Tensor,
    plan: SlicePlan,
    start: Callable[[Activations], Step] | None = None,
    dtype: torch.dtype | None = None,
) -> Sliced:
    """Slice a dense model to the widths of a plan, calibrated on token windows [n, T].

    start: see `sliced_weights`. dtype: of the slice, that of the model by default. The dense model
    is left as it was. Raises as `sliced_weights`.
    """
    began, audit = time.perf_counter(), RoundingAudit(dtype or model.dtype)
    check_plan(model.config, plan)
    sliced, x = empty_sliced(model, plan), Activations(model.device)
    weights = sliced_weights(model, windows, plan, x, audit, start)
    with evaluating(model):
        count = len(sliced.state_dict())
        weights = dict(tqdm(weights, "slicing", count, unit="weight", leave=False))
    audit.check(plan.shape.hidden_size)
    if plan.layout.tied:  # one table, under both of its names
        family = family_of(model.config)
        weights[f"{family.head}.weight"] = weights[f"{family.embedding}.weight"]
    with torch.no_grad():
        sliced.load_state_dict(weights, assign=True)
        sliced.tie_weights()
        sliced = sliced.to(model.device).eval()
    sliced.config.dtype = audit.dtype
    synchronise(model.device)
    return Sliced(sliced, plan, time.perf_counter() - began, **audit.found)


@torch.no_grad()  # what becomes a weight is no tensor of inference_mode: those can't be fine-tuned
def sliced_weights(
    model: PreTrainedModel,
    windows: Tensor,
    plan: SlicePlan,
    x: Activations,
    audit: RoundingAudit,
    start: Callable[[Activations], Step] | None = None,
    use: Use | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """The weights of a slice by name, in the order in which the network keeps its layers.

    At each place x goes on as its projection Q Q^T x. Maps that read there become W diag(g) Q (g
    is the scale of the norm before them), maps that wrote there Q^T W, and the residual connection
    between places with bases Q and Q' becomes the shortcut Q^T Q'. The stream at each place is that
    of the part that is already sliced, and each block runs over the calibration tokens once (twice
    in a group of places that share a basis). A place that keeps the full width keeps its basis.
    (SliceGPT, section 3.)

    x: an empty store for the stream [tokens, d]. audit: folds and rotates, and takes note of the
    rounding. start: from the first stream to a step past each block, `project` by default.
    use: where the weights of a module come from, those of `model` itself by default. Raises
    RequestError when plan and model do not fit and for activations that are not finite.
    """
    check_plan(model.config, plan)
    check_tokens(model.config, windows)
    use = use or (lambda name: nullcontext(model.get_submodule(name)))
    family, dtype = family_of(model.config), audit.dtype
    centred = centring(model, family)

    with ExitStack() as tables:
        for name in family.embeddings:
            tables.enter_context(use(name))
        layer_arguments = residual_stream(model, windows, x)
        step = start(x) if start else project
        bases = Bases(model, plan, x, audit, layer_arguments, use)
        Q, R = bases.at(0)
        yield from _stored(_embeddings(model, family, plan, Q, audit, centred), dtype)
    place = 0
    for i, arguments in enumerate(layer_arguments):
        prefix = f"{family.layers}.{i}."
        with use(f"{family.layers}.{i}") as layer:
            for block in family.blocks:
                here = BlockInPlace(layer, block, arguments, centred)
                does_matter = place < bases.last_start, plan.shortcuts[place]
                residual, added = step(x, Q, R, here, *does_matter)
                Q_next, R_next = bases.at(place + 1)
                maps = _maps(here, family, plan, Q, Q_next, audit, added)
                yield from _stored(maps, dtype, prefix)
                if plan.shortcuts[place]:
                    shortcut = {f"{block.name}_shortcut": residual @ Q_next}
                    yield from _stored(shortcut.items(), dtype, prefix)
                Q, R, place = Q_next, R_next, place + 1
            yield from _stored(_left_alone(layer, family, plan), dtype, prefix)
    with use(family.final_norm) as final_norm:
        yield from _stored(_final_norm(final_norm, family, plan), dtype)
        # A tied head is the embedding, which is there already.
        if not plan.layout.tied or model.get_submodule(family.head).bias is not None:
            with use(family.head) as head:
                yield from _stored(_head(final_norm, head, family, plan, Q, audit), dtype)


def project(
    x: Activations,
    Q: Tensor,
    R: Tensor,
    block: BlockInPlace,
    is_needed: bool,
    _has_shortcut: bool,
) -> tuple[Tensor, dict]:
    """The step of SliceGPT: x <- x P + block(x P) where a later basis needs it, no correction."""
    if is_needed:
        run_block(x, R, block)
    return Q.T, {}


def _stored(
    weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype, prefix: str = ""
) -> Iterator[tuple[str, Tensor]]:
    for name, weight in weights:
        weight = weight.to(dtype).contiguous()
        check_finite(weight, f"weight {prefix}{name} of the slice")
        yield prefix + name, weight


def _embeddings(model, family: Family, plan: SlicePlan, Q: Tensor, audit, centred: Callable):
    """The rows that make up the first stream, in its basis; a tied table with a map into it."""
    for name in family.embeddings:
        # No variable holds a table: it would be kept while the head is made.
        table = f"{name}.weight"
        if not (plan.layout.tied and name == family.embedding):
            yield table, audit.rotated(model.get_parameter(table), Q, centred)
            continue
        yield table, model.get_parameter(table).clone()
        if plan.maps_embedding:
            yield f"{name}.map", audit.rotated(torch.eye(len(Q), device=Q.device), Q, centred)


def _maps(
    here: BlockInPlace,
    family: Family,
    plan: SlicePlan,
    Q: Tensor,
    Q_next: Tensor,
    audit: RoundingAudit,
    added: dict[str, Tensor],
) -> Iterator[tuple[str, Tensor]]:
    """The maps of a block in the bases before and after it, by their names in the layer."""
    layer, centred = here.layer, here.centred
    norm = layer.get_submodule(here.block.norm)
    g, b = _scale(norm, family) * _left_to_maps(plan, audit.dtype), getattr(norm, "bias", None)
    for name in here.block.reads:
        read = layer.get_submodule(name)
        W = read.weight
        yield f"{name}.weight", audit.rotated(W, Q, lambda W: W * g)
        if b is not None:
            own = 0.0 if read.bias is None else read.bias.float()
            yield f"{name}.bias", W.float() @ b.float() + own
        elif read.bias is not None:
            yield f"{name}.bias", read.bias.clone()
    for name in here.block.writes:
        write = layer.get_submodule(name)
        W = write.weight.float() + added[name].float() if name in added else write.weight
        yield f"{name}.weight", audit.rotated(W.T, Q_next, centred).T
        if write.bias is not None:
            yield f"{name}.bias", centred(write.bias.float()) @ Q_next.float()


def _left_alone(layer: nn.Module, family: Family, plan: SlicePlan) -> Iterator[tuple[str, Tensor]]:
    """The parameters of a layer that no map to or from the stream holds, such as norms of q.

    With them the scales of the norms before the blocks, where a plain checkpoint has such.
    """
    if plan.layout.plain:
        yield from ((f"{block.norm}.weight", _plain_scales(plan)) for block in family.blocks)
    taken = {name for block in family.blocks for name in (block.norm, *block.reads, *block.writes)}
    for name, parameter in layer.named_parameters():
        if name.rpartition(".")[0] not in taken:
            yield name, parameter.clone()


def _final_norm(norm: nn.Module, family: Family, plan: SlicePlan) -> Iterator[tuple[str, Tensor]]:
    """A LayerNorm stays as it is, and so does the norm before a head that is the embedding too."""
    if plan.layout.plain:
        yield f"{family.final_norm}.weight", _plain_scales(plan)
    if subtracts_mean(norm) or plan.layout.tied:
        for name, parameter in norm.named_parameters():
            yield f"{family.final_norm}.{name}", parameter.clone()


def _head(
    final_norm: nn.Module,
    head: nn.Module,
    family: Family,
    plan: SlicePlan,
    Q: Tensor,
    audit: RoundingAudit,
) -> Iterator[tuple[str, Tensor]]:
    """The head [V, w] with the scale of an RMS norm before it, where it has a table of its own."""
    keeps_scale = subtracts_mean(final_norm)
    scale = 1.0 if keeps_scale else _scale(final_norm, family) * _left_to_maps(plan, audit.dtype)
    if plan.layout.plain:
        yield f"{family.head}.weight", audit.rotated(head.weight, Q, lambda W: W * scale)
    elif not plan.layout.tied:
        yield (
            f"{family.head}.weight",
            by_rows(head.weight, lambda W: (W.float() * scale).to(W.dtype)),
        )
    if head.bias is not None:
        yield f"{family.head}.bias", head.bias.clone()


def _plain_scale(plan: SlicePlan) -> float:
    """What makes a norm over the width w that of the dense model, which divides by d."""
    return math.sqrt(plan.shape.hidden_size / plan.place_widths[-1])


def _left_to_maps(plan: SlicePlan, dtype: torch.dtype) -> float:
    """What rounding takes from the scale of a plain checkpoint's norms; 1 without such."""
    exact = _plain_scale(plan)
    return exact / torch.tensor(exact, dtype=dtype).item() if plan.layout.plain else 1.0


def _plain_scales(plan: SlicePlan) -> Tensor:
    return torch.full((plan.place_widths[-1],), _plain_scale(plan))


def _scale(norm: nn.Module, family: Family) -> Tensor:
    """The scale g [d] of a norm, which multiplies the normed stream."""
    if norm.weight is None:  # a LayerNorm without
        return torch.tensor(1.0)
    return norm.weight.float() + family.norm_offset
