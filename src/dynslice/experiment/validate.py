"""Whether a profile asks for what is available, before anything heavy starts."""

from pathlib import Path

from dynslice.core.errors import RequestError
from dynslice.experiment.profile import Profile
from dynslice.experiment.requests import split_for, texts_of
from dynslice.experiment.study import Study
from dynslice.inputs import texts
from dynslice.method.plan import constant


def check_study(study: Study) -> None:
    """Refuse a study that cannot run before anything heavy starts. Raises RequestError."""
    check_settings(study.profile)
    check_inputs(study)


def check_settings(settings: Profile) -> None:
    """The part that takes no time: what the settings say of model, plans and texts."""
    from dynslice.core.tensors import check_window
    from dynslice.inputs import models
    from dynslice.method.architectures import dims_of, require_dense

    p = settings
    _check_texts(p)
    config = models.load_config(p.model, p.model_revision)
    require_dense(config, "a study")
    ablated = p.ablation_slice_percentage or 0.0
    shares = [*p.slice_percentages, *p.task_slice_percentages, *p.speed_slice_percentages]
    shares += [p.figure_slice_percentage, ablated, p.single_layer_slice or 0.0]
    asked = [(share, p.round_to) for share in shares]
    dims = dims_of(config)
    for share, round_to in (*asked, *((ablated, unit) for unit in p.ablation_round_to)):
        constant(dims, share, round_to)
    models.check_weights(p.model, p.model_revision)
    windows = [p.lr_window, p.calibration_window, p.eval_window, p.speed_window]
    for window in [*windows, *([p.recovery_window] if p.recovery_steps else [])]:
        check_window(config, window)


def check_inputs(study: Study) -> None:
    """The rest: tasks must be there, and texts hold the windows asked of them."""
    from dynslice.evaluate import task_table
    from dynslice.inputs import models
    from dynslice.inputs.windows import consecutive_windows, first_token, token_stream

    settings = study.profile
    task_table.check_data(list(settings.tasks))
    longest: dict[tuple, tuple] = {}
    read = [part for request in study.requests() for part in texts_of(request.config)]
    for config in (part for part in read if "windows" in part):
        count, window = config["windows"], config["window"]
        asked = ((count or 1) * window, window, count)
        text = texts.source_of(config)
        longest[text] = max(longest.get(text, asked), asked, key=lambda a: a[0])
    tokenizer = models.load_tokenizer(settings.model, settings.model_revision)
    first = first_token(tokenizer, settings.bos)
    for (text, split, revision), (tokens, window, count) in longest.items():
        stream = token_stream(text, split, tokenizer, tokens, revision=revision)
        consecutive_windows(stream, window, count, text, first=first)


def _check_texts(p: Profile) -> None:
    """What is calibrated on, what chooses and what is reported must not share a document."""

    def source(text: str, split: str | None) -> tuple[str, str | None]:
        text = p.stand_ins.get(text, text)
        split = split_for(text, split)
        texts.check(text, split)
        name = str(Path(text).resolve()) if texts.files_of(text, split) else text
        return name, texts.default_split(text, split)

    calibrated = (p.calibration_text, *p.ablation_calibration_texts)
    uses = [(text, "train", "calibrated on") for text in calibrated]
    for text in (p.lr_text, *p.lr_compare_texts):
        uses.append((text, p.lr_split, "what LR is measured on"))
    chooser = (p.eval_texts[0], "validation")
    if p.selection_windows is not None:
        uses.append((*chooser, f"what selection_windows {p.selection_windows} choose SB on"))
    read = {source(text, split): use for text, split, use in reversed(uses)}  # the first use wins
    for setting in ("calibration_text", "lr_text"):
        text = getattr(p, setting)
        if p.stand_ins.get(text, text) == "wikipedia" and "boolq" in p.tasks:
            raise RequestError(
                f"{setting} 'wikipedia' holds the passages of task boolq; give {setting} another "
                "text, or leave boolq out of tasks"
            )
    for text in p.eval_texts:
        if use := read.get(source(text, p.eval_split)):
            raise RequestError(
                f"text {text!r} with eval_split {p.eval_split} would be reported, but is "
                f"{use}; give eval_texts a text of its own, or a corpus the eval_split test"
            )
