"""The model card of what was made: what it is, how it was made, and how to load it."""

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from dynslice.core import assets
from dynslice.inputs.models import is_remote, resolve

_CITED = """\
Made with dynslice, which reproduces *Change Is the Only Constant: Dynamic LLM Slicing based on
Layer Redundancy* (Dumitru et al., Findings of EMNLP 2024, arXiv 2411.03513) and builds on SliceGPT
(Ashkboos et al., ICLR 2024, arXiv 2401.15024). Cite both, and the base model."""

_PAGE = """\
---
{data}
---

# {title}

{how}

| | |
|---|---|
{table}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("DIR"{code})
tokenizer = AutoTokenizer.from_pretrained("DIR"{code})
```

{why} It needs transformers 5 or newer: older versions read its rope theta as 10,000.

{cited}
"""


def model_card(recipe: dict, width: int, base: str, revision: str | None) -> str:
    """The README.md of a slice of a width; recipe: `slice.json`, base: as the command named it."""
    how = (
        "The residual stream of the base model was rotated and cut to fewer dimensions. "
        "`plan.json` holds the width of each layer, `slice.json` how the slice was made, with the "
        "hashes of what was sliced."
    )
    shown = {
        "with embedding and head apart": f"{recipe['parameters_untied']:,}",
        "recipe": f"{recipe['recipe']}, schedule {recipe['schedule']}",
        "compensation": "yes" if recipe["compensation"] else "no",
        "fine-tuning": f"{recipe['recovery']['steps']} steps" if recipe["recovery"] else "none",
    }
    if share := recipe["mlp_neurons_dropped"]:
        shown["neurons of each MLP dropped first"] = f"{share:g} of them"
    has_code = not recipe["layout"]["plain"]
    if not has_code and width % 32:
        how += f" Its width {width} is no multiple of 32: llama.cpp leaves most of it in 16 bits."
    return card("sliced", how, shown, recipe, base, revision, has_code)


def card(
    done: str,
    how: str,
    shown: dict[str, str],
    recipe: dict,
    base: str,
    revision: str | None,
    has_code: bool = False,
) -> str:
    """The README.md of a model that was made smaller, with the metadata that the hub reads.

    done: in a word; how: in sentences; shown: rows of the table besides those that all have;
    recipe: what is saved of how it was made. base: the model that it comes from, as the command
    named it. has_code: whether the directory brings a modelling file.
    """
    name, licence = recipe["model"], _licence(base, revision)
    data = ModelCardData(
        base_model=base if is_remote(base) else None,
        license=licence,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["dynslice", done, "compression"],
    )
    code = ", trust_remote_code=True" if has_code else ""
    why = (
        "Its modelling file comes with it (`trust_remote_code`)."
        if has_code
        else "It is a model of the library's own class."
    )
    commit = f", commit {recipe['commit']}" if recipe["commit"] else ""
    read = f"{recipe['windows']} windows of {recipe['window']} tokens"
    rows = {
        "base model": f"{name} (revision {revision or 'none'}{commit})",
        "licence": f"that of the base model: {licence or 'not stated there'}",
        "stored parameters": f"{recipe['parameters']:,} (before: {recipe['parameters_dense']:,})",
        **shown,
        "calibration": f"{recipe['calibration']}, {read}" if recipe["calibration"] else "none",
        "dtype": recipe["dtype"],
        "perplexity": "not measured yet; `dynslice ppl --model DIR --text TEXT` does that",
    }
    return _PAGE.format(
        data=data.to_yaml(),
        title=f"{Path(name).name}, {done}",
        how=how,
        table="\n".join(f"| {what} | {said} |" for what, said in rows.items()),
        code=code,
        why=why,
        cited=_CITED,
    )


def _licence(base: str, revision: str | None) -> str | None:
    """What the base model's card or the list of assets says; None where it can't be known."""
    kind, _, name = base.partition(":")
    known = {**assets.manifest(), **assets.in_parts()}.get(name) if kind == "embedded" else None
    if known:
        return known.licence.split()[0].rstrip(",;").lower()
    path = Path(resolve(base, revision)) / "README.md"
    if not path.is_file():
        return None
    return ModelCard.load(path, ignore_metadata_errors=True).data.get("license")
