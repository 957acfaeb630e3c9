"""Rotate and slice: the paper's algorithm on top of SliceGPT's transformation."""

import math
import time
from dataclasses import dataclass
from itertools import chain

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from dynslice.corpora import batches
from dynslice.errors import RequestError
from dynslice.models import check_finite, family_of, require_dense, synchronise
from dynslice.plan import Shape, SlicePlan
from dynslice.sliced import SLICED_CLASSES


@dataclass(frozen=True)
class Sliced:
    """A sliced model and what it cost."""

    model: PreTrainedModel
    seconds: float


@torch.no_grad()  # what becomes a weight is no tensor of inference_mode: those can't be fine-tuned
def slice_model(model: PreTrainedModel, windows: Tensor, plan: SlicePlan) -> Sliced:
    """Slice a dense model to the widths of a plan, calibrated on token windows [n, T].

    At each place where a block reads the residual stream x [tokens, d], Q [d, w] holds the first
    w eigenvectors of X^T X, and x goes on as its projection Q Q^T x. Maps that read there become
    W diag(g) Q (g is the scale of the norm before them), maps that wrote there Q^T W, and the
    residual connection between places with bases Q and Q' becomes the shortcut Q^T Q'. The
    signals of each place are those of the part that is already sliced, and each block runs over
    the calibration tokens once; those after the last place that is cut do not run. A place that
    keeps the full width keeps its basis. The dense model is left as it was. Covariances,
    bases and shortcuts are float64, the products that rotate weights float32.

    Raises RequestError when plan and model do not fit, RunError for non-finite activations.
    """
    check_plan(model.config, plan)
    start = time.perf_counter()
    family = family_of(model.config)
    layers = model.get_submodule(family.layers)
    d = plan.shape.hidden_size
    widths = [w for pair in zip(plan.attention_widths, plan.mlp_widths, strict=True) for w in pair]
    widths.append(d)  # the head reads the full stream, in its own basis
    last_cut = max((place for place, width in enumerate(widths) if width < d), default=-1)
    identity = torch.eye(d, dtype=torch.float64, device=model.device)

    weights: dict[str, Tensor] = {}

    def keep(name: str, weight: Tensor) -> None:
        weights[name] = weight.to(model.dtype).contiguous()

    def bases(width: int) -> tuple[Tensor, Tensor]:
        V = principal_basis(x) if width < d else identity
        return V[:, :width], V[:, width:]

    x, layer_arguments = residual_stream(model, windows)
    Q, R = bases(widths[0])
    embedding = model.get_submodule(family.embedding)
    keep(f"{family.embedding}.weight", embedding.weight.float() @ Q.float())

    places = [(i, kind) for i in range(len(layers)) for kind in ("attention", "mlp")]
    for place, (i, kind) in enumerate(tqdm(places, desc="slicing", unit="block", leave=False)):
        block, layer, prefix = getattr(family, kind), layers[i], f"{family.layers}.{i}"
        norm, module = layer.get_submodule(block.norm), layer.get_submodule(block.module)

        if place < last_cut:
            run_block(x, R, norm, module, layer_arguments if kind == "attention" else {})
        Q_next, R_next = bases(widths[place + 1])

        for name in block.reads:
            read = layer.get_submodule(name)
            keep(f"{prefix}.{name}.weight", (read.weight.float() * norm.weight.float()) @ Q.float())
            if read.bias is not None:
                keep(f"{prefix}.{name}.bias", read.bias.clone())
        write = layer.get_submodule(block.write)
        keep(f"{prefix}.{block.write}.weight", Q_next.T.float() @ write.weight.float())
        if write.bias is not None:
            keep(f"{prefix}.{block.write}.bias", write.bias.float() @ Q_next.float())
        keep(f"{prefix}.{kind}_shortcut", Q.T @ Q_next)
        Q, R = Q_next, R_next

    head, final_norm = model.get_submodule(family.head), model.get_submodule(family.final_norm)
    keep(f"{family.head}.weight", head.weight.float() * final_norm.weight.float())
    sliced = _assemble(model, plan, weights)
    synchronise(model.device)
    return Sliced(sliced, time.perf_counter() - start)


@torch.inference_mode()
def principal_basis(x: list[Tensor]) -> Tensor:
    """The eigenvectors of sum X^T X, largest eigenvalue first, as columns [d, d].

    x: batches of signals [.., d]. Products, sum and decomposition in float64: products in float32
    turn the subspace by enough to move perplexity. SliceGPT's code adds 1 % of the mean diagonal
    to the diagonal, which moves all eigenvalues alike and leaves the eigenvectors as they are,
    so it is left out here.
    """
    d = x[0].shape[-1]
    covariance = torch.zeros(d, d, dtype=torch.float64, device=x[0].device)
    starts = range(0, d, math.ceil(d / 4))
    # One buffer for all batches: mapping memory anew takes time.
    doubles = torch.empty_like(max(x, key=len), dtype=torch.float64)
    for part in x:
        rows = doubles[: len(part)].copy_(part).view(-1, d)
        for start in starts:  # X^T X is symmetric: on and above the diagonal is enough
            columns = slice(start, start + starts.step)
            covariance[columns, start:].addmm_(rows[:, columns].T, rows[:, start:])
    check_finite(covariance, "the residual stream")
    _, vectors = torch.linalg.eigh(covariance, UPLO="U")  # eigenvalues ascending
    return vectors.flip(-1)


@torch.inference_mode()
def run_block(
    x: list[Tensor], R: Tensor, norm: nn.Module, module: nn.Module, arguments: dict
) -> None:
    """In place, batch by batch: x <- x P + block(norm(x P)) with P = Q Q^T = 1 - R R^T.

    R [d, d - w] holds the directions that are cut, which are the fewer. x stays in the original
    coordinates. The projected stream has the same RMS (divisor d) as its w coordinates in the
    sliced network, so the dense block computes here what the sliced block will compute there.
    """
    R = R.to(x[0].dtype)
    for stream in x:
        stream -= stream @ R @ R.T
        output = module(norm(stream), **arguments)
        stream += output[0] if isinstance(output, tuple) else output


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
    """Stops a forward pass once the first layer has been reached."""


@torch.inference_mode()
def residual_stream(model: PreTrainedModel, windows: Tensor) -> tuple[list[Tensor], dict]:
    """What enters layer 0, as batches [b, T, d], and the other arguments that layers are given.

    Masks and position embeddings are those of a single window, and broadcast over a batch.
    """
    caught: list[tuple[Tensor, dict]] = []

    def catch(_layer, args, kwargs):
        caught.append((args[0], kwargs))
        raise _Caught

    first = model.get_submodule(family_of(model.config).layers)[0]
    handle = first.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        one = windows[:1].to(model.device)
        for batch in chain([one], batches(windows, "embedding", model.device)):
            try:
                model.base_model(batch, use_cache=False)
            except _Caught:
                continue
    finally:
        handle.remove()
    (_, arguments), *streams = caught
    return [stream for stream, _ in streams], arguments


def _assemble(model: PreTrainedModel, plan: SlicePlan, weights: dict[str, Tensor]):
    config_class, model_class = SLICED_CLASSES[model.config.model_type]
    settings = model.config.to_dict()
    for name in ("model_type", "architectures", "quantization_config"):
        settings.pop(name, None)
    config = config_class(
        **{**settings, "tie_word_embeddings": False},
        attention_widths=list(plan.attention_widths),
        mlp_widths=list(plan.mlp_widths),
    )
    with init_empty_weights(include_buffers=False):  # the weights that it takes are all there are
        sliced = model_class(config)
    sliced.load_state_dict(weights, assign=True)
    sliced.generation_config = model.generation_config
    return sliced.to(model.device).eval()
