"""Layouts of a slice against their definitions: one table, shared bases, ordinary checkpoints."""

import json
from dataclasses import replace

import pytest
import torch
import transformers
from conftest import CPU, TIED, TINY, projector_oracle
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dynslice.core.errors import RequestError
from dynslice.extensions.compensation import Compensation
from dynslice.inputs import models
from dynslice.method.architectures import check_plain, dims_of, family_of
from dynslice.method.layout import PUBLISHED, Layout, basis_groups
from dynslice.method.plan import SlicePlan, constant, of_places
from dynslice.method.slicing import slice_model

PLAIN = ("llama", "llama-biases", "mistral", "mistral-sliding", "qwen2", "qwen2-sliding", "qwen3")
PLAIN = (*PLAIN, "phi3")
WIDTHS = (40, 36, 17, 48, 31, 23)  # of places; of the layers' ones where attention and MLP are one
# Wider and narrower prefixes inside a group; then a group that is left whole, between two others.
GROUPS = {
    "four and two": ((30, 19, 41, 12, 36, 27), (4, 2)),
    "one for all": ((20, 33, 33, 12, 48, 26), (6,)),
    "one whole": ((33, 21, 48, 48, 26, 38), (2, 2, 2)),
    "whole to the end": ((21, 33, 17, 48, 48, 48), (3, 3)),
}


@pytest.fixture(params=TIED)
def tied(request):
    """A tiny random model of which embedding and head are one table."""
    return TIED[request.param]()


@torch.inference_mode()
def logits_of(model, tokens):
    return model(tokens, use_cache=False).logits


def unseen():
    return torch.randint(2, 97, (2, 24), generator=torch.Generator().manual_seed(9))


def plan_of(model, widths=WIDTHS, groups=None, **layout):
    """A plan with these widths of places; models of one block a layer take every other one."""
    shape = dims_of(model.config)
    blocks = len(shape.reads)
    if blocks == 1:
        widths = widths[::2]
        # Borders in between two places of a layer move behind the layer.
        ends = {(sum(groups[: i + 1]) + 1) // 2 for i in range(len(groups))} if groups else ()
        ends = sorted(ends)
        groups = groups and tuple(b - a for a, b in zip([0, *ends], ends, strict=False))
    layout = Layout(basis_groups=groups, **layout)
    return of_places("first", shape, widths, 1, layout)


def check_equal(got, expected, of=1e-4):
    """Logits that differ by less than a share of their spread."""
    spread = float(expected.max() - expected.min())
    torch.testing.assert_close(got, expected, atol=of * spread, rtol=0)


def stored_in(model, folder):
    """What a model saves in its one file of weights."""
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


# One table for embedding and head


@pytest.mark.parametrize("widths", [WIDTHS, (48, 36, 17, 40, 31, 23), (20,) * 6, (48,) * 6])
def test_a_tied_slice_is_the_function_of_the_untied_one(tied, tokens, widths):
    apart = plan_of(tied, widths)
    plan = replace(apart, layout=Layout(tied=True))
    one, two = (slice_model(tied, tokens, made).model for made in (plan, apart))
    check_equal(logits_of(one, unseen()), logits_of(two, unseen()))
    assert plan.untied == apart
    # A map is there where the first place is cut, and nowhere else.
    maps = [name for name in one.state_dict() if name.endswith(".map")]
    assert len(maps) == plan.maps_embedding == (plan.place_widths[0] < 48)


def test_a_tied_slice_stores_one_table_that_is_the_dense_one(tied, tokens, tmp_path):
    plan = plan_of(tied, tied=True)
    sliced = slice_model(tied, tokens, plan).model
    stored = stored_in(sliced, tmp_path)
    family = family_of(tied.config)
    assert f"{family.head}.weight" not in stored
    tables = [name for name, weight in stored.items() if weight.ndim == 2 and len(weight) == 97]
    assert tables == [f"{family.embedding}.weight"]
    table = tied.get_parameter(f"{family.embedding}.weight")
    assert torch.equal(stored[f"{family.embedding}.weight"], table)
    assert sum(weight.numel() for weight in stored.values()) == plan.parameters
    assert plan.parameters < plan.untied.parameters


@pytest.mark.parametrize("groups", [None, (4, 2)])
def test_a_tied_slice_is_saved_and_loaded_and_generates(tied, tokens, groups, tmp_path):
    sliced = slice_model(tied, tokens, plan_of(tied, groups=groups, tied=True)).model
    sliced.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(sliced)
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    assert torch.equal(logits_of(loaded, tokens), logits_of(sliced, tokens))
    asked = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    cached, again = (loaded.generate(tokens, **asked, use_cache=use) for use in (True, False))
    assert cached.shape == (6, 32)
    assert torch.equal(cached, again)


def test_a_tied_plan_of_an_untied_model_is_refused(tokens):
    model = TINY["mistral"]()
    with pytest.raises(RequestError, match=r"has a head apart from its embedding.*--untie"):
        plan_of(model, tied=True)
    # Nor does a plan for the tied form of the same shape fit it.
    plan = plan_of(TIED["mistral"](), tied=True)
    with pytest.raises(RequestError, match=r"another model"):
        slice_model(model, tokens, plan)


# A checkpoint whose config is wrong about its tables


def saved(model, folder, change=None, **settings):
    """A model directory with changed weights, and a config that says something else."""
    model.save_pretrained(folder)
    models.load_tokenizer("embedded:tiny-random").save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    if change:
        change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def check_slices(folder, wanted, tokens, tmp_path):
    """What is loaded gives the logits of `wanted`, and so do whole and streamed slices."""
    config = models.load_config(folder)
    model, _ = models.load(folder, CPU, torch.float32)
    tables = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert config.tie_word_embeddings == model.config.tie_word_embeddings
    assert config.tie_word_embeddings == (tables[0] is tables[1])
    shape = dims_of(config)
    assert shape == dims_of(model.config)
    assert shape.dense_parameters == sum(p.numel() for p in model.parameters())
    assert torch.equal(logits_of(model, unseen()), logits_of(wanted, unseen()))
    plan = constant(shape, 0.0, 4, layout=Layout(tied=shape.tied))
    check_equal(
        logits_of(slice_model(model, tokens, plan).model, unseen()), logits_of(wanted, unseen())
    )
    plan = plan_of(model, (40, 36, 17, 44, 31, 23), tied=shape.tied)
    whole = slice_model(model, tokens, plan).model
    models.slice_saved(tmp_path / "out", folder, tokens, plan, CPU, torch.float32)
    streamed, _ = models.load(str(tmp_path / "out"), CPU, torch.float32)
    # Products of memory that a file is mapped to round differently.
    check_equal(logits_of(streamed, unseen()), logits_of(whole, unseen()), 1e-5)
    return shape


@pytest.mark.parametrize("name", ["llama", "qwen2", "opt"])
def test_a_checkpoint_that_says_tied_but_holds_another_head_is_untied(name, tokens, tmp_path):
    model = TIED[name]()
    head = torch.randn(97, 48, generator=torch.Generator().manual_seed(2)) * 0.2

    def with_head(weights):
        weights["lm_head.weight"] = head

    folder = saved(model, tmp_path / "dense", with_head)
    model.config.tie_word_embeddings = False
    model.lm_head = torch.nn.Linear(48, 97, bias=False)
    model.lm_head.weight.data = head
    assert not check_slices(folder, model, tokens, tmp_path).tied


@pytest.mark.parametrize("name", ["llama", "opt", "phi"])
def test_a_checkpoint_that_says_untied_but_holds_one_table_twice_is_tied(name, tokens, tmp_path):
    model = TIED[name]()
    table = model.get_output_embeddings().weight.detach().clone()

    def with_head(weights):
        weights["lm_head.weight"] = table

    folder = saved(model, tmp_path / "dense", with_head, tie_word_embeddings=False)
    assert check_slices(folder, model, tokens, tmp_path).tied


def test_a_checkpoint_without_a_head_that_says_untied_is_refused(tokens, tmp_path):
    folder = saved(TIED["llama"](), tmp_path / "dense", tie_word_embeddings=False)
    plan = plan_of(TINY["llama-biases"]())
    with pytest.raises(RequestError, match=r"lacks 1 weights \(first lm_head.weight\)"):
        models.load(folder, CPU, torch.float32)
    with pytest.raises(RequestError, match=r"holds no weight 'lm_head.weight'"):
        models.slice_saved(tmp_path / "out", folder, tokens, plan, CPU, torch.float32)


# A basis for several places


@pytest.mark.parametrize("name", GROUPS)
def test_groups_equal_the_dense_model_with_projectors(tiny, tokens, name):
    plan = plan_of(tiny, *GROUPS[name])
    sliced = slice_model(tiny, tokens, plan).model
    expected = projector_oracle(tiny, tokens, unseen(), plan.place_widths, plan.bases)
    check_equal(logits_of(sliced, unseen()), expected, 5e-4)
    # The check can fail: with a basis for each place the logits are nowhere near.
    if plan.bases == replace(plan, layout=PUBLISHED).bases:
        return
    apart = projector_oracle(tiny, tokens, unseen(), plan.place_widths)
    assert (apart - expected).abs().max() > 0.02 * (expected.max() - expected.min())


@pytest.mark.parametrize("name", GROUPS)
def test_tied_groups_equal_the_dense_model_with_projectors(tied, tokens, name):
    plan = plan_of(tied, *GROUPS[name], tied=True)
    sliced = slice_model(tied, tokens, plan).model
    assert sum(p.numel() for p in sliced.parameters()) == plan.parameters
    expected = projector_oracle(tied, tokens, unseen(), plan.place_widths, plan.bases)
    check_equal(logits_of(sliced, unseen()), expected, 5e-4)


def test_shortcuts_are_at_the_borders_of_groups_alone(tokens, tmp_path):
    model = TINY["llama"]()
    expected = {
        "four and two": {"1.mlp": (12, 36), "2.mlp": (27, 48)},
        "one for all": {"2.mlp": (26, 48)},
        # The stream of a whole group has the original coordinates, as has that before the head.
        "one whole": {"0.mlp": (21, 48), "1.mlp": (48, 26), "2.mlp": (38, 48)},
        "whole to the end": {"1.attention": (17, 48)},
    }
    for name, wanted in expected.items():
        plan = plan_of(model, *GROUPS[name])
        stored = stored_in(slice_model(model, tokens, plan).model, tmp_path / name)
        shortcuts = {
            weight_name: tuple(weight.shape)
            for weight_name, weight in stored.items()
            if weight_name.endswith("_shortcut")
        }
        assert shortcuts == {f"model.layers.{n}_shortcut": shape for n, shape in wanted.items()}
        assert plan.shortcut_parameters == sum(a * b for a, b in wanted.values())
        assert sum(weight.numel() for weight in stored.values()) == plan.parameters


def test_groups_of_one_place_give_the_weights_of_slicegpt(tiny, tokens):
    apart = plan_of(tiny, (40, 36, 17, 44, 31, 23))
    places = len(apart.place_widths) - 1
    grouped = replace(apart, layout=Layout(basis_groups=(1,) * places))
    one, two = (slice_model(tiny, tokens, plan).model for plan in (grouped, apart))
    weights = two.state_dict()
    assert one.state_dict().keys() == weights.keys()
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, weights[name]), name
    assert grouped.parameters == apart.parameters


def test_grouped_slices_store_what_the_plan_says(tiny, tokens):
    for name in GROUPS:
        plan = plan_of(tiny, *GROUPS[name])
        sliced = slice_model(tiny, tokens, plan).model
        assert sum(p.numel() for p in sliced.parameters()) == plan.parameters


def test_grouped_slices_are_saved_and_loaded_and_generate(tiny, tokens, tmp_path):
    sliced = slice_model(tiny, tokens, plan_of(tiny, *GROUPS["one whole"])).model
    sliced.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits_of(loaded, tokens), logits_of(sliced, tokens))
    asked = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    cached, again = (loaded.generate(tokens, **asked, use_cache=use) for use in (True, False))
    assert torch.equal(cached, again)


def test_a_compensation_of_groups_corrects_writing_maps_and_shortcuts_at_borders(tokens):
    model = TINY["llama"]()
    plan = plan_of(model, *GROUPS["one for all"])
    plain, ours = (
        slice_model(model, tokens, plan, start).model.state_dict()
        for start in (None, Compensation(0.1))
    )
    changed = {name for name, weight in plain.items() if not torch.equal(ours[name], weight)}
    writes = ("self_attn.o_proj", "mlp.down_proj")
    writes = {f"model.layers.{i}.{name}.weight" for i in range(3) for name in writes}
    # Later reading maps stay too: the basis was found before anything was corrected.
    assert changed == writes | {"model.layers.2.mlp_shortcut"}


def test_a_plan_with_groups_survives_json(tied):
    plan = plan_of(tied, *GROUPS["four and two"], tied=True)
    values = json.loads(json.dumps(plan.to_dict()))
    assert SlicePlan.from_dict(values) == plan
    assert values["parameters_untied"] == plan.untied.parameters
    if plan.shape.heads:
        plain = constant(plan.shape, 0.25, 4, layout=Layout(plain=True))
        assert SlicePlan.from_dict(json.loads(json.dumps(plain.to_dict()))) == plain


LLAMA = dims_of(TINY["llama"]().config)
APART = dims_of(TINY["mistral"]().config)
BAD_LAYOUTS = {
    "too few places": (
        lambda: of_places("first", LLAMA, [32] * 6, 1, Layout(basis_groups=(2, 2))),
        "count 4 places, the model has 6; make the plan from the same model",
    ),
    "too many places": (
        lambda: of_places("first", LLAMA, [32] * 6, 1, Layout(basis_groups=(8,))),
        "count 8 places, the model has 6",
    ),
    "plain of several widths": (
        lambda: of_places("first", LLAMA, WIDTHS, 1, Layout(plain=True)),
        "a plain checkpoint has one hidden size; slice all layers equally",
    ),
    "plain and tied": (lambda: Layout(plain=True, tied=True), "a plain checkpoint has one basis"),
    "plain and grouped": (
        lambda: Layout(plain=True, basis_groups=(6,)),
        "a plain checkpoint has one basis",
    ),
    "tied where it is apart": (
        lambda: of_places("first", APART, [32] * 6, 1, Layout(tied=True)),
        "has a head apart from its embedding",
    ),
}


@pytest.mark.parametrize("name", BAD_LAYOUTS)
def test_a_layout_that_is_none_is_refused(name):
    make, message = BAD_LAYOUTS[name]
    with pytest.raises(RequestError, match=message) as refusal:
        make()
    assert "\n" not in str(refusal.value)


BROKEN = [
    ({"basis_groups": [2, 2]}, "count 4 places, the model has 6"),
    ({"basis_groups": [7, -1]}, r"has layout.basis_groups.1 -1, which fits no plan"),
    ({"basis_groups": [0, 6]}, r"has layout.basis_groups.0 0, which fits no plan"),
    ({"basis_groups": "all"}, r"has layout.basis_groups 'all', which fits no plan"),
    ({"plain": True}, "a plain checkpoint has one"),
    ({"tied": "yes"}, r"has layout.tied 'yes', which fits no plan"),
]


@pytest.mark.parametrize(("change", "message"), BROKEN)
def test_a_plan_file_with_a_broken_layout_is_refused(change, message):
    values = of_places("first", LLAMA, WIDTHS, 1, Layout(basis_groups=(4, 2))).to_dict()
    values["layout"] |= change
    with pytest.raises(RequestError, match=message):
        SlicePlan.from_dict(values)


def test_a_plan_file_that_unties_its_layout_was_altered():
    values = of_places("first", LLAMA, WIDTHS, 1, Layout(tied=True)).to_dict()
    values["layout"]["tied"] = False
    with pytest.raises(RequestError, match=r"the plan says parameters \d+, its layers give"):
        SlicePlan.from_dict(values)


def test_groups_end_where_the_stream_turns_right_round():
    assert basis_groups(2, 7, 3) == (2, 6, 6)
    assert basis_groups(2, 8, 3) == (2, 6, 6, 2)
    assert basis_groups(1, 5, "all") == (1, 4)
    assert basis_groups(2, 1, "all") == (2,)
    # By LR: after layer 0 and layer 3, whatever the length that was asked for.
    lr = [0.01, 0.9, 0.95, 0.3, 0.9, 0.9, 0.9]
    assert basis_groups(2, 7, "all", lr) == (2, 6, 6)
    assert basis_groups(2, 7, 2, lr) == (2, 4, 2, 4, 2)
    assert basis_groups(2, 3, "all", [0.9, 0.9, 0.9]) == (6,)


# An ordinary checkpoint


def plain_plan(model, width=36):
    shape = dims_of(model.config)
    return constant(shape, 1 - width / 48, shape.heads, layout=Layout(plain=True))


@pytest.fixture(params=PLAIN)
def family_with_plain(request):
    return TINY[request.param]()


@pytest.mark.parametrize("width", [36, 20])
def test_a_plain_slice_equals_the_dense_model_with_projectors(family_with_plain, tokens, width):
    model = family_with_plain
    plan = plain_plan(model, width)
    assert set(plan.place_widths) == {width}
    sliced = slice_model(model, tokens, plan).model
    assert type(sliced) is type(model)
    assert sum(p.numel() for p in sliced.parameters()) == plan.parameters
    expected = projector_oracle(model, tokens, unseen(), plan.place_widths, plan.bases)
    check_equal(logits_of(sliced, unseen()), expected, 5e-4)
    assert (logits_of(model, unseen()) - expected).abs().max() > 0.05 * expected.abs().max()


def test_a_plain_slice_has_the_eps_of_its_width(tokens):
    """Seen where eps is not small next to the stream."""
    model = TINY["llama"](rms_norm_eps=0.3)
    plan = plain_plan(model, 20)
    sliced = slice_model(model, tokens, plan).model
    expected = projector_oracle(model, tokens, unseen(), plan.place_widths, plan.bases)
    check_equal(logits_of(sliced, unseen()), expected, 5e-4)


@pytest.mark.parametrize("start", [None, Compensation(0.1)], ids=["uncorrected", "compensated"])
def test_a_plain_slice_is_saved_as_what_the_library_has(family_with_plain, tokens, start, tmp_path):
    model = family_with_plain
    sliced = slice_model(model, tokens, plain_plan(model), start).model
    stored = stored_in(sliced, tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".json"}
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["model_type"], config["hidden_size"]) == (model.config.model_type, 36)
    assert "auto_map" not in config
    assert (config["tie_word_embeddings"], "lm_head.weight" in stored) == (False, True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=False).eval()
    assert type(loaded) is type(model)
    assert type(loaded).__module__.startswith("transformers.models.")
    assert torch.equal(logits_of(loaded, tokens), logits_of(sliced, tokens))
    asked = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    cached, again = (loaded.generate(tokens, **asked, use_cache=use) for use in (True, False))
    assert torch.equal(cached, again)


def test_a_plain_slice_of_full_width_is_the_dense_model(family_with_plain, tokens):
    sliced = slice_model(family_with_plain, tokens, plain_plan(family_with_plain, 48)).model
    check_equal(logits_of(sliced, unseen()), logits_of(family_with_plain, unseen()))


def test_a_plain_compensation_brings_the_logits_nearer(family_with_plain, tokens):
    model = family_with_plain
    wanted = logits_of(model, tokens)

    def error(start):
        sliced = slice_model(model, tokens, plain_plan(model, 20), start).model
        return (logits_of(sliced, tokens) - wanted).norm()

    assert error(Compensation(0.1)) < 0.9 * error(None)


def test_a_plain_slice_can_be_loaded_by_this_package_and_refuses_nothing(tokens, tmp_path):
    """To it, it is a dense model: it can be measured, and even sliced again."""
    model = TINY["llama"]()
    sliced = slice_model(model, tokens, plain_plan(model)).model
    sliced.save_pretrained(tmp_path)
    models.load_tokenizer("embedded:tiny-random").save_pretrained(tmp_path)
    loaded, _ = models.load(str(tmp_path), CPU, torch.float32)
    again = slice_model(loaded, tokens, constant(dims_of(loaded.config), 0.0, 4)).model
    check_equal(logits_of(again, unseen()), logits_of(sliced, unseen()))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("opt", r"its norms \(LayerNorm\) take away a mean over the full width"),
        ("phi", r"its norms \(LayerNorm\) take away a mean over the full width"),
        ("gemma", "its embedding is scaled by the hidden size"),
    ],
)
def test_a_family_without_plain_slices_is_refused_with_the_reason(name, reason):
    with pytest.raises(RequestError, match=f"has no plain slice: {reason}; leave --plain out"):
        check_plain(TINY[name]().config)


def test_widths_of_a_plain_slice_are_multiples_of_the_heads():
    config = TINY["llama"]().config
    assert dims_of(config).heads == 4
    for thousandths in range(0, 900, 7):
        plan = constant(LLAMA, thousandths / 1000, 4, layout=Layout(plain=True))
        [width] = {*plan.place_widths}
        assert width % 4 == 0
        assert abs(width - 48 * (1 - thousandths / 1000)) <= 2 + 1e-9
        transformers.LlamaConfig(**{**config.to_dict(), "hidden_size": width})
