"""Perplexity by its definition, and tasks by lm-eval's own model class and command line."""

import json
import os
import subprocess
import sys
from collections import Counter
from copy import deepcopy
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY
from datasets import Dataset
from huggingface_hub import constants
from prose import paragraphs

from dynslice.core import assets, hub
from dynslice.core.errors import RequestError
from dynslice.evaluate import harness, perplexity, task_table
from dynslice.evaluate.task_table import CHOICE_TASKS, PAPER_TASKS
from dynslice.experiment import validate
from dynslice.experiment.study import Study
from dynslice.inputs import models
from dynslice.inputs.checkpoints import save
from dynslice.inputs.windows import token_windows
from dynslice.method.architectures import dims_of
from dynslice.method.plan import constant
from dynslice.method.slicing import slice_model

CPU = torch.device("cpu")


@torch.inference_mode()
def nll_by_definition(model, windows):
    """Mean negative log-likelihood of tokens 2 to T, window by window, in float64."""
    means = []
    for ids in windows:
        log_p = model(ids[None]).logits[0].double().log_softmax(-1)
        means.append(-np.mean([log_p[t, ids[t + 1]].item() for t in range(len(ids) - 1)]))
    return np.array(means)


def test_perplexity_is_that_of_the_definition(tiny, tokens):
    got = perplexity.perplexity(tiny, tokens)
    nll = nll_by_definition(tiny, tokens)
    assert got["nll"] == pytest.approx(nll, rel=1e-6)
    assert got["nll_mean"] == pytest.approx(nll.mean(), rel=1e-6)
    assert got["perplexity"] == pytest.approx(np.exp(nll.mean()), rel=1e-5)
    assert got["nll_stderr"] == pytest.approx(nll.std(ddof=1) / np.sqrt(6), rel=1e-5)
    assert (got["windows"], got["window"], got["tokens"]) == (6, 24, 6 * 23)


def test_windows_do_not_see_each_other(tokens):
    model = TINY["llama"]()
    whole = perplexity.perplexity(model, tokens)["nll"]
    alone = [perplexity.perplexity(model, window[None])["nll"][0] for window in tokens]
    assert whole == pytest.approx(alone, rel=1e-5)


def test_one_window_has_no_standard_error(tokens):
    assert perplexity.perplexity(TINY["llama"](), tokens[:1])["nll_stderr"] is None


def test_window_that_predicts_nothing_is_refused(tokens):
    with pytest.raises(RequestError, match="window 1 predicts no token"):
        perplexity.perplexity(TINY["llama"](), tokens[:, :1])


def test_non_finite_logits_are_an_error(tokens):
    model = TINY["llama"]()
    model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(RequestError, match="log-likelihood is not finite"):
        perplexity.perplexity(model, tokens)


@torch.inference_mode()
def whole_logits_nll(model, windows):
    """The same by the model's own forward pass and its logits at once."""
    logits = model(windows).logits[:, :-1].transpose(1, 2).float()
    return torch.nn.functional.cross_entropy(logits, windows[:, 1:], reduction="none").mean(1)


def test_perplexity_is_that_of_the_whole_logits(tiny, tokens):
    # 6 x 23 positions: more than one chunk of the head, and the last one short.
    assert perplexity.LOGIT_CHUNK < 6 * 23 < 2 * perplexity.LOGIT_CHUNK
    want = whole_logits_nll(tiny, tokens).tolist()
    assert perplexity.perplexity(tiny, tokens)["nll"] == pytest.approx(want, rel=1e-6)


def test_perplexity_never_holds_more_logits_than_a_chunk(tokens):
    model, rows = TINY["llama"](), []
    model.get_output_embeddings().register_forward_hook(
        lambda _module, args, _out: rows.append(args[0].numel() // args[0].shape[-1])
    )
    perplexity.perplexity(model, tokens)
    assert sum(rows) == 6 * 23
    assert max(rows) <= perplexity.LOGIT_CHUNK


def test_models_that_cap_their_logits_run_whole(tokens):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(1)
    config = Gemma2Config(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        final_logit_softcapping=0.5,
        initializer_range=0.2,
    )
    model = Gemma2ForCausalLM(config).eval()
    want = whole_logits_nll(model, tokens).tolist()
    assert perplexity.perplexity(model, tokens)["nll"] == pytest.approx(want, rel=1e-6)
    assert not perplexity.has_plain_head(config)
    for name in ("logits_scaling", "logit_scale"):
        assert not perplexity.has_plain_head(SimpleNamespace(**{name: 0.5}))


# Choices that share a context


@pytest.fixture(scope="module")
def lm_classes():
    from lm_eval.models.huggingface import HFLM

    from dynslice.evaluate.shared_context import SharedContextLM

    return HFLM, SharedContextLM


def score(cls, model, tokenizer, requests):
    """lm-eval's answers to token requests, and the tokens that the layers computed for them."""
    lm = cls(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=32)
    computed = []
    hook = model.model.layers[0].register_forward_pre_hook(
        lambda _module, args: computed.append(args[0].shape[0] * args[0].shape[1])
    )
    try:
        answers = lm._loglikelihood_tokens(requests, disable_tqdm=True)
    finally:
        hook.remove()
    return answers, sum(computed)


def assert_same(got, want):
    assert [p for p, _ in got] == pytest.approx([p for p, _ in want], abs=1e-4)
    assert [greedy for _, greedy in got] == [greedy for _, greedy in want]


def requests_of(*groups):
    """(length of context, lengths of continuations) -> lm-eval's requests, interleaved."""
    draw = np.random.default_rng(5)
    made = []
    for c, lengths in groups:
        context = draw.integers(2, 97, c).tolist()
        made += [(context, draw.integers(2, 97, length).tolist()) for length in lengths]
    made = [made[i] for i in draw.permutation(len(made))]
    return [((f"{context}", f"{cont}"), context, cont) for context, cont in made]


def greedy_request(model, context, length):
    """A continuation that greedy decoding gives."""
    ids = list(context)
    for _ in range(length):
        ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
    return (("greedy", "greedy"), list(context), ids[len(context) :])


def network(name):
    if name != "sliced":
        return TINY[name]()
    dense = TINY["llama"]()
    calibration = torch.randint(2, 97, (8, 24), generator=torch.Generator().manual_seed(3))
    return slice_model(dense, calibration, constant(dims_of(dense.config), 0.25)).model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "llama-biases", "mistral", "mistral-sliding", "sliced"])
def test_shared_contexts_change_no_answer(name, attention, tiny_random, lm_classes):
    hflm, shared = lm_classes
    model = network(name)
    model.set_attn_implementation(attention)
    requests = requests_of((3, (1, 1, 2)), (9, (4, 3, 1, 6)), (17, (2, 9)), (1, (5,)), (6, (1,)))
    requests += [requests[0], requests[3], greedy_request(model, requests[1][1], 3)]
    requests += requests_of((40, (1, 3, 3)), (30, (2, 6)), (5, (32, 28)))  # max_length is 32
    requests.append(requests[-1])
    want, _ = score(hflm, model, tiny_random[1], requests)
    got, computed = score(shared, model, tiny_random[1], requests)
    assert_same(got, want)
    assert sum(greedy for _, greedy in want) in range(1, len(want))
    # A sliding window of 8 leaves these requests to HFLM, which computes as it does itself.
    if name != "mistral-sliding":
        assert computed < score(hflm, model, tiny_random[1], requests)[1]


def test_a_context_is_computed_once_for_its_choices(tiny_random, lm_classes):
    hflm, shared = lm_classes
    model, requests = TINY["llama"](), requests_of((20, (3, 5, 1, 4)))
    assert score(shared, model, tiny_random[1], requests)[1] == 20 + 2 + 4 + 0 + 3
    assert score(hflm, model, tiny_random[1], requests)[1] == 4 * (20 + 4)


@pytest.mark.parametrize("length", [1, 2])
def test_a_sliding_window_may_cover_the_choices(length, tiny_random, lm_classes):
    # 7 + 2 tokens less the last fill the window of 8; the layout is longer and may be.
    hflm, shared = lm_classes
    model, requests = TINY["mistral-sliding"](), requests_of((7, (1, length, length)))
    want, plain = score(hflm, model, tiny_random[1], requests)
    got, computed = score(shared, model, tiny_random[1], requests)
    assert_same(got, want)
    assert computed == 7 + 2 * (length - 1)
    longer = requests_of((8, (1, 2, 2)))
    want, plain = score(hflm, model, tiny_random[1], longer)
    got, computed = score(shared, model, tiny_random[1], longer)
    assert_same(got, want)
    assert computed == plain


def test_answers_reach_the_cache_of_lm_eval(tiny_random, lm_classes):
    model, requests = TINY["llama"](), requests_of((4, (2, 3)), (5, (1,)))
    lm = lm_classes[1](pretrained=model, tokenizer=tiny_random[1], max_length=32)
    kept = []
    lm.cache_hook = SimpleNamespace(add_partial=lambda *entry: kept.append(entry))
    answers = lm._loglikelihood_tokens(requests, disable_tqdm=True)
    texts = [texts for texts, *_ in requests]
    assert kept == [("loglikelihood", *pair) for pair in zip(texts, answers, strict=True)]


def test_rolling_likelihoods_are_those_of_lm_eval(tiny_random, lm_classes):
    model, tokenizer = tiny_random
    text = SimpleNamespace(args=(paragraphs(1)[:150],))
    values = [
        cls(pretrained=model, tokenizer=tokenizer, max_length=64).loglikelihood_rolling(
            [text, text]
        )
        for cls in lm_classes
    ]
    assert values[1] == pytest.approx(values[0], abs=1e-3)


# Tasks


@pytest.fixture(scope="module")
def tiny_random():
    assets.fetch()
    return models.load("embedded:tiny-random", CPU, torch.float32)


@pytest.fixture(scope="module")
def scores(tiny_random):
    return harness.tasks(*tiny_random, ["piqa", "winogrande", "arc_easy"], limit=5)


@pytest.mark.parametrize("name", ["piqa", "winogrande", "arc_easy"])
def test_accuracy_is_the_mean_over_items(name, scores):
    score = scores[name]
    assert score["n"] == len(score["correct"]) == len(score["margin"]) == 5
    assert set(score["correct"]) <= {0, 1}
    assert score["acc"] == np.mean(score["correct"])
    assert score["acc_stderr"] == pytest.approx(np.std(score["correct"], ddof=1) / np.sqrt(5))


@pytest.mark.parametrize("name", ["piqa", "winogrande", "arc_easy"])
def test_margin_is_positive_where_correct(name, scores):
    signs = [int(margin > 0) for margin in scores[name]["margin"]]
    assert signs == scores[name]["correct"]


def test_normalised_accuracy_only_where_lm_eval_defines_it(scores):
    assert scores["winogrande"]["acc_norm"] is None
    assert scores["winogrande"]["correct_norm"] is None
    assert scores["piqa"]["acc_norm"] == np.mean(scores["piqa"]["correct_norm"])


def test_mmlu_takes_the_limit_per_subject(tiny_random):
    score = harness.tasks(*tiny_random, ["mmlu"], limit=1)["mmlu"]
    assert score["n"] == len(score["margin"]) == 57
    assert score["acc"] == pytest.approx(np.mean(score["correct"]), abs=1e-12)
    assert [int(margin > 0) for margin in score["margin"]] == score["correct"]


def test_scores_are_those_of_lm_eval_to_the_item(tiny_random):
    names = ["piqa", "hellaswag", "winogrande", "arc_easy", "mmlu", "boolq", "social_iqa"]
    ours = harness.tasks(*tiny_random, names, limit=2)
    theirs = harness.tasks(*tiny_random, names, limit=2, share_contexts=False)
    for name in names:
        margins = ours[name].pop("margin"), theirs[name].pop("margin")
        assert margins[0] == pytest.approx(margins[1], abs=1e-3)
        assert ours[name] == theirs[name]


@pytest.mark.parametrize("subset", ["first", "stratified"])
def test_requests_are_built_and_tokenised_once_for_all_networks(subset, tiny_random, monkeypatch):
    model, tokenizer = tiny_random
    built, encoded = [], []
    harness.items_of.cache_clear()
    task = harness.items_of("piqa", 5, subset, 0).loaded["tasks"]["piqa"]
    construct, encode = task.construct_requests, type(tokenizer).__call__
    monkeypatch.setattr(task, "construct_requests", lambda **k: built.append(k) or construct(**k))
    monkeypatch.setattr(
        type(tokenizer), "__call__", lambda *a, **k: encoded.append(a) or encode(*a, **k)
    )
    first = harness.tasks(model, tokenizer, ["piqa"], 5, subset=subset)
    assert len(built) == 5
    count = len(encoded)
    other = deepcopy(model)
    other.model.layers[0].mlp.down_proj.weight.data *= -1
    second = harness.tasks(other, tokenizer, ["piqa"], 5, subset=subset)
    assert (len(built), len(encoded)) == (5, count)
    assert first["piqa"]["margin"] != second["piqa"]["margin"]
    again = harness.tasks(model, tokenizer, ["piqa"], 5, subset=subset)
    assert again == first


def test_a_text_without_a_token_is_refused_by_name(tiny_random):
    model, tokenizer = tiny_random
    from dynslice.evaluate.shared_context import SharedContextLM

    lm = SharedContextLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    with pytest.raises(RequestError, match=r"no token for 'an answer' of a task; use the one that"):
        lm._loglikelihood_tokens([(("a question", "an answer"), [1], [])])


# The other tasks

ALL_TASKS = [
    "hellaswag",
    "winogrande",
    "arc_easy",
    "arc_challenge",
    "piqa",
    "mmlu",
    "boolq",
    "social_iqa",
]
ALL_TASKS += ["gsm8k_cot", "xlsum_en", "mlqa_en"]


def test_the_tasks_are_those_that_the_authors_offer():
    assert list(task_table.TASKS) == ALL_TASKS
    assert list(PAPER_TASKS) == ALL_TASKS[:6]
    assert list(CHOICE_TASKS) == ALL_TASKS[:8]
    task_table.check_names(ALL_TASKS)
    for row in task_table.TASKS.values():
        assert (harness.OFFICIAL / row.definition).exists()
        assert (row.folder is None) != (row.hub is None)
        assert (row.tokens is None) == (row.hub is not None)


def test_tokens_of_an_item_are_those_of_its_layouts(tiny_random):
    from dynslice.evaluate import shared_context

    tokenizer = models.load_tokenizer("embedded:smollm2-135m")
    lm = shared_context.SharedContextLM(
        pretrained=tiny_random[0], tokenizer=tokenizer, max_length=2048
    )
    task = harness.load("arc_challenge")["tasks"]["arc_challenge"]
    task.build_all_requests()
    pairs = [tuple(map(tuple, lm._encode_pair(*request.args))) for request in task.instances]
    layouts = shared_context._layouts(pairs)
    mean = sum(len(layout.ids) for layout in layouts) / len(task.eval_docs)
    assert mean == pytest.approx(task_table.TASKS["arc_challenge"].tokens, abs=0.06)


def test_boolq_reads_its_answers_as_the_official_task_does():
    task = harness.load("boolq")["tasks"]["boolq"]
    for doc in list(task.eval_docs)[:9]:
        assert task.doc_to_choice(doc)[task.doc_to_target(doc)] == (
            "yes" if doc["answer"] else "no"
        )
        assert task.doc_to_text(doc) == f"{doc['passage']}\nQuestion: {doc['question']}?\nAnswer:"


def test_social_iqa_has_three_answers_each():
    task = harness.load("social_iqa")["tasks"]["social_iqa"]
    for doc in list(task.eval_docs)[:9]:
        right = "ABC"[int(doc["label"]) - 1]
        assert task.doc_to_choice(doc)[task.doc_to_target(doc)] == doc[f"answer{right}"]


STAND_INS = {
    "gsm8k_cot": [
        {"question": f"What is {i} and 1?", "answer": f"It is more.\n#### {i + 1}"}
        for i in range(6)
    ],
    "xlsum_en": [
        {"text": f"Long news {i} from here.", "summary": f"News {i}.", "title": "News"}
        for i in range(6)
    ],
    "mlqa_en": [
        {
            "context": f"House {i} is red.",
            "question": f"Which house {i} is red?",
            "answers": {"answer_start": [0], "text": [f"House {i}"]},
            "id": str(i),
        }
        for i in range(6)
    ],
}


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """Small files with the columns of the hub's, in place of a download."""

    def fetch(what, _repository, files, *_):
        name = what.split("'")[1]
        path = tmp_path / name / files.replace("*", "0000")
        path.parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_list(STAND_INS[name]).to_parquet(path)
        return [path]

    monkeypatch.setattr(hub, "fetch", fetch)
    monkeypatch.setattr(harness, "TASK_FILES", tmp_path / "task files")
    forget = (harness.items_of.cache_clear, harness._task_manager.cache_clear)
    [clear() for clear in forget]
    yield
    [clear() for clear in forget]


METRICS = {
    "gsm8k_cot": {"exact_match,strict-match", "exact_match,flexible-extract"},
    "xlsum_en": {"rougeL"},
    "mlqa_en": {"exact_match", "f1"},
}


@pytest.mark.parametrize("subset", task_table.SUBSETS)
@pytest.mark.parametrize("name", STAND_INS)
def test_generation_tasks_have_metrics(name, subset, tiny_random, stand_ins):
    score = harness.tasks(*tiny_random, [name], limit=4, subset=subset)[name]
    assert score["n"] == len(score["score"]) == 4
    assert set(score["metrics"]) == set(score["metrics_stderr"]) == METRICS[name]
    assert score["metrics"][score["metric"]] == pytest.approx(np.mean(score["score"]))
    assert all(0 <= value <= 1 for value in score["metrics"].values())
    for key in ("acc", "acc_norm", "acc_stderr", "correct", "correct_norm", "margin"):
        assert score[key] is None
    assert ("items" in score) == (subset == "stratified")
    json.dumps(score)


def test_sliced_networks_generate(tiny_random, stand_ins):
    model, tokenizer = tiny_random
    calibration = torch.randint(2, 97, (8, 24), generator=torch.Generator().manual_seed(3))
    sliced = slice_model(model, calibration, constant(dims_of(model.config), 0.25)).model
    score = harness.tasks(sliced, tokenizer, ["xlsum_en"], limit=2)["xlsum_en"]
    assert score["n"] == 2


# The tail of each is cut where the task says that an answer ends.
ANSWERS = {
    "gsm8k_cot": [" It is 1.", " The answer is 2.\nQ: 9", " so $3", " 12", "", " 6, the answer"],
    "xlsum_en": [" News 0.\nMore", " News", "", " news 3!", " Else", " news five"],
    "mlqa_en": [" House 0", " the house 1.\n\n", " House", " red", "", " house 5"],
}
RIGHT = {
    "gsm8k_cot": ("exact_match,flexible-extract", [1, 1, 1, 0, 0, 1]),
    "xlsum_en": ("rougeL", [1, 2 / 3, 0, 1, 0, 0.5]),
    "mlqa_en": ("f1", [1, 1, 2 / 3, 0, 0, 1]),
}


@pytest.mark.parametrize("name", STAND_INS)
def test_generated_answers_are_scored_by_the_definition(name, stand_ins, monkeypatch, tiny_random):
    from dynslice.evaluate.shared_context import SharedContextLM

    asked = []

    def generate(_lm, requests, **_):
        answers = []
        for request, answer in zip(requests, ANSWERS[name], strict=True):
            asked.append(request.args)
            for stop in request.args[1]["until"]:
                answer = answer.split(stop)[0]
            answers.append(answer)
        return answers

    monkeypatch.setattr(SharedContextLM, "generate_until", generate)
    score = harness.tasks(*tiny_random, [name])[name]
    assert (score["metric"], score["score"]) == (RIGHT[name][0], pytest.approx(RIGHT[name][1]))
    # Zero-shot: what is asked is the item and nothing before it.
    first = {
        "gsm8k_cot": "Q: What is 0 and 1?\nA:",
        "xlsum_en": "Article: Long news 0 from here.\n\nSummary:",
        "mlqa_en": "Context: House 0 is red.\n\nQuestion: Which house 0 is red?\n\nAnswer:",
    }
    assert asked[0][0] == first[name]


@pytest.mark.parametrize("name", STAND_INS)
def test_a_task_of_the_hub_is_refused_without_it(name, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        RequestError, match=f"^task '{name}' is dataset .*HF_HUB_OFFLINE is set.*leave it out"
    ):
        harness.tasks(None, None, ["piqa", name], limit=1)  # before a model is looked at
    study = Study.open("smoke", tasks={name: 2})
    with pytest.raises(RequestError, match=f"^task '{name}' is dataset .*HF_HUB_OFFLINE is set"):
        validate.check_study(study)


# Drawn items


loaded = cache(harness.load)


def draw(name, limit):
    return harness.sample_items(loaded(name)["tasks"], limit)


@pytest.fixture(scope="module")
def drawn(tiny_random):
    names = ["piqa", "winogrande", "mmlu"]
    return harness.tasks(*tiny_random, names, limit=20, subset="stratified")


@pytest.mark.parametrize("name", ["piqa", "winogrande", "mmlu"])
def test_a_stratified_limit_is_the_number_of_items(name, drawn):
    score = drawn[name]
    assert score["n"] == len(score["items"]) == len(set(score["items"])) == 20
    assert score["acc"] == pytest.approx(np.mean(score["correct"]), abs=1e-12)
    deviation = np.std(score["correct"], ddof=1)
    assert score["acc_stderr"] == pytest.approx(deviation / np.sqrt(20))
    assert [int(margin > 0) for margin in score["margin"]] == score["correct"]


def test_the_seed_draws_other_items_and_no_seed_the_same(tiny_random):
    def items(**seed):
        return harness.tasks(*tiny_random, ["piqa"], 5, subset="stratified", **seed)["piqa"][
            "items"
        ]

    assert items() == items(seed=0)
    assert len({tuple(items(seed=seed)) for seed in range(3)}) == 3


def test_drawn_items_are_scored_as_they_are_among_all(tiny_random, monkeypatch):
    whole = harness.tasks(*tiny_random, ["piqa"], limit=9)["piqa"]
    monkeypatch.setattr(harness, "sample_items", lambda tasks, limit, seed: {"piqa": [1, 5, 8]})
    part = harness.tasks(*tiny_random, ["piqa"], limit=3, subset="stratified")["piqa"]
    assert "items" not in whole
    assert part["items"] == [1, 5, 8]
    for key in ("correct", "correct_norm"):
        assert part[key] == [whole[key][item] for item in part["items"]]
    assert part["margin"] == pytest.approx([whole["margin"][i] for i in part["items"]], abs=1e-3)


LARGE = ["hellaswag", "boolq", "social_iqa"]  # whose answers take seconds to look at
SMALL = ["piqa", "winogrande", "arc_easy", "arc_challenge"]


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        *((name, 7) for name in [*SMALL, *LARGE]),
        *((name, 50) for name in SMALL),
        *(pytest.param(name, 50, marks=pytest.mark.long) for name in LARGE),
    ],
)
def test_answer_positions_keep_their_proportions(name, limit, tiny_random):
    positions = {"piqa": "label", "hellaswag": "label", "winogrande": "answer"}
    positions |= {"boolq": "answer", "social_iqa": "label"}
    docs = loaded(name)["tasks"][name].eval_docs
    if name.startswith("arc"):
        answers = [doc["choices"]["label"].index(doc["answerKey"]) for doc in docs]
    else:
        answers = [int(doc[positions[name]]) for doc in docs]
    [(task, items)] = draw(name, limit).items()
    assert task == name
    assert items == sorted(set(items))
    assert len(items) == limit
    among = Counter(answers[item] for item in items)
    for answer, count in Counter(answers).items():
        assert abs(among[answer] - limit * count / len(answers)) < 1


@pytest.mark.parametrize("limit", [20, 200])
def test_mmlu_is_drawn_in_proportion_to_its_subjects(limit, tiny_random):
    sizes = {name: len(items) for name, items in harness.strata(loaded("mmlu")["tasks"])}
    items = draw("mmlu", limit)
    assert len(sizes) == 57
    assert all(items.values())
    assert sum(map(len, items.values())) == limit
    for name, size in sizes.items():
        share = limit * size / sum(sizes.values())
        assert abs(len(items.get(name, [])) - share) < 1


def test_mmlu_names_its_items_by_subject(drawn):
    items = draw("mmlu", 20)
    want = [f"{name.removeprefix('mmlu_')}:{i}" for name in sorted(items) for i in items[name]]
    assert drawn["mmlu"]["items"] == want
    assert drawn["mmlu"]["acc_norm"] is None


@pytest.mark.parametrize("name", ["piqa", "mmlu"])
def test_the_same_items_are_drawn_every_time(name, drawn):
    np.random.default_rng().random()
    again = draw(name, 20)
    items = [
        f"{task.removeprefix('mmlu_')}:{i}" if name == "mmlu" else i
        for task, ids in again.items()
        for i in ids
    ]
    assert sorted(items) == sorted(drawn[name]["items"])


def test_a_limit_beyond_the_items_takes_them_all(tiny_random):
    assert draw("arc_challenge", 10**6) == {"arc_challenge": list(range(299))}


@pytest.mark.parametrize(
    ("limit", "sizes", "shares"),
    [
        (10, [10, 10, 10], [4, 3, 3]),
        (3, [5, 1, 4], [2, 0, 1]),
        (1, [1, 1], [1, 0]),
        (9, [2, 3], [2, 3]),
    ],
)
def test_largest_remainders(limit, sizes, shares):
    assert harness._proportional(limit, sizes) == shares


def test_unknown_subset_is_refused(tiny_random):
    with pytest.raises(RequestError, match=r"subset 'random' is unknown; use first or stratified"):
        harness.tasks(*tiny_random, ["piqa"], limit=1, subset="random")


@pytest.mark.parametrize("subset", task_table.SUBSETS)
def test_a_limit_of_no_item_is_refused(subset, tiny_random):
    with pytest.raises(RequestError, match="limit 0 takes no item; use at least 1"):
        harness.tasks(*tiny_random, ["piqa"], limit=0, subset=subset)


def test_unknown_task_is_refused(tiny_random):
    with pytest.raises(RequestError, match=r"task 'piqua' is unknown; the tasks are .*piqa"):
        harness.tasks(*tiny_random, ["piqua"], limit=1)


@pytest.mark.parametrize(
    "subjects", ["mmlu_abstract_algebra", pytest.param("mmlu", marks=pytest.mark.long)]
)
def test_lm_eval_command_line_agrees_on_a_sliced_directory(subjects, tiny_random, tmp_path, ask):
    model, tokenizer = tiny_random
    text, folder, out = tmp_path / "text.txt", tmp_path / "sliced", tmp_path / "lm_eval.json"
    text.write_text(paragraphs(4), encoding="utf-8")
    calibration = token_windows(str(text), None, tokenizer, 64, 4)
    sliced = slice_model(model, calibration, constant(dims_of(model.config), 0.25)).model
    save(sliced, tokenizer, folder)

    names = ["piqa", "winogrande", "arc_easy", "boolq", "social_iqa"]
    asked = ["--tasks", ",".join([*names, "mmlu"]), "--limit", "2"]
    status, stdout, stderr = ask("tasks", "--model", folder, *asked, "--json")
    assert status == 0, stderr
    ours = json.loads(stdout)["tasks"]

    command = ["lm_eval", "--model", "hf", "--device", "cpu", "--output_path", str(out)]
    command += ["--tasks", ",".join([*names, subjects]), "--limit", "2"]
    command += ["--model_args", f"pretrained={folder},trust_remote_code=True"]
    command += ["--include_path", str(harness.TASK_FILES)]
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    finished = subprocess.run(
        [sys.executable, "-m", *command],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    [written] = tmp_path.glob("lm_eval*.json")
    theirs = json.loads(written.read_text())["results"]
    for name in names:
        assert ours[name]["n"] == 2
        assert ours[name]["acc"] == theirs[name]["acc,none"]
        assert ours[name]["acc_norm"] == theirs[name].get("acc_norm,none")
    assert ours["mmlu"]["n"] == 2 * 57
    of_mmlu = ours["mmlu"]["correct"] if subjects == "mmlu" else ours["mmlu"]["correct"][:2]
    assert np.mean(of_mmlu) == pytest.approx(theirs[subjects]["acc,none"], abs=1e-12)


@pytest.mark.parametrize("name", TINY)
def test_every_family_shares_contexts_as_hflm_scores_them(name):
    """Masks and positions given from outside mean the same to each family's attention."""
    assets.fetch()
    model = TINY[name](vocab_size=257)
    tokenizer = models.load_tokenizer("embedded:tiny-random")
    shared, plain = (
        harness.tasks(model, tokenizer, ["piqa"], 3, share_contexts=share)["piqa"]["margin"]
        for share in (True, False)
    )
    assert shared == pytest.approx(plain, abs=1e-3)
    assert max(map(abs, plain)) > 1  # the tolerance is small beside what is compared
