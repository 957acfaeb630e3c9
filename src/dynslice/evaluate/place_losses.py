"""What each place is worth: the loss when the stream is cut more or less at that place alone.

All other places are cut as a plan says: what one place drops, the next can not drop again. What
comes before a place runs once for all, so the places take half as many passes as there are places.
"""

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from dynslice.core.errors import RequestError
from dynslice.core.tensors import check_finite, check_tokens, evaluating
from dynslice.evaluate.perplexity import has_plain_head, head_losses
from dynslice.method.activations import (
    Activations,
    BlockInPlace,
    centring,
    residual_stream,
    run_block,
)
from dynslice.method.architectures import check_plan, family_of
from dynslice.method.modeling_sliced import subtracts_mean
from dynslice.method.numerics import covariance, principal_basis
from dynslice.method.plan import SlicePlan


@torch.inference_mode()
def place_losses(
    model: PreTrainedModel,
    calibration: Tensor,
    windows: Tensor,
    plan: SlicePlan,
    shares: list[float],
) -> dict:
    """NLL in nats per token of windows [n, T]: by the plan, and with one place cut by a share.

    calibration: token windows [m, T'] whose activations give the bases. Returns {"plan": [n],
    "shares", "places": [{"layer", "block", "share", "losses": [[n] of each share]}]}, places in
    the order in which the stream comes by, with the share that the plan cuts there. Raises
    RequestError for a share outside 0 to 1, a plan of another model, a head that is not a plain
    one, and activations that are not finite.
    """
    check_plan(model.config, plan)
    for read in (calibration, windows):
        check_tokens(model.config, read)
    if not has_plain_head(model.config):
        raise RequestError("sensitivity needs a plain head; use a schedule that needs none of it")
    for share in shares:
        if not 0 < share < 1:
            raise RequestError(f"share {share} is outside 0 to 1; give one such as 0.3")
    with evaluating(model):
        x, h = Activations(model.device), Activations(model.device)
        fitting, steps = _blocks(model, calibration, x), _blocks(model, windows, h)
        mean_free = subtracts_mean(model.get_submodule(family_of(model.config).final_norm))
        bases, planned = [], h.copied()
        both = zip(fitting, steps, plan.place_widths, strict=False)
        for fit, step, width in tqdm(both, total=len(steps), desc="bases", leave=False):
            bases.append(principal_basis(covariance(x), centred=mean_free).float())
            run_block(x, bases[-1][:, width:], fit)
            run_block(planned, bases[-1][:, width:], step)

        places, d, blocks = [], model.config.hidden_size, len(plan.shape.reads)
        for place, step in enumerate(tqdm(steps, desc="place losses", unit="place", leave=False)):
            rows = []
            for share in shares:
                widths = [round(d * (1 - share)), *plan.place_widths[place + 1 : -1]]
                stream = h.copied()
                for basis, width, later in zip(bases[place:], widths, steps[place:], strict=True):
                    run_block(stream, basis[:, width:], later)
                rows.append(_losses(model, stream, windows))
                stream.clear()
            width = plan.place_widths[place]
            run_block(h, bases[place][:, width:], step)
            where = {"layer": place // blocks, "block": step.block.name, "share": 1 - width / d}
            places.append({**where, "losses": rows})
        return {"plan": _losses(model, planned, windows), "shares": list(shares), "places": places}


def _blocks(model: PreTrainedModel, windows: Tensor, x: Activations) -> list[BlockInPlace]:
    """Every block in the order in which the stream comes by; x is filled with the first stream."""
    family = family_of(model.config)
    given = residual_stream(model, windows, x)
    layers = zip(model.get_submodule(family.layers), given, strict=True)
    of_blocks = [(layer, block, own) for layer, own in layers for block in family.blocks]
    return [BlockInPlace(*parts, centring(model, family)) for parts in of_blocks]


def _losses(model: PreTrainedModel, stream: Activations, windows: Tensor) -> list[float]:
    """The mean NLL of each window, from the stream behind the last block."""
    final_norm = model.get_submodule(family_of(model.config).final_norm)
    nll, start = [], 0
    for batch in stream:
        ids = windows[start : start + len(batch)].to(model.device)
        nll.append(head_losses(model, final_norm(batch), ids).view(len(ids), -1))
        start += len(batch)
    mean = torch.cat(nll).double().mean(dim=1)
    check_finite(mean, "the log-likelihood", model.dtype)
    return mean.tolist()
