"""What went wrong in other people's hands, each with the right value."""

import contextlib
import gzip
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import peft
import pytest
import torch
import transformers
from conftest import CPU, TINY
from huggingface_hub import ModelCard
from lm_eval.models.huggingface import HFLM
from prose import paragraphs
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from dynslice.cli import commands, reproduce
from dynslice.core import assets, files, paths
from dynslice.core.errors import RequestError, RunError
from dynslice.evaluate import harness
from dynslice.evaluate.perplexity import perplexity
from dynslice.inputs import checkpoints, models, texts
from dynslice.inputs.windows import first_token, sliding_windows, token_stream, token_windows
from dynslice.method import modeling_sliced
from dynslice.method.architectures import dims_of
from dynslice.method.plan import constant
from dynslice.method.redundancy import layer_redundancy
from dynslice.method.slicing import slice_model

NAME = "embedded:tiny-random"
CALIBRATION = ["--calibration", "text.txt", "--windows", 4, "--window", 64]
SLICE = ["slice", "--model", NAME, "--slice-percentage", 0.25, *CALIBRATION]
LR = ["lr", "--model", NAME, "--text", "text.txt", "--max-tokens", 200, "--window", 64]


@pytest.fixture(autouse=True, scope="module")
def places(tmp_path_factory):
    """A folder with texts and a bfloat16 model, in which the tests run."""
    assets.fetch()
    folder = tmp_path_factory.mktemp("hands")
    with contextlib.chdir(folder):
        Path("text.txt").write_text(paragraphs(70), encoding="utf-8")
        Path("page.txt").write_text(paragraphs(8), encoding="utf-8")
        model, tokenizer = models.load(NAME, CPU, torch.bfloat16)
        checkpoints.save(model, tokenizer, Path("half"))
        yield folder


@pytest.fixture(scope="module")
def sliced(places):
    """A slice as the command line saves it."""
    assert commands.main([*map(str, SLICE), "--out", "sliced"]) == 0
    return places / "sliced"


@pytest.fixture
def tiny_model():
    """The tiny embedded model and its tokenizer."""
    return models.load(NAME, CPU, torch.float32)


# 1. Outputs


def test_a_link_stays_a_link_and_its_target_is_written(ask, tmp_path):
    target, link = tmp_path / "real.json", tmp_path / "link.json"
    target.write_text("old")
    link.symlink_to(target)
    assert ask(*LR, "--out", link)[0] == 0
    assert link.is_symlink()
    assert "layers" in json.loads(target.read_text())


def test_a_link_that_leads_to_itself_is_refused(ask, tmp_path):
    (tmp_path / "a.json").symlink_to(tmp_path / "b.json")
    (tmp_path / "b.json").symlink_to("a.json")
    status, _, stderr = ask(*LR, "--out", tmp_path / "a.json")
    assert (status, "leads to itself" in stderr) == (2, True)


@pytest.mark.parametrize("device", ["/dev/stdout", "/dev/null", "linked"])
def test_devices_are_refused_as_outputs_and_left_as_they_are(ask, device, tmp_path):
    if device == "linked":
        device = tmp_path / "linked"
        device.symlink_to("/dev/stdout")
    before = os.readlink("/dev/stdout")
    status, _, stderr = ask(*LR, "--out", device)
    assert (status, "is a device; name a file" in stderr) == (2, True)
    assert os.readlink("/dev/stdout") == before


@pytest.mark.parametrize(
    ("command", "out", "option"),
    [
        (LR, "text.txt", "--text"),
        (LR, "./text.txt", "--text"),
        (["plan", "--lr", "lr.json", "--slice-percentage", 0.2], "lr.json", "--lr"),
        ([*LR[:1], "--model", "half", *LR[3:]], "half/config.json", "--model"),
    ],
)
def test_an_output_that_is_an_input_is_refused(ask, command, out, option):
    assert ask(*LR, "--out", "lr.json")[0] == 0
    before = Path(out).read_bytes()
    status, _, stderr = ask(*command, "--out", out)
    assert (status, f"is what {option} reads; name another" in stderr) == (2, True)
    assert Path(out).read_bytes() == before


# 2. A folder that appears, and two makers of one


def test_what_appears_at_the_output_meanwhile_is_left_alone(tmp_path):
    with pytest.raises(RunError, match="appeared while it was made"), files.new(tmp_path / "out"):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious").write_text("x")
    assert (tmp_path / "out" / "precious").read_text() == "x"
    assert os.listdir(tmp_path) == ["out"]


def test_an_output_has_one_maker(tmp_path):
    with files.new(tmp_path / "out") as folder:
        (folder / "x").touch()
        with pytest.raises(RequestError, match="made by another run"), files.new(tmp_path / "out"):
            pass
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["x"]
    with pytest.raises(RequestError, match="exists already"), files.new(tmp_path / "out"):
        pass


# 3. Texts by suffix


@pytest.mark.parametrize("name", ["a.jsonl", "a.json.gz", "a.parquet", "a.txt.gz", "mark.txt"])
def test_a_text_is_what_its_file_holds_whatever_the_format(name, tmp_path):
    import pandas as pd

    rows, path = ["one two three", "four five"], tmp_path / name
    lines = "\n".join(json.dumps({"text": row}) for row in rows)
    {
        "a.jsonl": lambda: path.write_text(lines),
        "a.json.gz": lambda: path.write_bytes(gzip.compress(lines.encode())),
        "a.parquet": lambda: pd.DataFrame({"text": rows}).to_parquet(path),
        "a.txt.gz": lambda: path.write_bytes(gzip.compress("\n".join(rows).encode())),
        "mark.txt": lambda: path.write_text("\n".join(rows), encoding="utf-8-sig"),
    }[name]()
    assert "\n".join(texts.documents(str(path), None)) == "\n".join(rows)


# 4. What is saved has the type of the model


@pytest.mark.parametrize("how", [[], ["--stream"], ["--recovery-steps", 1], ["--plain"]])
def test_a_slice_is_saved_in_the_dtype_of_the_model(ask, tmp_path, how):
    for asked, dtype in (([], torch.bfloat16), (["--save-dtype", "float32"], torch.float32)):
        out = tmp_path / str(dtype)
        command = ["slice", "--model", "half", *SLICE[3:], *how, *asked, "--out", out]
        status, stdout, stderr = ask(*command, "--json")
        assert status == 0, stderr
        [weights] = out.glob("*.safetensors")
        with safe_open(weights, "pt") as file:
            assert {file.get_tensor(name).dtype for name in file.keys()} == {dtype}  # noqa: SIM118 - no dict
        assert json.loads((out / "config.json").read_text())["dtype"] == str(dtype)[6:]
        assert json.loads(stdout)["computed_in"] == "float32"
        loaded = AutoModelForCausalLM.from_pretrained(out, dtype="auto", trust_remote_code=True)
        assert loaded.dtype == dtype


def test_bytes_are_those_of_what_is_saved(ask):
    plan = ["plan", "--slice-percentage", 0.2, "--json"]
    sizes = {}
    for model in ("half", NAME):
        plan = ["plan", "--model", model, "--size", "200KB", "--json"]
        sizes[model] = json.loads(ask(*plan)[1])["parameters"]
    assert sizes[NAME] <= 50_000 < sizes["half"] <= 100_000


# 5. Start-of-sequence tokens


def with_bos(tokenizer):
    """The tokenizer of the tiny model, told to put a token before each text."""
    from tokenizers.processors import TemplateProcessing

    tokenizer.add_special_tokens({"bos_token": "<end>"})
    backend = tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(
        single="<end> $A", special_tokens=[("<end>", tokenizer.bos_token_id)]
    )
    return tokenizer


def test_each_window_starts_with_the_token_that_the_tokenizer_adds(tiny_model):
    _, plain = tiny_model
    text = ("text.txt", None)
    assert first_token(plain) is None
    unmarked = token_windows(*text, plain, 32, 5)
    marked = with_bos(plain)
    bos = marked.bos_token_id
    for choice, first in (("auto", bos), ("always", bos), ("never", None)):
        assert first_token(marked, choice) == first
    windows = token_windows(*text, marked, 32, 5)
    assert windows.shape == (5, 32)
    assert (windows[:, 0] == bos).all()
    assert torch.equal(windows[:, 1:].flatten(), unmarked.flatten()[: 5 * 31])
    assert torch.equal(token_windows(*text, marked, 32, 5, bos="never"), unmarked)
    stream = token_stream(*text, marked, limit=100)
    slid = sliding_windows(stream, 32, 10, bos)
    assert (slid[:, 0] == bos).all()
    assert torch.equal(slid[1, 1:], stream[10:41])
    with pytest.raises(RequestError, match="bos 'sometimes' is unknown"):
        first_token(marked, "sometimes")


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_perplexity_with_a_start_token_is_lm_evals_rolling_one(family, tiny_model):
    model = TINY[family](vocab_size=257)
    tokenizer = with_bos(tiny_model[1])
    [window] = token_windows("page.txt", None, tokenizer, 60, 1)
    ours = perplexity(model, window[None])["nll"][0] * 59
    lm = HFLM(pretrained=model, tokenizer=tokenizer, add_bos_token=False)  # it prefixes one anyway
    [theirs] = lm.loglikelihood_rolling(
        [type("Request", (), {"args": (tokenizer.decode(window[1:]),)})()], disable_tqdm=True
    )
    assert ours == pytest.approx(-theirs, rel=1e-5)


def test_the_start_token_is_part_of_a_request_where_it_is_chosen():
    from dynslice.experiment.study import Study

    usual, never = Study.open("smoke"), Study.open("smoke", bos="never")
    assert "bos" not in usual.lr_request().config
    for request in (never.lr_request(), never.perplexity_request(never.points()[0], "wikipedia")):
        assert request.config["bos"] == "never"
    assert never.design.calibration()["bos"] == "never"


# 6. Wrong without a word


def test_dropout_of_a_model_in_training_is_left_out(tiny_model):
    model, tokenizer = tiny_model
    windows = token_windows("text.txt", None, tokenizer, 64, 4)
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    measures = {
        "lr": lambda: layer_redundancy(model, windows).lr,
        "ppl": lambda: perplexity(model, windows)["nll_mean"],
        "slice": lambda: (
            slice_model(model, windows, constant(dims_of(model.config), 0.25))
            .model.model.layers[2]
            .mlp.down_proj.weight.sum()
            .item()
        ),
    }
    wanted = {name: measure() for name, measure in measures.items()}
    model.train()
    assert {name: measure() for name, measure in measures.items()} == wanted
    assert all(module.training for module in model.modules())


def test_contexts_that_are_cut_are_counted(tiny_model):
    from dynslice.evaluate import harness

    model, tokenizer = tiny_model
    whole = harness.tasks(model, tokenizer, ["piqa"], limit=4)["piqa"]
    assert "contexts_cut" not in whole
    model.config.max_position_embeddings = 220
    assert harness.tasks(model, tokenizer, ["piqa"], limit=4)["piqa"]["contexts_cut"] > 0
    model.config.max_position_embeddings = 40
    with pytest.raises(RequestError, match="is longer than the 40 positions of the model"):
        harness.tasks(model, tokenizer, ["piqa"], limit=4)


@pytest.mark.parametrize("text", ["a" * 5000, paragraphs(1)[:100]])
def test_directions_that_calibration_does_not_have_are_said(ask, tmp_path, text):
    (tmp_path / "poor.txt").write_text(text)
    few = ["--calibration", tmp_path / "poor.txt", "--windows", 1, "--window", 32]
    status, stdout, stderr = ask(*SLICE[:5], *few, "--out", tmp_path / "out")
    assert status == 0, stderr
    assert "keep directions that the calibration text does not have" in stdout
    assert json.loads((tmp_path / "out" / "slice.json").read_text())["arbitrary_places"] > 0


# 7. Threads


def test_slicing_in_threads_leaves_other_modules_alone(tiny_model):
    model, tokenizer = tiny_model
    windows = token_windows("text.txt", None, tokenizer, 64, 2)
    plan, devices, sliced = constant(dims_of(model.config), 0.25), set(), []

    def work(own):
        sliced.append(slice_model(own, windows, plan).model)

    given = [
        model,
        models.load(NAME, CPU, torch.float32)[0],
    ]  # transformers' loading has no threads
    threads = [threading.Thread(target=work, args=[own]) for own in given]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        devices.add(nn.Linear(2, 2).weight.device.type)
    devices.add(nn.Linear(2, 2).weight.device.type)
    assert devices == {"cpu"}
    logits = [network(windows).logits for network in sliced]
    assert torch.equal(*logits)


# 8. and 10. A sentence for each


def test_a_tokenizer_larger_than_the_embedding_is_refused_by_tasks(ask, tmp_path):
    model = TINY["llama"](vocab_size=97)
    checkpoints.save(model, models.load_tokenizer(NAME), tmp_path / "small")
    status, _, stderr = ask("tasks", "--model", tmp_path / "small", "--tasks", "piqa", "--limit", 2)
    assert (status, "the vocabulary of the model has 97" in stderr) == (2, True)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("half/model.safetensors", "is a file of weights; name the directory that holds it"),
        ("text.txt", "is a file, and no GGUF; name the directory of a saved model"),
        ("adapter", "is a LoRA adapter of some/base; merge it with peft"),
        ("./nowhere", "is a path where nothing is; check it"),
        ("/no/such/model", "is a path where nothing is; check it"),
    ],
)
def test_what_is_no_saved_model_is_named(ask, name, sentence):
    Path("adapter").mkdir(exist_ok=True)
    Path("adapter/adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    status, _, stderr = ask("ppl", "--model", name, "--text", "text.txt")
    assert (status, sentence in stderr) == (2, True)
    assert "network" not in stderr


# 9. and 13. The ecosystem


def test_a_sliced_model_can_be_pickled_and_saved_whole(tiny_model):
    model, tokenizer = tiny_model
    windows = token_windows("text.txt", None, tokenizer, 64, 2)
    network = slice_model(model, windows, constant(dims_of(model.config), 0.25)).model
    whole = io.BytesIO()
    torch.save(network, whole)
    whole.seek(0)
    for copy in (pickle.loads(pickle.dumps(network)), torch.load(whole, weights_only=False)):
        assert torch.equal(copy(windows).logits, network(windows).logits)
        assert type(copy.model.layers[0]) is type(network.model.layers[0])


def test_peft_knows_where_to_adapt(sliced):
    network = AutoModelForCausalLM.from_pretrained(sliced, trust_remote_code=True)
    adapted = peft.get_peft_model(network, peft.LoraConfig(task_type="CAUSAL_LM"))
    assert any("q_proj.lora_A" in name for name, _ in adapted.named_parameters())


def test_a_tokenizer_loads_silently_and_without_code(sliced, tmp_path):
    shutil.copytree(sliced, tmp_path / "apart")
    code = (
        "from transformers import AutoTokenizer, PreTrainedTokenizerFast;"
        "one = PreTrainedTokenizerFast.from_pretrained('apart')('a');"
        "print(one == AutoTokenizer.from_pretrained('apart', trust_remote_code=True)('a'))"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, stdin=None
    )
    assert (finished.stdout, finished.stderr) == ("True\n", "")
    assert AutoTokenizer.from_pretrained(sliced)("a")["input_ids"]


def test_a_slice_has_a_model_card_and_names_what_was_sliced(sliced):
    card = ModelCard.load(sliced / "README.md")
    assert card.data.license is None  # a tiny random model has none
    assert {"dynslice", "sliced"} <= set(card.data.tags)
    facts = json.loads((sliced / "slice.json").read_text())
    source = Path(models.resolve(NAME))
    for name, digest in facts["sliced_sha256"].items():
        assert files.sha256(source / name) == digest
    assert f"{facts['parameters']:,}" in card.text
    assert files.damage(sliced) is None


@pytest.mark.parametrize(
    ("share", "said"), [(0.25, "Its width 48 is no multiple of 32"), (0.5, None)]
)
def test_a_plain_card_names_a_width_that_8_bits_do_not_divide(share, said, ask, tmp_path):
    """llama.cpp quantises blocks of 32 weights in a row."""
    command = ["slice", "--model", NAME, "--plain", "--slice-percentage", share, *CALIBRATION]
    assert ask(*command, "--out", tmp_path / "out")[0] == 0
    card = ModelCard.load(tmp_path / "out" / "README.md").text
    assert "transformers 5 or newer" in card
    assert said in card if said else "16 bits" not in card


def test_the_modelling_file_refuses_a_transformers_that_misreads_the_rope(monkeypatch):
    monkeypatch.setattr(transformers, "__version__", "4.57.1")
    code = Path(modeling_sliced.__file__).read_text(encoding="utf-8")
    with pytest.raises(ImportError, match="transformers 5 or newer"):
        exec(compile(code, "modeling_sliced.py", "exec"), {"__name__": "modeling_sliced"})


@pytest.mark.parametrize("rest", [None, torch.float32], ids=["bf16", "norms in float32"])
@pytest.mark.parametrize("how", [(), ("--stream",)], ids=["", "streamed"])
def test_a_slice_has_the_dtype_of_the_tensors_where_the_config_names_none(rest, how, ask, tmp_path):
    model, tokenizer = models.load(NAME, CPU, torch.bfloat16)
    for name, weight in model.named_parameters():
        weight.data = weight.data.to(rest if rest and "norm" in name else torch.bfloat16)
    checkpoints.save(model, tokenizer, tmp_path / "half")
    path = tmp_path / "half" / "config.json"
    config = json.loads(path.read_text())
    del config["dtype"]
    path.write_text(json.dumps(config))
    (path.parent / files.CHECKSUMS).unlink()
    command = ["slice", "--model", path.parent, "--slice-percentage", 0.25, *CALIBRATION, *how]
    assert ask(*command, "--out", tmp_path / "out")[0] == 0
    assert json.loads((tmp_path / "out" / "slice.json").read_text())["dtype"] == "bfloat16"
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_values_of_another_model_are_said_to_be_so(ask, tmp_path, monkeypatch):
    for name in ("mine", "other"):
        shutil.copytree("half", tmp_path / name)
    monkeypatch.chdir(tmp_path)
    text = ["--text", Path(__file__).parent / "prose.py", "--window", 64]
    measure = ["lr", *text, "--max-tokens", 200]
    assert ask(*measure, "--model", "mine", "--out", "it.json")[0] == 0
    plan = ["plan", "--slice-percentage", 0.25, "--schedule", "lr", "--lr", "it.json"]
    for same in ("mine", "./mine", "mine/", tmp_path / "mine", "other/../mine"):
        assert ask(*plan, "--model", same)[::2] == (0, "")
    status, _, said = ask(*plan, "--model", "other")
    note = "note: the LR scores of it.json were measured on mine, this plan is for other\n"
    assert (status, said) == (0, note)
    slice_ = ["slice", *plan[1:], "--calibration", text[1], "--windows", 2, "--window", 64]
    status, _, said = ask(*slice_, "--model", "other", "--out", "out")
    assert status == 0
    assert said.count(note) == 1


def test_the_licence_of_the_base_model_is_passed_on(ask, tmp_path):
    from dynslice.cli.card import _licence

    assert _licence("embedded:smollm2-135m", None) == "apache-2.0"
    shutil.copytree("half", tmp_path / "smollm2-135m")
    with contextlib.chdir(tmp_path):
        assert _licence("smollm2-135m", None) is None  # a directory of that name
    shutil.copytree("half", tmp_path / "half")
    (tmp_path / "half" / "README.md").write_text("---\nlicense: mit\n---\n# Half\n")
    (tmp_path / "half" / files.CHECKSUMS).unlink()
    command = ["slice", "--model", tmp_path / "half", *SLICE[3:], "--out", tmp_path / "out"]
    assert ask(*command)[0] == 0
    assert ModelCard.load(tmp_path / "out" / "README.md").data.license == "mit"


def test_a_model_that_is_a_dot_has_the_name_of_its_folder(ask, tmp_path, monkeypatch):
    monkeypatch.chdir("half")
    command = ["quantize", "--model", ".", "--bits", 8, "--out", tmp_path / "out"]
    assert ask(*command)[0] == 0
    assert "# half, quantized" in (tmp_path / "out" / "README.md").read_text()


# 11. Pipes and bars


def test_a_reader_that_goes_away_is_no_failure():
    command = f"{sys.executable} -m dynslice assets list | head -1; echo ${{PIPESTATUS[0]}}"
    finished = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert finished.stdout.splitlines()[-1] == "0"
    assert finished.stderr == ""


def ran(*command, **environment):
    """A Python command in a process of its own."""
    here = {**os.environ, "PYTHONPATH": str(paths.PACKAGE.parent), **environment}
    command = [sys.executable, *command]
    return subprocess.run(command, env=here, capture_output=True, text=True, check=False)


def test_a_name_that_the_terminal_cannot_show_is_no_failure(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(paragraphs(20), encoding="utf-8")
    for form, shown in (([], "wrote gr\\xf6\\xdfe: "), (["--json"], '{"out": "gr\\u00f6\\u00dfe"')):
        terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        with contextlib.redirect_stdout(terminal):
            assert commands.main([*map(str, SLICE), "--out", "größe", *form]) == 0
        assert terminal.buffer.getvalue().decode("ascii").startswith(shown)
        shutil.rmtree("größe")


def test_a_model_card_holds_a_name_in_another_encoding(ask, tmp_path):
    text = tmp_path / os.fsdecode(b"t\xebxt.txt")
    text.write_text(paragraphs(20), encoding="utf-8")
    asked = [*SLICE, "--calibration", text, "--out", tmp_path / "out"]
    assert ask(*asked)[0] == 0
    assert "t\ufffdxt.txt" in (tmp_path / "out/README.md").read_text(encoding="utf-8")


def test_lists_are_read_with_spaces_round_their_commas(ask, monkeypatch):
    asked = []
    monkeypatch.setattr(harness, "tasks", lambda _, __, names, **_how: asked.append(names) or {})
    assert ask("tasks", "--model", NAME, "--tasks", " piqa , arc_easy,", "--limit", 1)[0] == 0
    monkeypatch.setattr(reproduce, "run", lambda *_, only, **_how: asked.append(only) or ({}, []))
    assert ask("reproduce", "--profile", "smoke", "--only", "01, 02", "03")[0] == 0
    assert asked == [["piqa", "arc_easy"], ["01", "02", "03"]]


@pytest.mark.parametrize("name", ["DYNSLICE_CACHE", "DYNSLICE_OUTPUT"])
def test_an_empty_variable_is_as_good_as_none(name, monkeypatch):
    monkeypatch.delenv(name, raising=False)
    told = ["-c", "from dynslice.core.paths import *; print(CACHE, OUTPUT)"]
    assert ran(*told, **{name: ""}).stdout == ran(*told).stdout != ""


def test_our_own_code_warns_of_nothing():
    code = "import time; from dynslice.core import interrupt\nwith interrupt.handled(): pass\n"
    done = ran("-W", "error", "-c", f"{code}time.sleep(0.3)")
    assert (done.returncode, done.stderr) == (0, "")


def test_an_interpreter_without_docstrings_is_refused():
    done = ran("-OO", "-m", "dynslice", "assets", "list")
    assert done.returncode == 2
    assert "needs the docstrings that python -OO leaves out; use python -O" in done.stderr


def test_no_bar_is_written_into_a_file(dynslice):
    status, _, stderr = dynslice("ppl", "--model", NAME, "--text", Path("text.txt").resolve())
    assert status == 0
    assert "\r" not in stderr
