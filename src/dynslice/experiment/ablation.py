"""What notebook 04 varies: one thing at a time, everything else as in the main comparison."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from dynslice.experiment.plan_specs import OwnEmbedding, PlanSpec, Shuffled
from dynslice.experiment.profile import percent
from dynslice.experiment.requests import Design, Point
from dynslice.experiment.store import Request, unique


@dataclass(frozen=True)
class Ablation:
    """One thing changed in one network."""

    question: str  # what is varied; equal for the variants of one thing
    point: Point
    texts: tuple[str, ...]


class Ablations:
    """The ablations of a profile, as requests."""

    def __init__(self, design: Design):
        self.design, self.profile = design, design.profile

    def ablated(self) -> list[Point]:
        """Constant, dynamic and its constant of equal size: what the ablations vary."""
        sp, sb = self.profile.ablation_slice_percentage, self.profile.ablation_slice_base
        return [] if sp is None else self.design.points_at([sp], [sb])[1:]

    def variants(self) -> list[Ablation]:
        """Every network that differs from the ablated ones in one thing."""
        p, design = self.profile, self.design
        if (sp := p.ablation_slice_percentage) is None:
            return []
        dynamic = partial(design.dynamic, sp, p.ablation_slice_base)
        found = []

        def replan(question: str, variant: str, plan: PlanSpec, schedule: str | None = None):
            """The dynamic network with another way to its widths, on the same calibration."""
            point = design.point(plan, variant, schedule)
            found.append(Ablation(question, point, (p.eval_texts[0],)))

        def recalibrate(question: str, point: Point, variant: str, **changes: Any):
            """The same widths with bases from other calibration windows."""
            network = {**point.network, "calibration": design.calibration(**changes)}
            point = replace(point, network=network, variant=f"{point.label}, {variant}")
            texts = p.eval_texts if "text" in changes else p.eval_texts[:1]
            found.append(Ablation(question, point, tuple(texts)))

        for end in p.ablation_last_layers:
            lr = design.lr_request(last_layer=end).config
            replan("last layer", f"last layer {end}", dynamic(lr=lr))
        for score in p.ablation_scores:
            replan("score", f"score {score}", dynamic(score=score))
        for unit in p.ablation_round_to:
            replan("rounding", f"widths rounded to {unit}", dynamic(round_to=unit))
        if p.ablation_embedding:
            cut, whole = OwnEmbedding(dynamic(), sp), OwnEmbedding(design.constant(sp), 0.0)
            replan("embedding", f"dynamic, embedding cut by {percent(sp)}", cut, "dynamic")
            replan("embedding", "constant, embedding whole", whole, "constant")
        for seed in range(p.draw_seed, p.draw_seed + p.ablation_shuffles):
            replan("shuffled", f"shuffled, draw {seed}", Shuffled(dynamic(), seed))
        ablated = constant, *_ = self.ablated()
        for count in p.ablation_calibration_windows:
            recalibrate("calibration size", constant, f"{count} windows", windows=count)
        for text in p.ablation_calibration_texts:
            recalibrate("calibration text", constant, f"calibrated on {text}", text=text)
        for seed in p.ablation_calibration_seeds:
            for point in ablated[1:]:
                recalibrate("calibration seed", point, f"seed {seed}", seed=seed)
        return found

    def lr_by_tokens(self) -> list[Request]:
        """LR on growing beginnings of the profile's text, the profile's own length among them."""
        counts = {*self.profile.ablation_lr_tokens, self.profile.lr_max_tokens}
        counts = sorted(counts, key=lambda count: count or float("inf"))
        return [self.design.lr_request(max_tokens=count) for count in counts]

    def lr_plan_requests(self) -> list[Request]:
        """The ablated dynamic plan as LR on each text makes it, in the order of lr_requests."""
        sp, sb = self.profile.ablation_slice_percentage, self.profile.ablation_slice_base
        given = [] if sp is None else [lr.config for lr in self.design.lr_requests()]
        return [self.design.plan_request(self.design.dynamic(sp, sb, lr=lr)) for lr in given]

    def single_layer_request(self) -> Request | None:
        """What cutting each layer alone does to the perplexity; None where nobody asks."""
        p, design = self.profile, self.design
        if p.single_layer_slice is None:
            return None
        return design.request(
            "sensitivity",
            slice_percentage=p.single_layer_slice,
            round_to=p.round_to,
            calibration=design.calibration(windows=p.single_layer_calibration_windows),
            **design.windows(p.eval_texts[0], "validation", p.single_layer_eval_windows),
        )

    def calibration_request(self, point: Point) -> Request:
        """Perplexity of a sliced network on its own calibration windows."""
        return self.design.request("ppl", slice=point.network, **point.network["calibration"])

    def centred_request(self) -> Request:
        """Perplexity of the dense model with centred embeddings (docs/method.md)."""
        p = self.profile
        read = self.design.windows(p.eval_texts[0], p.eval_split, p.eval_windows)
        return self.design.request("centred", **read)

    def requests(self) -> list[Request]:
        """All that the notebook needs; nothing where nothing is changed."""
        p, design = self.profile, self.design
        requests = [design.lr_request(last_layer=end) for end in p.ablation_last_layers]
        requests += [*design.lr_requests(), *self.lr_plan_requests()]
        requests += self.lr_by_tokens() if p.ablation_lr_tokens else []
        requests += filter(None, [self.single_layer_request()])
        for point in self.ablated():
            requests.append(design.slice_request(point))
            requests.append(design.perplexity_request(point, p.eval_texts[0]))
        variants = self.variants()
        for ablation in variants:
            requests.append(design.slice_request(ablation.point))
            requests += [design.perplexity_request(ablation.point, t) for t in ablation.texts]
            if ablation.question == "calibration size":
                requests.append(self.calibration_request(ablation.point))
        if variants:
            # Between the constant networks lies the curve that the others are compared with.
            curve = [p for p in design.points() if p.schedule in ("constant", "matched")]
            requests += map(design.slice_request, curve)
            requests += [r for point in curve for r in design.reported_requests(point)]
            requests += [self.centred_request(), self.calibration_request(self.ablated()[0])]
        asked = unique(requests)
        return asked if asked != [design.lr_request()] else []
