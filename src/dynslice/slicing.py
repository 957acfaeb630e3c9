"""Rotate and slice: the paper's algorithm on top of SliceGPT's transformation."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from dynslice.compensation import Compensation, Regression, inputs_of
from dynslice.corpora import batches
from dynslice.errors import RequestError
from dynslice.exactness import Exactness, by_rows
from dynslice.gram import add_gram
from dynslice.models import check_finite, check_tokens, family_of, require_dense, synchronise
from dynslice.plan import Shape, SlicePlan
from dynslice.signals import Signals
from dynslice.sliced import SLICED_CLASSES, Block, Family, block_output, subtracts_mean

# A module of a model by its name, with its weights on the device as long as the context lasts.
Use = Callable[[str], AbstractContextManager[nn.Module]]


@dataclass(frozen=True)
class Sliced:
    """A sliced model (None where it was only written), what it cost, and how exact it is.

    rotation_error, basis_error: see `Exactness`. recovery_seconds: of fine-tuning afterwards.
    """

    model: PreTrainedModel | None
    seconds: float
    rotation_error: float
    basis_error: float
    recovery_seconds: float = 0.0


def slice_model(
    model: PreTrainedModel,
    windows: Tensor,
    plan: SlicePlan,
    compensation: Compensation | None = None,
) -> Sliced:
    """Slice a dense model to the widths of a plan, calibrated on token windows [n, T].

    The dense model is left as it was. Raises as `sliced_weights`.
    """
    start, exactness = time.perf_counter(), Exactness()
    source = (model, windows, plan, Signals(model.device), exactness)
    weights = dict(sliced_weights(*source, compensation=compensation))
    with torch.no_grad():
        sliced = empty_sliced(model, plan)
        sliced.load_state_dict(weights, assign=True)
        sliced = sliced.to(model.device).eval()
    synchronise(model.device)
    errors = exactness.rotation_error, exactness.basis_error
    return Sliced(sliced, time.perf_counter() - start, *errors)


@torch.no_grad()  # what becomes a weight is no tensor of inference_mode: those can't be fine-tuned
def sliced_weights(
    model: PreTrainedModel,
    windows: Tensor,
    plan: SlicePlan,
    x: Signals,
    exactness: Exactness,
    use: Use | None = None,
    compensation: Compensation | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """The weights of a slice by name, in the order in which the network keeps its layers.

    At each place where a block reads the residual stream x [tokens, d], Q [d, w] holds the first
    w eigenvectors of X^T X, and x goes on as its projection Q Q^T x. Maps that read there become
    W diag(g) Q (g is the scale of the norm before them), maps that wrote there Q^T W, and the
    residual connection between places with bases Q and Q' becomes the shortcut Q^T Q'. The
    signals of each place are those of the part that is already sliced, and each block runs over
    the calibration tokens once; those after the last place that is cut do not run. A place that
    keeps the full width keeps its basis. A LayerNorm is a norm of the centred stream, so what
    writes the stream is centred with it (`centred`), and its bias goes into the maps that read.
    Covariances, bases and shortcuts are float64, the products that rotate weights float32.

    With a compensation the dense stream h runs beside x, and each shortcut and writing map is
    corrected towards it before the next place (`compensate_block`); blocks after the last place
    that is cut run too, since what was lost before can still be made good there.

    x: an empty store for the signals. exactness: takes note of the rounding. use: where the
    weights of a module come from, those of `model` itself by default. Raises RequestError when
    plan and model do not fit and for activations that are not finite, RunError where the result is
    less exact than rounding explains.
    """
    check_plan(model.config, plan)
    check_tokens(model.config, windows)
    h = None  # the dense stream, where there is a compensation
    use = use or (lambda name: nullcontext(model.get_submodule(name)))
    family, device, d = family_of(model.config), x.device, plan.shape.hidden_size
    widths = plan.place_widths  # before each block, and d for the head
    last_cut = max((place for place, width in enumerate(widths) if width < d), default=-1)
    centred = centring(model, family)
    mean_free = subtracts_mean(model.get_submodule(family.final_norm))

    def stored(weight: Tensor, name: str) -> tuple[str, Tensor]:
        weight = weight.to(model.dtype).contiguous()
        check_finite(weight, f"weight {name} of the slice")
        return name, weight

    def bases(width: int) -> tuple[Tensor, Tensor]:
        if width < d:
            V = principal_basis(x, centred=mean_free)
            exactness.basis(V)
        else:
            V = torch.eye(d, dtype=torch.float64, device=device)
        return V[:, :width], V[:, width:]

    with _use_all(use, family.embeddings):
        layer_arguments = residual_stream(model, windows, x)
        if compensation:
            h = x.copied()
        Q, R = bases(widths[0])
        for name in family.embeddings:
            table = f"{name}.weight"
            # No variable holds a table: it would be kept beside the head.
            yield stored(
                exactness.rotated(model.get_parameter(table), Q, model.dtype, centred), table
            )

    place = 0
    for i in tqdm(range(plan.shape.layers), desc="slicing", unit="layer", leave=False):
        with use(f"{family.layers}.{i}") as layer:
            for block in family.blocks:
                step = (layer, block, layer_arguments[i], centred)
                residual, added = Q.T, {}  # the residual connection from x in its basis
                if compensation:
                    D, added = compensate_block(x, h, Q, R, *step, compensation)
                    residual = residual + D
                elif place < last_cut:
                    run_block(x, R, *step)
                Q_next, R_next = bases(widths[place + 1])

                rotated = partial(exactness.rotated, dtype=model.dtype)
                given = (layer, block, family, Q, Q_next, centred, rotated, added)
                for name, tensor in _fold(*given):
                    yield stored(tensor, f"{family.layers}.{i}.{name}")
                shortcut = f"{family.layers}.{i}.{block.name}_shortcut"
                yield stored(residual @ Q_next, shortcut)
                Q, R, place = Q_next, R_next, place + 1
            for name, parameter in _left_alone(layer, family):
                yield stored(parameter.clone(), f"{family.layers}.{i}.{name}")

    with use(family.final_norm) as final_norm, use(family.head) as head:
        scale = torch.ones(d, device=device)
        if subtracts_mean(final_norm):  # stays as it is
            for name, parameter in final_norm.named_parameters():
                yield stored(parameter.clone(), f"{family.final_norm}.{name}")
        else:
            scale = _scale(final_norm, family)
        folded = by_rows(head.weight, lambda W: (W.float() * scale).to(model.dtype))
        yield stored(folded, f"{family.head}.weight")
        if head.bias is not None:
            yield stored(head.bias.clone(), f"{family.head}.bias")
    exactness.check(d, model.dtype)


def _fold(
    layer: nn.Module,
    block: Block,
    family: Family,
    Q: Tensor,
    Q_next: Tensor,
    centred: Callable,
    rotated: Callable,
    added: dict[str, Tensor],
) -> Iterator[tuple[str, Tensor]]:
    """The maps of a block in the bases before and after it, by their names in the layer.

    added: what a compensation adds to writing maps [d, k].
    """
    norm = layer.get_submodule(block.norm)
    g, b = _scale(norm, family), getattr(norm, "bias", None)
    for name in block.reads:
        read = layer.get_submodule(name)
        W = read.weight
        yield f"{name}.weight", rotated(W, Q, fold=lambda W: W * g)
        if b is not None:
            own = 0.0 if read.bias is None else read.bias.float()
            yield f"{name}.bias", W.float() @ b.float() + own
        elif read.bias is not None:
            yield f"{name}.bias", read.bias.clone()
    for name in block.writes:
        write = layer.get_submodule(name)
        W = write.weight.float() + added[name].float() if name in added else write.weight
        yield f"{name}.weight", rotated(W.T, Q_next, fold=centred).T
        if write.bias is not None:
            yield f"{name}.bias", centred(write.bias.float()) @ Q_next.float()


def _left_alone(layer: nn.Module, family: Family) -> Iterator[tuple[str, Tensor]]:
    """The parameters of a layer that no map to or from the stream holds, such as norms of q."""
    taken = {name for block in family.blocks for name in (block.norm, *block.reads, *block.writes)}
    for name, parameter in layer.named_parameters():
        if name.rpartition(".")[0] not in taken:
            yield name, parameter


def _scale(norm: nn.Module, family: Family) -> Tensor:
    """The scale g [d] of a norm, which multiplies the normed stream."""
    if norm.weight is None:  # a LayerNorm without
        return torch.tensor(1.0)
    return norm.weight.float() + family.norm_offset


def centring(model: PreTrainedModel, family: Family) -> Callable[[Tensor], Tensor]:
    """x [.., d] less its mean over d where the family's norms take it away, else x itself."""
    if not subtracts_mean(model.get_submodule(family.final_norm)):
        return lambda x: x
    return lambda x: x - x.mean(dim=-1, keepdim=True)


@contextmanager
def _use_all(use: Use, names: tuple[str, ...]) -> Iterator[None]:
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(use(name))
        yield


@torch.inference_mode()
def principal_basis(x: Iterable[Tensor], centred: bool = False) -> Tensor:
    """The eigenvectors of sum X^T X, largest eigenvalue first, as columns [d, d].

    x: batches of signals [.., d]. Products, sum and decomposition in float64: products in float32
    turn the subspace by enough to move perplexity. SliceGPT's code adds 1 % of the mean diagonal
    to the diagonal, which moves all eigenvalues alike and leaves the eigenvectors as they are,
    so it is left out here. centred: the signals have no mean over d, and the direction of the
    mean comes last, also where other directions are empty too.
    """
    covariance = doubles = None
    for part in x:
        d = part.shape[-1]
        if covariance is None:
            covariance = torch.zeros(d, d, dtype=torch.float64, device=part.device)
        if doubles is None or len(doubles) < len(part):
            # One buffer for all batches: mapping memory anew takes time.
            doubles = torch.empty_like(part, dtype=torch.float64)
        rows = doubles[: len(part)].copy_(part).view(-1, d)
        add_gram(covariance, rows)
    del doubles
    check_finite(covariance, "the residual stream")
    if centred:
        # d t 1 1^T / d: below all others
        covariance -= (covariance.trace() or 1.0) / len(covariance)
    _, vectors = torch.linalg.eigh(covariance, UPLO="U")  # eigenvalues ascending
    return vectors.flip(-1)


@torch.inference_mode()
def run_block(
    x: Signals, R: Tensor, layer: nn.Module, block: Block, arguments: dict, centred: Callable
) -> None:
    """In place, batch by batch: x <- x P + block(x P) with P = Q Q^T = 1 - R R^T.

    R [d, d - w] holds the directions that are cut, which are the fewer. x stays in the original
    coordinates. The projected stream has the same RMS (divisor d) as its w coordinates in the
    sliced network, so the dense block computes here what the sliced block will compute there.
    """

    def step(stream: Tensor) -> Tensor:
        cut = R.to(stream.dtype)
        stream -= stream @ cut @ cut.T
        stream += centred(block_output(layer, block, stream, arguments))
        return stream

    x.update(step)


@torch.inference_mode()
def compensate_block(
    x: Signals,
    h: Signals,
    Q: Tensor,
    R: Tensor,
    layer: nn.Module,
    block: Block,
    arguments: dict,
    centred: Callable,
    compensation: Compensation,
) -> tuple[Tensor, dict[str, Tensor]]:
    """As `run_block`, and then x <- x + z D, the ridge regression of what x lacks of h.

    h, the dense stream, is taken to the next place first. z holds the coordinates x Q [w] and the
    inputs [k] of the writing maps. Returns what is added to the shortcut [w, d] and to the writing
    maps {name: [d, k]}, in the coordinates of the stream.
    """

    run_block(h, R[:, :0], layer, block, arguments, centred)  # the dense network cuts nothing
    writes = [layer.get_submodule(name) for name in block.writes]
    known = Q if compensation.shortcut else Q[:, :0]
    sizes = [known.shape[1], *(map_.in_features for map_ in writes)]
    regression, z, dense = Regression(sizes, len(Q), x.device), x.beside(), iter(h)

    def step(stream: Tensor) -> Tensor:
        cut = R.to(stream.dtype)
        stream -= stream @ cut @ cut.T
        coordinates = stream @ known.to(stream.dtype)
        with inputs_of(writes) as inputs:
            output = block_output(layer, block, stream, arguments)
        stream += centred(output)
        inputs = torch.cat([coordinates, *inputs], dim=-1)
        regression.add(inputs, stream, next(dense))
        z.append(inputs)
        return stream

    x.update(step)
    D = regression.solve(compensation.ridge)
    seen = iter(z)
    x.update(lambda stream: stream.add_(next(seen) @ D.to(stream.dtype)))
    z.clear()
    to_shortcut, *to_maps = D.split(sizes)
    added = dict(zip(block.writes, (part.T for part in to_maps), strict=True))
    return (to_shortcut if compensation.shortcut else torch.zeros_like(Q.T)), added


def check_plan(config, plan: SlicePlan) -> None:
    """Raise RequestError when a plan was made for a model of another shape."""
    require_dense(config, "slicing")
    shape = Shape.of(config)
    for name in Shape.__dataclass_fields__:
        here, planned = getattr(shape, name), getattr(plan.shape, name)
        if here != planned:
            raise RequestError(
                f"the plan was made for another model ({name} {planned}, here {here}); make it "
                "anew with `dynslice plan`"
            )


class _Caught(Exception):
    """Stops a forward pass once the last layer has been reached."""


@torch.inference_mode()
def residual_stream(model: PreTrainedModel, windows: Tensor, x: Signals) -> list[dict]:
    """Fill x with what enters layer 0, [b, T, d]; the other arguments that each layer is given.

    No layer runs. Masks and position embeddings are those of a single window, and broadcast over
    a batch.
    """
    family = family_of(model.config)
    layers = model.get_submodule(family.layers)
    centred = centring(model, family)
    arguments: list[dict] = []

    def pass_on(hidden_states: Tensor, **kwargs) -> Tensor:
        arguments.append(kwargs)
        if len(arguments) == len(layers):
            raise _Caught
        return hidden_states

    def catch(hidden_states: Tensor, **kwargs) -> None:
        x.append(centred(hidden_states))
        raise _Caught

    def forward(ids: Tensor) -> None:
        with suppress(_Caught):
            model.base_model(ids, use_cache=False)

    try:
        for layer in layers:
            layer.forward = pass_on
        forward(windows[:1].to(x.device))
        layers[0].forward = catch
        for batch in batches(windows, "embedding", x.device):
            forward(batch)
    finally:
        for layer in layers:
            del layer.forward
    return arguments


def empty_sliced(model: PreTrainedModel, plan: SlicePlan) -> PreTrainedModel:
    """The sliced network of a dense model, with parameters that have no storage yet."""
    config_class, model_class = SLICED_CLASSES[model.config.model_type]
    settings = model.config.to_dict()
    for name in ("model_type", "architectures", "quantization_config"):
        settings.pop(name, None)
    config = config_class(
        **{**settings, "tie_word_embeddings": False, "dtype": model.dtype},
        attention_widths=list(plan.attention_widths),
        mlp_widths=list(plan.mlp_widths),
    )
    with init_empty_weights(include_buffers=False):  # the weights that it takes are all there are
        sliced = model_class(config)
    sliced.generation_config = model.generation_config
    return sliced
