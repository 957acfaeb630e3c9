"""A study computes what is missing, once, and its verdicts follow from its results."""

import json
import subprocess
import sys

import pytest

from dynslice.core import assets, paths
from dynslice.core.errors import RequestError, RunError
from dynslice.experiment import runner, validate
from dynslice.experiment.profile import load, parse_overrides
from dynslice.experiment.study import Study
from dynslice.inputs import models
from dynslice.inputs.windows import token_stream
from dynslice.method import slicing
from dynslice.report import claims, comparison, perplexity, style, tasks

SMALL = {
    "tasks": {},
    "task_slice_percentages": [],
    "lr_max_tokens": 512,
    "ablation_slice_percentage": None,
    "ablation_lr_tokens": [],
    "single_layer_slice": None,
    "beyond_slice_percentages": [],
    "instead_slice_percentages": [],
}


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The smoke study without tasks and ablations, in a store of its own."""
    assets.fetch()
    monkeypatch.setattr(paths, "OUTPUT", tmp_path)
    return Study.open("smoke", device="cpu", **SMALL)


def test_only_what_is_missing_is_measured(small, capfd):
    requests = small.requests()
    assert small.ensure(requests) == len(requests)
    assert small.ensure(requests) == 0
    victim = next(r for r in requests if r.kind == "ppl")
    before = small.get(victim).value
    path = small.store.folder / f"{victim.key}.json"
    path.write_text(path.read_text()[:50])
    assert small.ensure(requests) == 1
    assert small.get(victim).value == before
    assert f"{path.name} is broken" in capfd.readouterr().err
    assert path.with_suffix(".broken").is_file()


def test_the_model_is_loaded_once_and_each_slice_made_once(small, monkeypatch):
    loads, slices = [], []
    load, slice_model = models.load, slicing.slice_model
    monkeypatch.setattr(models, "load", lambda *a: loads.append(a) or load(*a))
    monkeypatch.setattr(slicing, "slice_model", lambda *a: slices.append(a) or slice_model(*a))
    small.ensure(small.requests())
    assert len(loads) == 1
    assert len(slices) == len([p for p in small.points() if p.network])


def test_each_text_is_tokenised_once(small, monkeypatch):
    asked, tokens = [], token_stream
    monkeypatch.setattr(
        runner, "token_stream", lambda *a, **k: asked.append(a[:2]) or tokens(*a, **k)
    )
    small.ensure(small.requests())
    assert len(asked) == len(set(asked)) >= 3  # LR, calibration, evaluation


def test_every_point_has_its_constants_of_equal_slice_and_of_equal_size(small):
    schedules = [(p.schedule, p.slice_percentage, p.slice_base) for p in small.points()]
    assert schedules == [
        ("dense", 0.0, 0.0),
        ("constant", 0.25, 0.25),
        ("dynamic", 0.25, 0.0),
        ("matched", 0.25, 0.0),
        ("dynamic", 0.25, 0.1),
        ("matched", 0.25, 0.1),
    ]
    small.ensure(small.design.perplexity_requests())
    sizes = {p.label: small.get(small.slice_request(p)).value for p in small.points()}
    dynamic = sizes["dynamic, SP 25%, SB 0%"]["parameters"]
    matched = sizes["constant, size of dynamic SP 25%, SB 0%"]["parameters"]
    assert matched == pytest.approx(dynamic, rel=0.01)  # the tiny model has coarse widths


def test_the_key_of_a_result_is_what_was_asked(small):
    keys = {r.key for r in small.requests()}
    again = {r.key for r in Study.open("smoke", device="cpu").requests()}
    other = {r.key for r in Study.open("smoke", seed=7).design.perplexity_requests()}
    sliced = [r for r in small.design.perplexity_requests() if r.config["slice"]]
    assert keys != again  # other LR tokens
    assert not {r.key for r in sliced} & other


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"slice_percentage": [0.3]}, "nearest valid name is 'slice_percentages'"),
        ({"slice_percentages": ["a lot"]}, "slice_percentages.0 = 'a lot'"),
        ({"slice_percentages": [1.5]}, "1.5 is outside"),
        ({"seed": "three"}, "seed = 'three'"),
        ({"tasks": {"hellaswagg": 3}}, "'smoke': task 'hellaswagg' is unknown"),
        ({"revisions": {"wikitex2": "abc"}}, "revisions of 'wikitex2'.* mean 'wikitext2'"),
        ({"stand_ins": {"sotuu": "mmlu"}}, "stand_ins of 'sotuu'.* mean 'sotu'"),
        ({"models": ["a/x", "b/x"]}, "would share a folder"),
        ({"placement": "streamed"}, "speed_slice_percentages asks for two"),
        ({"host_memory_gib": 2.0}, "are budgets of placement streamed"),
        ({"lr_last_layer": "middle"}, "lr_last_layer = 'middle'"),
    ],
)
def test_bad_parameters_are_refused(overrides, message):
    with pytest.raises(RequestError, match=message):
        Study.open("smoke", **overrides)


def test_a_profile_can_be_given_another_name():
    study = Study.open("smoke", name="mine", device="cpu")
    assert study.name == study.store.folder.name == "mine"


def test_a_notebooks_variables_become_parameters():
    variables = {"profile": "smoke", "seed": 3, "model": None, "In": [], "_i1": "", "exit": exit}
    made = Study.from_notebook({**variables, "slice_bases": "[0.05]"})
    assert (made.profile.seed, made.profile.slice_bases) == (3, [0.05])
    assert made.profile.model == "embedded:tiny-random"
    with pytest.raises(RequestError, match="nearest valid name is 'seed'"):
        Study.from_notebook({**variables, "sed": 3})


# What papermill and people give, and what is meant: see `papermill.cli`, which makes True, None and
# numbers of texts that look so, and leaves true, null and lists as they are.
MEANT = {
    "from_record true": ({"from_record": "true"}, {"from_record": True}),
    "from_record false": ({"from_record": "false"}, {"from_record": False}),
    "from_record no": ({"from_record": "no"}, {"from_record": False}),
    "from_record null": ({"from_record": "null"}, {"from_record": False}),
    "device": ({"device": "cuda:1"}, {"device": "cuda:1"}),
    "device null": ({"device": "null"}, {"device": "auto"}),
    "device None": ({"device": None}, {"device": "auto"}),
    "profile None": ({"profile": None}, {"name": "quick"}),
    "name of digits": ({"name": 123}, {"name": "123"}),
    "model of digits": ({"model": 7}, {"model": "7"}),
    "model like a list": ({"model": "[7]"}, {"model": "[7]"}),
    "revision null": ({"revision": "null"}, {"revision": None}),
    "float": ({"figure_slice_base": 1e-3}, {"figure_slice_base": 1e-3}),
    "list": ({"slice_bases": "[0.1]"}, {"slice_bases": [0.1]}),
    "truth": ({"beyond_tasks": "false"}, {"beyond_tasks": False}),
    "number or null": ({"eval_windows": "null"}, {"eval_windows": None}),
}


@pytest.mark.parametrize("case", MEANT)
def test_a_parameter_is_read_by_its_type(case):
    given, wanted = MEANT[case]
    study = Study.from_notebook({"profile": "smoke", **given})
    found = {**vars(study.profile), "from_record": study.from_record, "device": study.device}
    assert {name: found[name] for name in wanted} == wanted


REFUSED = {
    "from_record 1": ({"from_record": 1}, "from_record 1 is neither true nor false"),
    "from_record maybe": ({"from_record": "maybe"}, "'maybe' is neither true nor false"),
    "device 0": ({"device": 0}, "device '0' is unknown; use auto, cpu, cuda or cuda:N"),
    "device true": ({"device": True}, "device True is unknown"),
    "profile true": ({"profile": True}, "profile 'True' is unknown"),
    "name 1.5": ({"name": 1.5}, "name = 1.5: Input should be a valid string"),
    "tuple": ({"slice_bases": (0.05,)}, "slice_bases = .0.05,.: Input should be a valid list"),
    "bad date": ({"seed": "2024-13-45"}, "'2024-13-45' of seed is not YAML"),
    "empty": ({"model": ""}, "model '' has an empty name: give one"),
    "empty within": ({"stand_ins": '{sotu: ""}'}, "stand_ins {'sotu': ''} has an empty name"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_parameter_of_another_type_is_refused(case):
    given, sentence = REFUSED[case]
    with pytest.raises(RequestError, match=sentence):
        Study.from_notebook({"profile": "smoke", **given})


@pytest.mark.parametrize("text", ["7", "1e10", "0123", "yes", "2024-13-45", "a: b", "@main", "*"])
def test_text_of_a_profile_is_text_whatever_it_looks_like(text):
    assert parse_overrides([f"revision={text}", f"model={text}"]) == {
        "revision": text,
        "model": text,
    }
    assert parse_overrides(["revision=null", 'model="a b"']) == {"revision": None, "model": "a b"}


def test_profiles_are_files_by_their_usual_endings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (paths.PROFILES / "smoke.yaml").read_text()
    for name in ("mine.YAML", "mine.yml", "smoke.yml"):
        (tmp_path / name).write_text(text)
    assert {load("mine.YAML").name, load("mine.yml").name} == {"mine"}
    with pytest.raises(RequestError, match=r"'smoke\.yml' has the name of a built-in profile"):
        load("smoke.yml")


def test_code_that_has_the_name_of_a_key_is_no_parameter():
    assert (
        Study.from_notebook({"profile": "smoke", "models": paths, "seed": len}).profile.seed == 42
    )


def test_a_record_that_lacks_results_is_said_so(small):
    incomplete = Study(small.profile, small.store, "cpu", from_record=True)
    with pytest.raises(RunError, match="lacks"):
        incomplete.ensure(incomplete.requests())


def test_result_files_are_json_with_provenance(small):
    small.ensure(small.lr_requests())
    stored = json.loads(next(small.store.folder.glob("lr-*.json")).read_text())
    assert {"kind", "config", "value", "seconds", "peak_memory_bytes", "provenance"} <= set(stored)
    assert {"commit", "dirty", "packages", "device", "threads", "date"} <= set(stored["provenance"])


def test_a_share_that_cannot_be_cut_is_refused_before_measuring(small):
    validate.check_study(small)
    greedy = Study.open("smoke", slice_percentages=[0.99])
    with pytest.raises(RequestError, match=r"0\.99 is outside"):
        validate.check_study(greedy)


def test_a_study_without_pairs_still_reports(small):
    alone = Study.open("smoke", device="cpu", **{**SMALL, "slice_bases": []})
    table = perplexity.perplexity_comparison(alone)
    assert table.empty
    prose = comparison.prose(table, "perplexity (%)", "perplexity")
    assert prose == style.NONE
    comparison.figure(table, "perplexity (%)")
    assert tasks.task_table(alone).empty
    assert set(claims.claims_table(alone)["verdict on this model"]) == {"not tested here"}


def test_a_changed_text_file_is_another_request(tmp_path):
    text = tmp_path / "text.txt"
    keys = []
    for words in ("once", "twice"):
        text.write_text(words)
        made = Study.open("smoke", calibration_text=str(text))
        keys.append(made.slice_request(made.points()[1]).key)
    assert keys[0] != keys[1]


def test_a_file_is_not_calibrated_on_and_evaluated_on(tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("some words")
    monkeypatch.chdir(tmp_path)
    both = Study.open("smoke", calibration_text=str(text), eval_texts=["./text.txt"])
    with pytest.raises(RequestError, match=r"'\./text\.txt' .* is calibrated on"):
        validate.check_study(both)


def test_a_text_too_short_for_its_windows_is_refused_before_measuring():
    assets.fetch()
    greedy = Study.open("smoke", ablation_calibration_windows=[10**6])
    with pytest.raises(RequestError, match="fewer than 1000000 windows of 128"):
        validate.check_study(greedy)


@pytest.mark.parametrize("name", ["smoke", "quick", "standard", "full"])
def test_built_in_profiles_can_run(name):
    assets.fetch()
    validate.check_study(Study.open(name))


def test_a_report_of_stored_results_needs_no_torch():
    """It takes seconds to load, in the kernel of each notebook."""
    code = (
        "import sys\n"
        "from dynslice.report import ablations, efficiency, pages, perplexity, published\n"
        "from dynslice.experiment.study import Study\n"
        "study = Study.open('quick', from_record=True)\n"
        "assert not study.missing(study.requests())\n"
        "assert len(pages.claims_block(study)) > 100\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


# Names of what is changed


def test_a_changed_profile_has_pages_of_its_own_and_the_results_of_the_one_it_changes():
    """So that no change is ever written into the committed pages, and nothing is measured twice."""
    plain, changed = load("quick"), load("quick", {"lr_max_tokens": 2048, "seed": 1})
    assert (plain.name, plain.stored_as) == ("quick", "quick")
    assert changed.name == changed.folder == "quick+lr_max_tokens=2048+seed=1"
    assert changed.stored_as == "quick"
    assert Study.open("quick", seed=1).store.folder == Study.open("quick").store.folder
    command = "./run_all.sh --profile quick --set lr_max_tokens=2048 --set seed=1"
    assert changed.command == command
    several = load("quick", {"slice_bases": [0.0, 0.2]}).command
    assert several == "./run_all.sh --profile quick --set 'slice_bases=[0.0, 0.2]'"
    of_one = load("rehearsal", {"model": load("rehearsal").models[1], "seed": 1})
    assert of_one.name == f"rehearsal+seed=1/{of_one.stored_as.partition('/')[2]}"


@pytest.mark.parametrize("key", ["seed", "round_to", "slice_bases", "untie", "next_to"])
def test_what_a_profile_says_anyway_is_no_change(key):
    assert load("quick", {key: getattr(load("quick"), key)}).name == "quick"


def test_names_of_changes_are_short_and_differ():
    changes = [{"lr_text": text} for text in ("a b", "a-b", "a/b", "/x" * 100, "/x" * 99 + "/y")]
    changes += [{"slice_percentages": [0.25]}, {"slice_percentages": [0.25, 0.3]}, {"tasks": {}}]
    names = [load("quick", change).name for change in changes]
    assert len(set(names)) == len(names)
    assert max(map(len, names)) < 100
    assert "quick+slice_percentages=0.25,0.3" in names


def test_a_changed_profile_may_have_any_name_but_that_of_a_built_in_one():
    assert load("quick", {"seed": 1, "name": "mine"}).stored_as == "mine"
    for name in ("quick", "standard"):
        with pytest.raises(RequestError, match="is that of a profile without these changes"):
            load("quick", {"seed": 1, "name": name})


def test_a_file_cannot_take_the_name_of_a_built_in_profile(tmp_path):
    text = (paths.PROFILES / "quick.yaml").read_text()
    (tmp_path / "own.yaml").write_text(f"name: quick\n{text}")
    with pytest.raises(RequestError, match="name 'quick' is that of a profile without these"):
        load(str(tmp_path / "own.yaml"))
    (tmp_path / "own.yaml").write_text(text)
    own = str(tmp_path / "own.yaml")
    assert load(own, {"seed": 1}).command == f"./run_all.sh --profile {own} --set seed=1"
    named = load("quick", {"seed": 1, "name": "mine"}).command
    assert named == "./run_all.sh --profile quick --set name=mine --set seed=1"


def test_a_model_that_a_profile_does_not_name_is_a_change():
    assert load("paper", {"model": load("paper").models[1]}).folder == "paper"
    assert (
        load("paper", {"model": "somebody/else"}).folder
        == "paper+model=somebody-else-" + (load("paper", {"model": "somebody/else"}).folder[-6:])
    )
