"""Nothing that is calibrated on, or that chooses, is reported."""

from functools import cache

import numpy as np
import pytest
import torch

from dynslice.core import assets
from dynslice.core.errors import RequestError
from dynslice.evaluate import harness
from dynslice.experiment.study import Study
from dynslice.experiment.validate import check_study
from dynslice.inputs import corpora, models, texts
from dynslice.inputs.data_files import SPLITS
from dynslice.inputs.windows import sample_windows, token_stream

RUN = 64  # tokens; a shared document, or window, shares runs of that length


@pytest.fixture(scope="module", autouse=True)
def fetched():
    assets.fetch()


@cache
def stream_of(text, split):
    return token_stream(text, split, models.load_tokenizer("embedded:smollm2-135m"))


def windows_by_role(study):
    """Every token window that the study reads, by what it is read for: {role: [windows]}."""
    roles = {"calibration": [], "selection": [], "evidence": [], "report": [], "LR": []}
    for request in study.requests():
        config = request.config
        if request.kind in ("ppl", "centred") and config["split"] != "train":
            role = "selection" if config["split"] == "validation" else "report"
            roles[role].append(config)
        if request.kind == "lr":
            tokens = {"windows": 1, "window": config["max_tokens"], "seed": None}
            roles["LR"].append({**config, **tokens})
        if config.get("slice"):
            roles["calibration"].append(config["slice"]["calibration"])
            if recovery := config["slice"].get("recovery"):
                roles["calibration"].append({**config["slice"]["calibration"], **recovery})
        if request.kind == "sensitivity":
            roles["selection"].append(config)
            roles["calibration"].append(config["calibration"])
    names = ("text", "split", "window", "windows", "seed")
    asked = {
        role: {tuple(c.get(n, 0) for n in names) for c in configs}
        for role, configs in roles.items()
    }
    return {
        role: [
            sample_windows(stream_of(text, split), *amounts, text)
            for text, split, *amounts in sorted(configs, key=str)
        ]
        for role, configs in asked.items()
    }


def runs(windows):
    """Every run of RUN tokens in token windows [n, T], each as a hash of 64 bits."""
    weights = np.random.default_rng(0).integers(1, 2**63, RUN, dtype=np.uint64)
    every = np.lib.stride_tricks.sliding_window_view(windows.numpy().view(np.uint64), RUN, axis=1)
    return np.unique(every @ weights)  # modulo 2**64


def leaks(roles):
    """Runs that are reported and were also read for something else, and calibration's others.

    LR and the choice of SB may share validation text: neither is reported.
    """
    known = {
        role: np.unique(np.concatenate([runs(w) for w in windows])) if windows else np.array([])
        for role, windows in roles.items()
    }
    pairs = [("report", "calibration"), ("report", "selection"), ("report", "LR")]
    pairs += [("calibration", "selection"), ("calibration", "LR")]
    shared = {(a, b): np.intersect1d(known[a], known[b], assume_unique=True) for a, b in pairs}
    return {pair: both for pair, both in shared.items() if len(both)}


@cache
def windows_of(profile, *candidates):
    """The windows of a profile by role; candidates: schedules that it tries, else its own."""
    changes = {"beyond_candidates": [*candidates]} if candidates else {}
    return windows_by_role(Study.open(profile, **changes))


@pytest.mark.parametrize(
    "asked", [("quick",), ("standard",), ("standard", "first", "entropic")], ids=" ".join
)
def test_calibration_selection_and_report_share_no_text(asked):
    roles = windows_of(*asked)
    assert roles["calibration"]
    assert roles["report"]
    assert roles["LR"]
    assert not leaks(roles)


def test_one_shared_window_is_found():
    """The test above fails if one window is shared, or a part of one."""
    roles = {role: list(windows) for role, windows in windows_of("standard").items()}
    clean = roles["report"][0]
    for role in ("calibration", "selection", "LR"):
        leak = roles[role][0][:1, :512]
        shifted = torch.cat([clean[:1, :100], leak[:, 100:]], dim=1)
        for poisoned in (leak, shifted):
            roles["report"][0] = torch.cat([clean, poisoned])
            assert leaks(roles)
    roles["report"][0] = clean
    assert not leaks(roles)


@pytest.mark.parametrize("name", corpora.CORPORA)
def test_a_document_belongs_to_one_split(name, monkeypatch):
    def documents_in_two_splits():
        splits = [set(texts.documents(name, split)) for split in texts.SPLITS]
        return (splits[0] & splits[1]) | (splits[0] & splits[2]) | (splits[1] & splits[2])

    assert not documents_in_two_splits()
    splits = {split: list(texts.documents(name, split)) for split in texts.SPLITS}
    splits["test"].append(splits["train"][0])
    monkeypatch.setattr(corpora, "embedded", lambda _: splits)
    assert len(documents_in_two_splits()) == 1


def test_texts_made_of_task_data_hold_no_item_that_is_scored():
    subjects = harness.load("mmlu")["tasks"].values()
    scored = {doc["question"].strip() for subject in subjects for doc in subject.eval_docs}
    every = [text for split in SPLITS for text in texts.documents("mmlu", split)]
    assert len(scored) > 10_000
    assert len(every) > 1_000
    starts = {text[:i] for text in every for i, letter in enumerate(text) if letter == "\n"}
    assert not starts & scored


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eval_split": "validation", "lr_compare_texts": []}, "what selection_windows 6 choose"),
        ({"eval_split": None, "lr_compare_texts": []}, "what selection_windows 6 choose SB on"),
        ({"eval_split": "train"}, "'wikipedia' with eval_split train .* is calibrated on"),
        ({"eval_texts": ["sotu"], "eval_split": "train"}, "'sotu' .* is calibrated on"),
        ({"eval_split": None}, "is what LR is measured on"),
        ({"lr_split": "test"}, "is what LR is measured on"),
        (
            {"eval_texts": ["sotu"], "eval_split": "test", "tasks": {"boolq": 2}},
            "calibration_text 'wikipedia' holds the passages of task boolq",
        ),
    ],
)
def test_a_study_that_leaks_is_refused(settings, message):
    with pytest.raises(RequestError, match=message):
        check_study(Study.open("smoke", **settings))
