"""Whether a profile asks for what can be had, before anything heavy starts."""

from pathlib import Path

from dynslice.core.errors import RequestError
from dynslice.experiment.profile import Profile
from dynslice.experiment.requests import split_for, texts_of
from dynslice.experiment.study import Study


def check_study(study: Study) -> None:
    """Refuse a study that cannot run before anything heavy starts. Raises RequestError."""
    check_settings(study.profile)
    check_inputs(study)


def check_settings(settings: Profile) -> None:
    """The part that takes no time: what the settings say of model, plans and texts."""
    from dynslice.core.tensors import check_window
    from dynslice.inputs import models
    from dynslice.method.architectures import dims_of, require_dense
    from dynslice.method.plan import constant

    _check_texts(settings)
    config = models.load_config(settings.model, settings.model_revision)
    require_dense(config, "a study")
    shape = dims_of(config)
    shares = [*settings.slice_percentages, *settings.task_slice_percentages]
    shares += [*settings.speed_slice_percentages, settings.figure_slice_percentage]
    shares += [settings.ablation_slice_percentage or 0.0, settings.single_layer_slice or 0.0]
    for share in shares:
        constant(shape, share, settings.round_to)
    models.check_weights(settings.model, settings.model_revision)
    for window in ("lr_window", "calibration_window", "eval_window", "speed_window"):
        check_window(config, getattr(settings, window))
    if settings.recovery_steps:
        check_window(config, settings.recovery_window)
    for round_to in settings.ablation_round_to:
        constant(shape, settings.ablation_slice_percentage or 0.0, round_to)


def check_inputs(study: Study) -> None:
    """The rest: tasks must be there, and texts hold the windows asked of them."""
    from dynslice.evaluate import task_table
    from dynslice.inputs import models, texts
    from dynslice.inputs.windows import consecutive_windows, token_stream

    settings = study.profile
    task_table.check_data(list(settings.tasks))
    longest: dict[tuple, tuple] = {}
    read = [part for request in study.requests() for part in texts_of(request.config)]
    for config in (part for part in read if "windows" in part):
        count, window = config["windows"], config["window"]
        count = count and count + config.get("skip", 0)
        asked = ((count or 1) * window, window, count)
        text = texts.source_of(config)
        longest[text] = max(longest.get(text, asked), asked, key=lambda a: a[0])
    tokenizer = models.load_tokenizer(settings.model, settings.model_revision)
    for (text, split, revision), (tokens, window, count) in longest.items():
        stream = token_stream(text, split, tokenizer, tokens, revision=revision)
        consecutive_windows(stream, window, count, text)


def _check_texts(settings: Profile) -> None:
    """What is calibrated on, what chooses and what is reported must not share a document."""
    from dynslice.inputs import texts

    def source(text: str, split: str | None) -> tuple[str, str | None]:
        text = settings.stand_ins.get(text, text)
        split = split_for(text, split)
        texts.check(text, split)
        of_files = bool(texts.files_of(text, split))
        name = str(Path(text).resolve()) if of_files else text
        return name, texts.default_split(text, split)

    read = {
        source(text, "train"): "calibrated on"
        for text in (settings.calibration_text, *settings.ablation_calibration_texts)
    }
    for text in (settings.lr_text, *settings.lr_compare_texts):
        read.setdefault(source(text, settings.lr_split), "what LR is measured on")
    if settings.selection_windows is not None:
        chooser = source(settings.eval_texts[0], "validation")
        read.setdefault(
            chooser, f"what selection_windows {settings.selection_windows} choose SB on"
        )
    measured = {"sensitivity", "search"} & set(settings.beyond_schedules)
    if settings.beyond_slice_percentages and measured:
        chooser = source(settings.eval_texts[0], "validation")
        read.setdefault(chooser, "what schedules of notebook 07 are measured on")
    for setting in ("calibration_text", "lr_text"):
        text = getattr(settings, setting)
        if settings.stand_ins.get(text, text) == "wikipedia" and "boolq" in settings.tasks:
            raise RequestError(
                f"{setting} 'wikipedia' holds the passages of task boolq; give {setting} another "
                "text, or leave boolq out of tasks"
            )
    for text in settings.eval_texts:
        if use := read.get(source(text, settings.eval_split)):
            raise RequestError(
                f"text {text!r} with eval_split {settings.eval_split} would be reported, but is "
                f"{use}; give eval_texts a text of its own, or a corpus the eval_split test"
            )
