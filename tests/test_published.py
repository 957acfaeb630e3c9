"""Published numbers are those of the papers, and join what was measured by model and settings."""

from dataclasses import replace

import numpy as np
import pytest
from test_compare import TEXT_LEVEL, Invented, points

from dynslice.core import paths
from dynslice.core.errors import RequestError
from dynslice.experiment.profile import load
from dynslice.experiment.store import Store
from dynslice.report import published, style

MODEL = "Some-Lab/Some-Model"
SETTINGS = {
    "model": MODEL,
    "slice_percentages": [0.2, 0.3],
    "eval_texts": ["sotu", "wikipedia"],
    "tasks": {"piqa": 40, "arc_easy": None},
    "task_subset": "first",
    "task_slice_percentages": [0.3],
    "beyond_slice_percentages": [],
    "instead_slice_percentages": [],
}
HEADER = (
    "method,model,metric,dataset,slice_percentage,slice_base,calibration,calibration_windows,"
    "calibration_window,eval_windows,window,value,source"
)
# calibration and evaluation of the smoke profile
ALIKE = "wikipedia,8,128,8,128"

# Typed from the papers once more, apart from the CSV: dense, 20, 25 and 30 %.
TABLE_1 = {
    "facebook/opt-125m": (27.64, 34.26, 37.74, 43.98),
    "facebook/opt-1.3b": (14.61, 16.43, 17.46, 19.09),
    "facebook/opt-2.7b": (12.46, 13.73, 14.56, 15.83),
    "facebook/opt-6.7b": (10.85, 11.48, 11.90, 12.51),
    "facebook/opt-13b": (10.12, 10.66, 10.94, 11.33),
    "facebook/opt-30b": (9.56, 9.87, 10.04, 10.27),
    "facebook/opt-66b": (9.33, 9.57, 9.68, 9.85),
    "meta-llama/Llama-2-7b-hf": (5.47, 6.64, 7.24, 8.12),
    "meta-llama/Llama-2-13b-hf": (4.88, 5.81, 6.30, 6.99),
    "meta-llama/Llama-2-70b-hf": (3.32, 4.25, 4.60, 5.05),
}
TABLE_6 = {  # constant, then by the eigenvalue spectrum
    "facebook/opt-6.7b": (12.10, 11.94),
    "facebook/opt-66b": (9.75, 9.63),
    "meta-llama/Llama-2-7b-hf": (6.84, 7.63),
    "meta-llama/Llama-2-70b-hf": (4.44, 4.63),
}
SLICES = (0.0, 0.2, 0.25, 0.3)


@pytest.fixture
def invented(tmp_path, monkeypatch):
    """A study of MODEL with results made for the purpose, and no published number yet."""
    monkeypatch.setattr(paths, "PUBLISHED", tmp_path / "published")
    monkeypatch.setattr(paths, "OUTPUT", tmp_path)
    paths.PUBLISHED.mkdir()
    return Invented(load("smoke", SETTINGS), Store(tmp_path), "cpu", from_record=True).fill()


def publish(*lines, header=HEADER, name="reader.csv"):
    (paths.PUBLISHED / name).write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")


def held(source):
    return [cell for cell in published.read() if source in cell.source]


def test_every_committed_number_is_read_and_has_a_source():
    no_cells = {paths.PUBLISHED / name for name in published.NO_CELLS}
    files = set(paths.PUBLISHED.glob("*.csv")) - no_cells
    assert len(published.read()) == sum(len(f.read_text().splitlines()) - 1 for f in files) > 50
    assert all(cell.source for cell in published.read())


def test_slicegpt_numbers_are_those_of_its_tables():
    table_1 = held("2401.15024), Table 1")
    found = {(cell.model, cell.slice_percentage): cell.value for cell in table_1}
    typed = {(m, sp): v for m, row in TABLE_1.items() for sp, v in zip(SLICES, row, strict=True)}
    assert found == typed
    assert len(table_1) == len(typed)
    sliced = [cell for cell in table_1 if cell.method != "dense"]
    assert {(c.calibration_windows, c.calibration_window) for c in sliced} == {(1024, 2048)}
    assert [(c.model, c.calibration_windows, c.value) for c in held("Table 5")] == [
        ("meta-llama/Llama-2-7b-hf", 128, value) for value in (6.86, 7.56, 8.64)
    ]
    assert [(c.model, c.value) for c in held("Table 6")] == [
        (model, value) for model, pair in TABLE_6.items() for value in pair
    ]
    assert [cell.method for cell in held("Table 6")][:2] == [
        "SliceGPT",
        "SliceGPT, eigenvalue spectrum",
    ]
    rerun = held("a third party's rerun")
    assert [(c.model, c.slice_percentage, c.value) for c in rerun] == [
        ("meta-llama/Llama-2-7b-hf", 0.2, 6.86),
        ("meta-llama/Llama-2-7b-hf", 0.25, 7.56),
        ("meta-llama/Llama-2-7b-hf", 0.3, 8.63),
        ("meta-llama/Llama-3.1-8B", 0.0, 6.24),
        ("meta-llama/Llama-3.1-8B", 0.2, 11.31),
        ("meta-llama/Llama-3.1-8B", 0.25, 13.79),
        ("meta-llama/Llama-3.1-8B", 0.3, 19.42),
    ]


def test_a_readers_number_stands_beside_ours_of_equal_settings(invented):
    publish(
        f"dynamic,{MODEL.lower()},perplexity,sotu test,0.3,0.1,{ALIKE},17.5,A paper",
        f"dense,{MODEL},perplexity,wikipedia test,0,,,,,8,128,9.5,A paper",
        f"SliceGPT,{MODEL},perplexity,sotu test,0.2,,{ALIKE},19.5,A paper",
    )
    table = published.table(invented)
    assert table["settings"].tolist() == ["equal"] * 3
    assert table["published"].tolist() == [17.5, 9.5, 19.5]
    dynamic = next(
        p for p in points(invented, "dynamic") if (p.slice_percentage, p.slice_base) == (0.3, 0.1)
    )
    asked = [
        (dynamic, "sotu"),
        (invented.points()[0], "wikipedia"),
        (points(invented, "constant")[0], "sotu"),
    ]
    assert table["ours"].tolist() == [
        invented.get(invented.perplexity_request(*what)).value["perplexity"] for what in asked
    ]
    assert "**3 of 3** rows" in published.page(table)
    assert "3 of them with equal settings" in published.page(table)
    style.save_table(table, invented, "published")
    saved = {path.suffix: path.read_text() for path in paths.figures(invented.name).iterdir()}
    assert set(saved) == {".csv", ".md", ".tex"}
    assert all("17.5" in text and "A paper" in text for text in saved.values())


@pytest.mark.parametrize(
    ("line", "settings"),
    [
        (
            "SliceGPT,{},perplexity,sotu test,0.3,,wikipedia,1024,128,8,,5,A",
            "calibration windows 1024, here 8; window not stated",
        ),
        (
            "SliceGPT,{},perplexity,sotu train,0.3,,ptb,8,128,all,128,5,A",
            "split train, here test; windows all, here 8; calibration ptb, here wikipedia",
        ),
        (
            "SliceGPT,{},perplexity,sotu test,0.3,,,,2048,8,2048,5,A",
            "window 2048, here 128; calibration window 2048, here 128; "
            "calibration, calibration windows not stated",
        ),
        ("dense,{},perplexity,sotu,0,,,,,8,128,5,A", "split not stated"),
        ("dense,{},perplexity,wikitext2 test,0,,,,,8,128,5,A", "wikitext2 test is not read here"),
        ("SliceGPT,{},perplexity,sotu test,0.25,,,,,8,128,5,A", "no such network here"),
        ("by spectrum,{},perplexity,sotu test,0.3,,,,,8,128,5,A", "no such network here"),
        (f"dynamic,{{}},perplexity,sotu test,0.3,0.3,{ALIKE},5,A", "equal"),  # SB = SP: constant
    ],
)
def test_what_differs_is_named(invented, line, settings):
    publish(line.format(MODEL))
    table = published.table(invented)
    assert table["settings"].tolist() == [settings]
    alone = settings == "no such network here" or settings.endswith("is not read here")
    assert table["ours"].isna().tolist() == [alone]


def test_a_dynamic_number_without_its_sb_joins_every_dynamic_network(invented):
    publish(f"dynamic,{MODEL},perplexity,sotu test,0.3,,{ALIKE},5,A")
    assert published.table(invented)["settings"].tolist() == ["SB not stated"] * 2


@pytest.mark.parametrize(
    ("name", "settings"),
    [("wikitext2-test.txt", "equal"), ("wikitext2.txt", "split test, here not known")],
)
def test_a_text_that_is_a_file_goes_by_its_name(invented, tmp_path, monkeypatch, name, settings):
    (tmp_path / name).write_text("words")
    monkeypatch.setitem(TEXT_LEVEL, str(tmp_path / name), 3.0)
    asked = {**SETTINGS, "eval_texts": [str(tmp_path / name)], "eval_split": None}
    of_a_file = Invented(load("smoke", asked), invented.store, "cpu", from_record=True).fill()
    publish(f"dense,{MODEL},perplexity,WikiText2 test,0,,,,,8,128,5,A")
    assert published.table(of_a_file)["settings"].tolist() == [settings]


def test_what_was_not_measured_is_no_number(invented):
    publish(f"dense,{MODEL},perplexity,sotu test,0,,,,,8,128,5,A")
    request = invented.perplexity_request(invented.points()[0], "sotu")
    (invented.store.folder / f"{request.key}.json").unlink()
    table = published.table(invented)
    assert table["ours"].isna().all()
    assert table["settings"].tolist() == ["not measured here"]


def test_nothing_joins_for_another_model(invented):
    publish(f"dense,{MODEL}-2,perplexity,sotu test,0,,,,,8,128,5,A")
    table = published.table(invented)
    assert table.empty
    assert published.page(table) == style.NONE
    style.save_table(table, invented, "published")  # writes nothing
    assert not (paths.figures("smoke") / "published.csv").exists()


def test_the_nearest_published_model_is_named_as_another(invented):
    line = f"dense,{MODEL}-2,perplexity,sotu test,0,,,,,8,128,5,A,Another/One; {MODEL}"
    publish(line, header=HEADER + ",nearest_for")
    table = published.table(invented)
    assert table["model"].tolist() == [f"{MODEL}-2"]
    assert table["settings"].tolist() == [f"model {MODEL}-2, here {MODEL}"]
    assert table["ours"].notna().all()


def test_accuracies_join_by_task_and_metric(invented):
    publish(
        f"SliceGPT,{MODEL},acc,piqa,0.3,,wikipedia,8,128,40,,60,A",
        f"SliceGPT,{MODEL},acc_norm,piqa,0.3,,wikipedia,8,128,40,,60,A",
        f"dense,{MODEL},acc,arc_easy,0,,,,,1000,,60,A",
        f"dense,{MODEL},acc,boolq,0,,,,,,,60,A",
        f"dense,{MODEL},perplexity,sotu test,0,,,,,8,128,5,A",
    )
    table = published.task_table(invented)
    assert table["settings"].tolist() == [
        "equal",
        "not measured here",  # the invented results have no acc_norm
        "items 1000, here all",
        "boolq is not read here",
    ]
    asked = invented.task_request(points(invented, "constant")[1], "piqa")
    result = invented.get(asked)
    assert table["ours"][0] == pytest.approx(100 * np.mean(result.value["correct"]))
    assert len(published.table(invented)) == 1
    without = replace(result, value={**result.value, "acc": None, "correct": None})  # as gsm8k has
    invented.store.put(without)
    assert published.task_table(invented)["settings"].tolist()[0] == "not measured here"
    drawn = load("smoke", {**SETTINGS, "task_subset": "stratified"})
    drawn = Invented(drawn, invented.store, "cpu", from_record=True).fill()
    settings = published.task_table(drawn)["settings"].tolist()
    assert [settings[0], settings[2]] == ["items 40, here 40 drawn", "items 1000, here all"]


GOOD = f"dense,{MODEL},perplexity,sotu test,0,,,,,8,128,5,A"


@pytest.mark.parametrize(
    ("header", "line", "said"),
    [
        (HEADER, GOOD.replace("perplexity", "ppl"), "line 3, column metric = 'ppl'"),
        (HEADER, GOOD.replace("test,0,", "test,30,"), "line 3, column slice_percentage = '30'"),
        (HEADER, GOOD.replace(",5,A", ",5;3,A"), "line 3, column value = '5;3'"),
        (HEADER, GOOD.replace(",5,A", ",0.5,A"), "line 3, column value = '0.5'"),
        (HEADER, GOOD.replace(",5,A", ",nan,A"), "line 3, column value = 'nan'"),
        (HEADER, GOOD.replace(",5,A", ",5,"), "line 3, column source = ''"),
        (HEADER, GOOD.replace(",8,128", ",some,128"), "line 3, column eval_windows = 'some'"),
        (HEADER, GOOD.replace("0,,", "0.2,0.3,", 1), "line 3, column slice_base = '0.3'"),
        (HEADER, GOOD + ", Table 2", "line 3 has more fields"),
        (HEADER, "dense," + MODEL, "line 3 has fewer fields"),
        (
            HEADER.replace("value", "perplexity"),
            GOOD,
            "line 1: column 'value' is missing, unknown or repeated",
        ),
        (HEADER.replace("window,", "windows,", 1), GOOD, "line 1: column 'calibration_windows'"),
        (HEADER + ",page", GOOD + ",3", "line 1: column 'page' is missing, unknown or"),
        (HEADER.replace(",", ";"), GOOD, "line 1: column 'method' is missing"),
        ("", GOOD, "line 1: column 'method' is missing"),
    ],
)
def test_a_malformed_file_is_refused_in_a_sentence(invented, header, line, said):
    publish(GOOD, line, header=header)
    with pytest.raises(RequestError) as refused:
        published.table(invented)
    message = str(refused.value)
    assert message.startswith("published file reader.csv, ")
    assert said in message
    assert "\n" not in message


def test_a_file_that_is_no_utf8_is_refused(invented):
    (paths.PUBLISHED / "reader.csv").write_bytes(f"{HEADER}\n{GOOD} caf\xe9\n".encode("latin-1"))
    with pytest.raises(RequestError, match=r"reader.csv, line \d+ or later, is no CSV in UTF-8 \("):
        published.read()


def test_a_spreadsheets_byte_order_mark_is_no_part_of_a_column(invented):
    (paths.PUBLISHED / "reader.csv").write_text(f"{HEADER}\n{GOOD}\n", encoding="utf-8-sig")
    assert [cell.value for cell in published.read()] == [5]
    assert style.rounded(published.table(invented))["SB"].tolist() == ["-"]


def test_a_stand_in_is_no_equal_setting(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "PUBLISHED", tmp_path / "published")
    paths.PUBLISHED.mkdir()
    settings = {**SETTINGS, "stand_ins": {"sotu": "mmlu"}}
    study = Invented(load("smoke", settings), Store(tmp_path), "cpu", from_record=True).fill()
    publish(f"SliceGPT,{MODEL},perplexity,sotu test,0.2,,{ALIKE},19.5,A paper")
    assert published.table(study)["settings"].tolist() == ["sotu read from mmlu"]


def test_a_number_on_validation_windows_joins_those_that_choose_sb(invented):
    windows = invented.profile.selection_windows
    publish(f"SliceGPT,{MODEL},perplexity,sotu validation,0.2,,wikipedia,8,128,{windows},128,19,A")
    [row] = published.table(invented).to_dict("records")
    constant = points(invented, "constant")[0]
    chosen = invented.get(invented.selection_request(constant)).value["perplexity"]
    assert (row["settings"], row["ours"]) == ("equal", chosen)
