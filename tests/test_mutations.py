"""The important tests can fail: each is run on a package with one wrong line, and must notice.

A mutation replaces text in the source of one function, for the length of one test. The same test
passes on the package as it is.
"""

import inspect
import textwrap
from dataclasses import dataclass
from types import CodeType

import pytest
import test_beyond
import test_compare
import test_compensation
import test_corpora
import test_evaluation
import test_layout
import test_plan
import test_redundancy
import test_results
import test_schedules
import test_slicing
import torch
from conftest import TIED, TINY
from prose import paragraphs

from dynslice.core import assets
from dynslice.evaluate import perplexity
from dynslice.experiment import equal_size
from dynslice.experiment.profile import load
from dynslice.experiment.requests import Design
from dynslice.experiment.store import Request, Store
from dynslice.extensions import compensation, schedules
from dynslice.inputs import checkpoints, models
from dynslice.inputs.windows import sample_windows, token_stream
from dynslice.method import activations, architectures, modeling_sliced, redundancy, slicing
from dynslice.method.activations import centring
from dynslice.method.bases import Bases
from dynslice.method.controls import _nearest, shuffled
from dynslice.method.numerics import covariance, spectrum
from dynslice.method.plan import SlicePlan, dynamic, final_slices, rounded_widths
from dynslice.method.scores import normalise
from dynslice.report import statistics

# Tests that fail: an assertion, or pytest's "did not raise".
NOTICED = (AssertionError, pytest.fail.Exception)


@dataclass(frozen=True)
class Mutation:
    """One function of the package with `right` replaced by `wrong` in its source."""

    function: object
    right: str
    wrong: str

    def code(self):
        source = textwrap.dedent(inspect.getsource(self.function))
        assert source.count(self.right) == 1, f"{self.right!r} is not once in {self.function}"
        changed = compile(source.replace(self.right, self.wrong), "<mutation>", "exec")
        return next(
            code
            for code in changed.co_consts
            if isinstance(code, CodeType) and code.co_name == self.function.__name__
        )

    def apply(self, monkeypatch):
        """For whoever holds the function already, too: its code changes, not its name."""
        monkeypatch.setattr(self.function, "__code__", self.code())


def mutation(function, right, wrong):
    """Of a function, also behind a decorator, or of a property."""
    return Mutation(inspect.unwrap(getattr(function, "fget", function)), right, wrong)


class Given:
    """The fixtures that the tests take, made anew for each call."""

    def __init__(self, folder, capsys):
        self.folder, self.capsys = folder, capsys
        folder.mkdir()

    @property
    def tokens(self):
        return torch.randint(2, 97, (6, 24), generator=torch.Generator().manual_seed(3))

    @property
    def store(self):
        store = Store(self.folder / "results")
        store.put(test_results.RESULT)
        return store

    @property
    def invented(self):
        settings = load("smoke", test_compare.SETTINGS)
        store = Store(self.folder / "invented")
        return test_compare.Invented(settings, store, "cpu", from_record=True).fill()

    @property
    def text(self):
        path = self.folder / "text.txt"
        path.write_text(paragraphs(20), encoding="utf-8")
        return str(path)

    @property
    def tokenizer(self):
        assets.fetch()
        return models.load_tokenizer("embedded:tiny-random")


def equals_projectors(family, widths=(9, 40, 24)):
    return lambda given: test_slicing.test_sliced_model_equals_dense_model_with_projectors(
        TINY[family](), given.tokens, widths, None
    )


def keeps_logits(family):
    return lambda given: test_slicing.test_full_widths_leave_logits_unchanged(
        TINY[family](), given.tokens
    )


def groups_equal_projectors(family="llama", name="four and two"):
    return lambda given: test_layout.test_groups_equal_the_dense_model_with_projectors(
        TINY[family](), given.tokens, name
    )


def equals_untied(family):
    return lambda given: test_layout.test_a_tied_slice_is_the_function_of_the_untied_one(
        TIED[family](), given.tokens, test_layout.WIDTHS
    )


def plain_equals_projectors(given, family="llama"):
    test_layout.test_a_plain_slice_equals_the_dense_model_with_projectors(
        TINY[family](), given.tokens, 20
    )


# (mutation, the test that must notice), by what goes wrong
TABLE = {
    "eigenvectors smallest first": (
        mutation(spectrum, "vectors.flip(-1)", "vectors"),
        lambda _: test_slicing.test_basis_is_the_leading_eigenspace(),
    ),
    "eigenvectors of the smallest signals in a network": (
        mutation(spectrum, "vectors.flip(-1)", "vectors"),
        equals_projectors("llama"),
    ),
    "covariance of the last batch alone": (
        mutation(covariance, "if total is None", "if True"),
        lambda _: test_slicing.test_basis_is_the_leading_eigenspace(),
    ),
    "RMS over the sliced width": (
        mutation(modeling_sliced.RootMeanSquare.forward, "/ self.hidden_size", "/ x.shape[-1]"),
        equals_projectors("llama"),
    ),
    "eps of the norm forgotten": (
        mutation(modeling_sliced.RootMeanSquare.forward, "self.eps", "1e-2"),
        keeps_logits("llama"),
    ),
    "shortcut as if the basis stayed": (
        mutation(
            slicing.sliced_weights, "residual @ Q_next", "torch.eye(len(residual), len(Q_next.T))"
        ),
        equals_projectors("llama"),
    ),
    "residual connection left out": (
        mutation(
            modeling_sliced.SlicedLayerMixin.forward,
            "hidden_states @ shortcut + output",
            "output",
        ),
        keeps_logits("llama"),
    ),
    "scale of the norm not folded": (
        mutation(slicing._maps, "lambda W: W * g", "lambda W: W"),
        keeps_logits("llama"),
    ),
    "scale of the final norm not folded": (
        mutation(slicing._head, "W.float() * scale", "W.float()"),
        keeps_logits("llama"),
    ),
    "bases from the unsliced signals": (
        mutation(activations.run_block, "stream -= stream @ cut @ cut.T", "pass"),
        equals_projectors("llama"),
    ),
    "offset of Gemma's norms forgotten": (
        mutation(slicing._scale, " + family.norm_offset", ""),
        keeps_logits("gemma"),
    ),
    "stream of OPT not centred": (
        mutation(centring, "x - x.mean(dim=-1, keepdim=True)", "x"),
        keeps_logits("opt"),
    ),
    "bias of OPT's norms forgotten": (
        mutation(slicing._maps, "W.float() @ b.float()", "0 * W.float() @ b.float()"),
        keeps_logits("opt"),
    ),
    "padding before the stream": (
        mutation(modeling_sliced.fitted, "(0, more)", "(more, 0)"),
        groups_equal_projectors(),
    ),
    "the leading directions of a group cut": (
        mutation(modeling_sliced.fitted, "x[..., :width]", "x[..., -width:]"),
        groups_equal_projectors(),
    ),
    "the last directions of a basis kept": (
        mutation(Bases.at, "self._basis[:, :width], ", "self._basis[:, -width:], "),
        groups_equal_projectors(),
    ),
    "the basis of the first place for its group": (
        mutation(Bases._covariance, "if ahead:", "if False:"),
        groups_equal_projectors(),
    ),
    "the covariance of the last place of a group alone": (
        mutation(Bases._covariance, "total += found", "total = found"),
        groups_equal_projectors(),
    ),
    "places of a group weighed by their size": (
        mutation(Bases._covariance, "found.mul_(", "found; ("),
        groups_equal_projectors(),
    ),
    "looking ahead to the next place alone": (
        mutation(Bases._covariance, "len(bases) - 1)", "min(len(bases) - 1, place + 1))"),
        groups_equal_projectors(),
    ),
    "a basis of its own at a place that is whole": (
        mutation(SlicePlan.bases, "if is_cut else ORIGINAL", ""),
        lambda given: test_layout.test_shortcuts_are_at_the_borders_of_groups_alone(
            given.tokens, given.folder
        ),
    ),
    "shortcuts inside a group": (
        mutation(SlicePlan.shortcuts, "if not self.layout.shares_bases", "if True"),
        lambda given: test_layout.test_shortcuts_are_at_the_borders_of_groups_alone(
            given.tokens, given.folder
        ),
    ),
    "map of the embedding left out": (
        mutation(
            slicing._embeddings,
            "audit.rotated(torch.eye(len(Q), device=Q.device), Q, centred)",
            "torch.eye(*Q.shape)",
        ),
        equals_untied("llama"),
    ),
    "scale of the final norm replaced by ones": (
        mutation(
            slicing._final_norm,
            'f"{family.final_norm}.{name}", parameter.clone()',
            'f"{family.final_norm}.{name}", torch.ones_like(parameter)',
        ),
        equals_untied("llama"),
    ),
    "map of the embedding not counted": (
        mutation(SlicePlan.parameters, "self.maps_embedding * ", "0 * "),
        lambda given: test_layout.test_tied_groups_equal_the_dense_model_with_projectors(
            TIED["llama"](), given.tokens, "four and two"
        ),
    ),
    "scale of plain norms turned round": (
        mutation(
            slicing._plain_scale,
            "plan.shape.hidden_size / plan.place_widths[-1]",
            "plan.place_widths[-1] / plan.shape.hidden_size",
        ),
        plain_equals_projectors,
    ),
    "eps of plain norms kept": (
        mutation(architectures._narrower, "config.rms_norm_eps * d / width", "config.rms_norm_eps"),
        lambda given: test_layout.test_a_plain_slice_has_the_eps_of_its_width(given.tokens),
    ),
    "head of a plain slice without the scale of its norm": (
        mutation(
            slicing._head,
            "audit.rotated(head.weight, Q, lambda W: W * scale)",
            "audit.rotated(head.weight, Q, lambda W: W)",
        ),
        plain_equals_projectors,
    ),
    "a ridge judged on what it was fitted to": (
        mutation(
            compensation.Regression.choose,
            "((D * (test @ D + above.T @ D)).sum() - 2 * (D * unseen).sum())",
            "((D * (fit.triu() @ D + fit.triu(1).T @ D)).sum() - 2 * (D * C).sum())",
        ),
        lambda _: (
            test_compensation.test_a_linear_signal_takes_a_small_ridge_and_noise_a_large_one_or_none()
        ),
    ),
    "a ridge that is chosen without being better than none": (
        mutation(compensation.Regression.choose, "if error(best) < 0 else None", ""),
        lambda _: (
            test_compensation.test_a_linear_signal_takes_a_small_ridge_and_noise_a_large_one_or_none()
        ),
    ),
    "every window in the half that is fitted to": (
        mutation(compensation.Regression.add, "% 2", "* 0"),
        lambda _: test_compensation.test_the_ridge_is_the_one_with_the_least_held_out_error(),
    ),
    "a size of which a unit is left over": (
        mutation(schedules._widest, "range(low, most + 1)", "range(low + 1, most + 1)"),
        lambda _: test_schedules.test_a_schedule_uses_its_budget("constant", 0.3),
    ),
    "one table where the checkpoint holds two": (
        mutation(checkpoints.ties_head, "return all(", "return config.tie_word_embeddings or all("),
        lambda given: test_layout.test_a_checkpoint_that_says_tied_but_holds_another_head_is_untied(
            "llama", given.tokens, given.folder
        ),
    ),
    "massive activations decide the compensation": (
        mutation(
            compensation.Regression.add,
            "inputs.float() / size, (h.float() - x.float()) / size",
            "inputs.float(), h.float() - x.float()",
        ),
        lambda _: test_compensation.test_it_minimises_the_stated_objective(),
    ),
    "corrections that the next places do not see": (
        mutation(compensation.corrected, "stream.add_(next(seen) @ D.to(stream.dtype))", "stream"),
        lambda given: test_compensation.test_the_sliced_model_computes_what_was_fitted(
            TINY["llama"](), given.tokens
        ),
    ),
    "corrected towards the sliced stream": (
        mutation(
            compensation.compensate_block, "run_block(h, None, block)", "run_block(h, R, block)"
        ),
        lambda given: test_compensation.test_it_brings_the_stream_nearer_to_the_dense_one(
            TINY["llama"](), given.tokens
        ),
    ),
    "a schedule above its budget": (
        mutation(schedules.sensitivity, "> budget", "> 1.05 * budget"),
        lambda _: test_schedules.test_sensitivity_takes_a_hollow_curve_for_noise(),
    ),
    "shortcuts not counted": (
        mutation(SlicePlan.parameters, "total + self.shortcut_parameters", "total"),
        lambda given: test_slicing.test_stored_tensors_match_the_plans_count(
            TINY["llama"](), given.tokens
        ),
    ),
    "no cap on a slice": (
        mutation(final_slices, "slices[i] > limit", "False"),
        lambda _: test_plan.test_every_final_slice_lies_between_base_and_limit(),
    ),
    "excess of a capped layer lost": (
        mutation(final_slices, " - len(capped) * limit", " - len(capped) * slice_percentage"),
        lambda _: test_plan.test_mean_final_slice_is_the_slice_percentage(),
    ),
    "slice base ignored": (
        mutation(dynamic, "slice_percentage, slice_base, limit)", "slice_percentage, 0, limit)"),
        lambda _: test_plan.test_final_slice_follows_the_papers_formula_where_nothing_is_capped(),
    ),
    "each width rounded on its own": (
        mutation(
            rounded_widths,
            "math.floor(round(exact, 9) + 0.5) - taken",
            "round(hidden_size * (1 - share) / round_to)",
        ),
        lambda _: test_plan.test_widths_are_multiples_that_keep_the_mean(8),
    ),
    "shuffled without its seed": (
        mutation(shuffled, "default_rng(seed)", "default_rng(0)"),
        lambda _: (
            test_plan.test_shuffled_widths_depend_on_the_seed_and_the_embedding_keeps_its_own()
        ),
    ),
    "matched by the mean width": (
        mutation(
            _nearest,
            "min(map(with_units, (low, high)), key=lambda p: abs(p.parameters - plan.parameters))",
            "with_units(sum(plan.widths) // plan.round_to)",
        ),
        lambda _: test_plan.test_matched_plan_stores_as_much_within_a_thousandth(0.3, 0.0),
    ),
    "normalised without the minimum": (
        mutation(normalise, "(value - low) / (high - low)", "value / high"),
        lambda _: test_redundancy.test_normalised_scores_span_zero_to_one(),
    ),
    "LR of another layer": (
        mutation(
            redundancy.layer_redundancy,
            "register_forward_hook(hook(i)",
            "register_forward_hook(hook(i - 1)",
        ),
        lambda given: test_redundancy.test_lr_is_the_mean_cosine_of_input_and_output(
            TINY["llama"](), given.tokens
        ),
    ),
    "LR against the normed state": (
        mutation(redundancy.layer_redundancy, 'if last_layer == "normed"', "if last_layer"),
        lambda given: test_redundancy.test_lr_is_the_mean_cosine_of_input_and_output(
            TINY["llama"](), given.tokens
        ),
    ),
    "perplexity shifted by one token": (
        mutation(perplexity.head_losses, "normed[:, :-1]", "normed[:, 1:]"),
        lambda given: test_evaluation.test_perplexity_is_that_of_the_definition(
            TINY["llama"](), given.tokens
        ),
    ),
    "windows drawn without their seed": (
        mutation(sample_windows, "default_rng(seed)", "default_rng(0)"),
        lambda given: (
            test_corpora.test_sampled_windows_are_distinct_reproducible_blocks_of_the_text(
                given.text, given.tokenizer
            )
        ),
    ),
    "documents shuffled without their seed": (
        mutation(token_stream, "default_rng(seed)", "default_rng(0)"),
        lambda given: test_corpora.test_seed_shuffles_documents(given.tokenizer),
    ),
    "key without the config": (
        mutation(Request.key, '"config": self.config, ', ""),
        lambda _: test_results.test_key_depends_on_everything_asked({"seed": 2}),
    ),
    "key of the plan alone": (
        mutation(Request.key, "self.config,", 'self.config["plan"],'),
        lambda _: test_results.test_key_depends_on_everything_asked({"text": "wikipedia"}),
    ),
    "a broken result is trusted": (
        mutation(Store.get, "if result.request.key != request.key", "if False"),
        lambda given: test_results.test_broken_file_is_reported_and_set_aside(
            "answers another request", given.store, given.capsys
        ),
    ),
    "bootstrap that ignores the pairs": (
        mutation(statistics.relative_change, "a - b", "a - np.roll(b, 1)"),
        lambda given: test_compare.test_a_perplexity_change_is_paired(given.invented),
    ),
    "one draw of the calibration taken for all": (
        mutation(statistics.mean_over_draws, "drawn @ samples", "np.ones_like(drawn) @ samples"),
        lambda _: (
            test_beyond.test_draws_that_differ_widen_an_interval_and_draws_that_agree_do_not()
        ),
    ),
    "other windows for each draw": (
        mutation(
            statistics.mean_over_draws,
            "drawn @ samples * read",
            "sum(drawn[:, [i]] * row * rng.permutation(read) for i, row in enumerate(samples))",
        ),
        lambda _: (
            test_beyond.test_draws_that_differ_widen_an_interval_and_draws_that_agree_do_not()
        ),
    ),
    "selection on the reported windows": (
        mutation(Design.selection_request, '"validation"', "p.eval_split"),
        lambda given: test_compare.test_selection_windows_are_of_the_validation_split(
            given.invented
        ),
    ),
    "schedules that rest on the windows that choose": (
        mutation(equal_size.EqualSize._validation, "p.selection_windows or 0", "0"),
        lambda _: test_beyond.test_what_schedules_rest_on_is_not_what_ranks_them(),
    ),
    "noise taken for a hollow curve": (
        mutation(schedules._parabola, "fitted[0] < 0", "False"),
        lambda _: test_schedules.test_sensitivity_takes_a_hollow_curve_for_noise(),
    ),
    "SB chosen by what is reported": (
        mutation(
            statistics.chosen,
            "selection_change(study, *pair[:2])",
            'perplexity_change(study, *pair[:2], "sotu")',
        ),
        lambda given: test_compare.test_sb_is_chosen_on_validation_windows_alone(given.invented),
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_a_wrong_line_is_noticed(name, tmp_path, monkeypatch, capsys):
    wrong, test = TABLE[name]
    test(Given(tmp_path / "right", capsys))
    with monkeypatch.context() as patch:
        wrong.apply(patch)
        with pytest.raises(NOTICED):
            test(Given(tmp_path / "wrong", capsys))
    test(Given(tmp_path / "right again", capsys))
