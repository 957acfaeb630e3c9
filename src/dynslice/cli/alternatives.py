"""What a user may pick instead of slicing: fewer layers, neurons or bits, as checkpoints."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from dynslice.cli import common
from dynslice.cli.plans import asked_parameters
from dynslice.core.errors import RequestError

# What makes something of a model, token windows and the dtype to save it in: the network, what
# saves it with a tokenizer in a folder, and facts.
Maker = Callable[[Any, Any, Any], tuple[Any, Callable[[Any, Path], None], dict]]

_MADE_BY = (
    "`made.json` holds how it was made, with the hashes of the weights that it was made from."
)


def drop_layers_command(options) -> tuple[dict, list[str]]:
    """Drop the layers of highest layer redundancy; an ordinary checkpoint is left."""
    if (options.layers is None) == (options.size is None):
        raise RequestError("give either --layers, how many go, or --size, what is left at most")
    if options.layers is not None:  # before anything is loaded
        from dynslice.extensions.layers import highest

        highest([0.0] * common.config_of(options).num_hidden_layers, options.layers)

    def make(model, windows, dtype):
        from dynslice.extensions import layers
        from dynslice.extensions.compensation import Compensation
        from dynslice.inputs.checkpoints import write

        count = options.layers
        if options.size:
            count = layers.within(model, int(asked_parameters(options, common.dims(options))))
        dropped = layers.chosen(model, windows, count, options.one_by_one)
        compensation = Compensation() if options.map else None
        made = layers.drop_layers(model, dropped, windows, compensation).to(dtype)
        facts = {"dropped_layers": dropped}
        facts |= {"ridges": compensation.chosen} if compensation else {}
        return made, partial(write, made), facts

    def words(result: dict) -> str:
        told = f"layers dropped: {', '.join(map(str, result['dropped_layers'])) or 'none'}"
        if (ridges := result.get("ridges")) is None:
            return told
        fitted = sum(ridge is not None for ridge in ridges)
        return f"{told}; fitted before {fitted} of {len(ridges)} gaps that have a layer before them"

    return _saved(options, make, words, "fewer layers", dense_for="dropping layers")


def drop_neurons(options) -> tuple[dict, list[str]]:
    """`slice` with --mlp-neurons and nothing else: an ordinary checkpoint with narrower MLPs."""

    def make(model, windows, dtype):
        from dynslice.extensions import neurons
        from dynslice.inputs.checkpoints import write

        made = neurons.drop_neurons(model, windows, options.mlp_neurons).to(dtype)
        return made, partial(write, made), {"mlp_neurons_dropped": options.mlp_neurons}

    def words(result: dict) -> str:
        return f"share of the neurons of each MLP dropped: {result['mlp_neurons_dropped']:g}"

    common.config_of(options)  # refuses a share that leaves none
    return _saved(options, make, words, "fewer neurons")


def quantize_command(options) -> tuple[dict, list[str]]:
    """Round the maps of a dense or sliced model to fewer bits, packed by compressed-tensors."""
    if (options.bits is None) == (options.by is None):
        raise RequestError("give either --bits, for all layers, or --by, for which get 4 and 8")
    for name in ("calibration", "share"):
        value = getattr(options, name)
        if options.bits and value is not None:
            raise RequestError(f"--{name} {value} is read by --by; leave it out")
    if options.by and not options.calibration:
        raise RequestError(f"--by {options.by} is measured on a text; give --calibration")
    share = 0.5 if options.share is None else options.share
    if not 0 <= share <= 1:
        raise RequestError(f"--share {share} is outside 0 to 1; give one such as 0.5")

    def make(model, windows, dtype):
        from dynslice.extensions import bits

        chosen = [options.bits] * model.config.num_hidden_layers
        if options.by:
            chosen = bits.bits_by(options.by, model, windows, share)
        packed = bits.quantize(model.to(dtype), chosen)
        return model, packed.save, {"bits": chosen}

    def words(result: dict) -> str:
        counts = {bits: result["bits"].count(bits) for bits in sorted({*result["bits"]})}
        told = ", ".join(f"{count} layers at {bits} bits" for bits, count in counts.items())
        return f"{told}: {result['weight_bytes'] / 1e6:,.1f} MB of weights"

    measured = {"lr": "layer redundancy", "overlap": "token overlap"}
    return _saved(options, make, words, "quantized", dense_for=measured.get(options.by))


def _saved(
    options,
    make: Maker,
    words: Callable[[dict], str],
    done: str,
    dense_for: str | None = None,
) -> tuple[dict, list[str]]:
    """Make something of the model, and save it where transformers can load it.

    words: a sentence of the facts; done: what was done, in a word; dense_for: see `common.loaded`.
    """
    from dynslice.cli.card import card
    from dynslice.core.tensors import peak_memory_bytes
    from dynslice.inputs import texts
    from dynslice.inputs.checkpoints import quiet, saving

    out, windows, text = common.new_directory(options), None, options.calibration
    split = text and texts.checked_split(text, None, "train")
    dtype = common.saved_dtype(options)
    model, tokenizer = common.loaded(options, dense_for)
    if text:
        windows = common.windows_of(options, text, split, tokenizer)
    dense = sum(p.numel() for p in model.parameters())
    start = time.perf_counter()
    with saving(out, is_new=True) as folder:
        network, save, facts = make(model, windows, dtype)
        seconds = time.perf_counter() - start
        with quiet():
            save(tokenizer, folder)
        result = {
            "out": options.out,
            "parameters": sum(p.numel() for p in network.parameters()),
            "parameters_dense": dense,
            **facts,
            "windows": 0 if windows is None else len(windows),
            "window": options.window,
            "dtype": str(dtype).removeprefix("torch."),
            "weight_bytes": sum(f.stat().st_size for f in folder.glob("*.safetensors")),
            "seconds": round(seconds, 3),
            "peak_memory_bytes": peak_memory_bytes(model.device),
        }
        recipe = common.recipe_of(options, result) | {"made_from_sha256": common.hashes(options)}
        common.write_json(folder / "made.json", recipe)
        has_code = any(folder.glob("*.py"))
        told = words(result)
        how = f"{told[0].upper()}{told[1:]}. {_MADE_BY}"
        page = card(done, how, {}, recipe, options.model, options.revision, has_code)
        (folder / "README.md").write_text(page, encoding="utf-8")
    line = (
        f"wrote {options.out}: {result['parameters']:,} stored parameters in {result['dtype']} "
        f"(of {dense:,}), made in {seconds:.1f} s"
    )
    return result, [line, words(result)]
