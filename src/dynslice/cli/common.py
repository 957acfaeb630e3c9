"""What several commands do with their options; torch loads where it is needed, not for --help."""

import json
import os
from pathlib import Path
from typing import Any

from dynslice.core import files
from dynslice.core.errors import RequestError
from dynslice.core.paths import shown_path
from dynslice.method.plan import ModelDims


def given(options, *names: str) -> dict[str, Any]:
    """Some of the options by their names."""
    return {name: getattr(options, name) for name in names}


def listed(*typed: str) -> list[str]:
    """The names in texts with commas, whether or not there are spaces round them."""
    return [name.strip() for text in typed for name in text.split(",") if name.strip()]


def placed(options) -> tuple[Any, Any]:
    """The device and the dtype that are asked for."""
    from dynslice.core.tensors import pick_device, pick_dtype

    device = pick_device(options.device)
    return device, pick_dtype(options.dtype, device)


def loaded(options, dense_for: str | None = None) -> tuple[Any, Any]:
    """Model and tokenizer; dense_for: what a sliced model is refused for, by a RequestError."""
    from dynslice.inputs import models

    device, dtype = placed(options)
    if dense_for:
        dims(options, dense_for)
    spread = getattr(options, "spread", False)
    return models.load(options.model, device, dtype, options.revision, spread)


def saved_dtype(options) -> Any:
    """The dtype in which a slice is saved: what is asked for, or that of the model."""
    from dynslice.core.tensors import DTYPES
    from dynslice.inputs import models
    from dynslice.inputs.checkpoints import stored_dtype

    asked, (_, computed) = options.save_dtype, placed(options)
    if asked != "auto" or not options.model:
        return DTYPES.get(asked, computed)
    if stated := config_of(options, whole=True).dtype:
        return stated
    return stored_dtype(Path(models.resolve(options.model, options.revision)), options.model)


def config_of(options, whole: bool = False) -> Any:
    """The config of the model, without the neurons that go first; whole: with all of them."""
    from dynslice.inputs import models

    config, share = models.load_config(options.model, options.revision), None
    if not whole:
        share = getattr(options, "mlp_neurons", None)
    if share is None:
        return config
    from dynslice.extensions.neurons import narrower
    from dynslice.method.architectures import require_dense

    require_dense(config, "dropping neurons")
    return narrower(config, share)


def dims(options, dense_for: str | None = None, whole: bool = False) -> ModelDims:
    """The shape of the model, by its config alone; dense_for: see `loaded`, whole: `config_of`."""
    from dynslice.method.architectures import dims_of, require_dense

    config = config_of(options, whole)
    if dense_for:
        require_dense(config, dense_for)
    return dims_of(config)


def windows_of(options, text: str, split: str | None, tokenizer) -> Any:
    """The token windows of a text that are asked for."""
    from dynslice.inputs.windows import token_windows

    asked = (options.window, options.windows, options.seed)
    return token_windows(text, split, tokenizer, *asked, bos=options.bos)


def is_sampled(options) -> bool:
    """Whether the windows are a sample, and not the first ones of their text."""
    return options.seed is not None and options.windows is not None


def _is_device(path: Path) -> bool:
    """Whether a path is where the system keeps its devices; /dev/shm holds files."""
    return path.parts[1:2] in (("dev",), ("proc",)) and path.parts[1:3] != ("dev", "shm")


INPUTS = ("model", "text", "calibration", "lr", "plan", "match_parameters")


def check_output(options) -> None:
    """Refuse an output that cannot be written, or is an input, before the work for it starts."""
    path = options.out
    if path is None:
        return
    if "\0" in path:
        raise RequestError(f"output {path!r} is no name; name a file")
    place = Path(path).absolute()
    passed: set[Path] = set()
    while not (is_device := _is_device(place)) and place.is_symlink():
        if place in passed:
            raise RequestError(f"output {path!r} is a link that leads to itself; name a file")
        passed.add(place)
        place = place.parent / place.readlink()
    if is_device:
        raise RequestError(
            f"output {path!r} is a device; name a file, or use --json for standard output"
        )
    place = place.parent.resolve() / place.name
    for name in INPUTS:
        given = getattr(options, name, None)
        source = Path(given).resolve() if given and Path(given).exists() else None
        if source and (place == source or (place.exists() and source in place.parents)):
            raise RequestError(f"output {path!r} is what --{name} reads; name another file")
    folder = place.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise RequestError(
            f"output {path!r} cannot be written; make the folder {shown_path(folder)} or name "
            "another"
        )
    if place.exists() and not place.is_file():
        raise RequestError(f"output {path!r} is a folder or device; name a file")


def new_directory(options) -> Path:
    """Where --out is to be made. Raises RequestError where something is there."""
    out = Path(options.out).resolve()
    if out.exists():
        raise RequestError(f"output {options.out!r} exists already; name a new directory")
    check_output(options)
    return out


def recipe_of(options, result: dict) -> dict:
    """How something was made, which is saved with it: no places of this machine, only names."""
    from dynslice.inputs.models import commit_of

    names = given(options, "model", "calibration").items()
    is_here = {key: bool(x and Path(x).exists()) for key, x in names}
    recipe = {key: Path(x).resolve().name if is_here[key] else x for key, x in names}
    # In letters that a file can hold, whatever the locale made of the bytes of a name.
    recipe = {key: x and os.fsencode(x).decode(errors="replace") for key, x in recipe.items()}
    recipe |= given(options, "revision", "seed", "bos") | result
    recipe["commit"] = commit_of(options.model, options.revision)
    del recipe["out"]
    return recipe


def hashes(options) -> dict[str, str]:
    """The SHA-256 of each file of weights of the model."""
    from dynslice.inputs.checkpoints import weight_files
    from dynslice.inputs.models import resolve

    stored = weight_files(Path(resolve(options.model, options.revision)), options.model)
    return {path.name: files.sha256(path) for path in sorted({*stored.values()})}


def write_json(path: str | Path | None, values: dict) -> None:
    """Write the result where --out asks for it."""
    if path is not None:
        files.write(Path(path), json.dumps(values, indent=1) + "\n")
