"""Texts as token streams, and windows of them.

A stream holds no special tokens. Models that were trained with a start-of-sequence token (BOS) at
the start of each sequence are given one at the start of each window.
"""

from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from dynslice.core.errors import RequestError
from dynslice.inputs.texts import documents

BOS = ("auto", "always", "never")


def token_stream(
    text: str,
    split: str | None,
    tokenizer: PreTrainedTokenizerBase,
    limit: int | None = None,
    seed: int | None = None,
    revision: str | None = None,
) -> torch.Tensor:
    """The token ids [n] of a text: its documents in order, a blank line after each.

    limit: stop after that many tokens. seed: shuffle the documents first, so that a limited stream
    samples the whole split. Raises RequestError as `documents`, and when there is no token.
    """
    texts = documents(text, split, revision)
    if seed is not None:
        texts = [texts[i] for i in np.random.default_rng(seed).permutation(len(texts))]
    stream = np.fromiter(islice(_tokens(texts, tokenizer), limit), np.int64)
    if not len(stream):
        raise RequestError(f"text {text!r} holds no tokens; give a text with words in it")
    return torch.from_numpy(stream)


def first_token(tokenizer: PreTrainedTokenizerBase, bos: str = "auto") -> int | None:
    """The token that each window starts with; None where they start with the text.

    bos: `auto` is BOS where the tokenizer puts it before a text, `always`, or `never`. Raises
    RequestError for another word, and where there is no BOS to always start with.
    """
    if bos not in BOS:
        raise RequestError(f"bos {bos!r} is unknown; use {', '.join(BOS)}")
    token = tokenizer.bos_token_id
    if bos == "always" and token is None:
        raise RequestError("bos 'always' needs a tokenizer with such a token; use auto or never")
    # Of an empty text: one without a token for a letter would give nothing, or BOS, for that.
    is_added = token is not None and tokenizer("")["input_ids"][:1] == [token]
    return token if bos == "always" or (bos == "auto" and is_added) else None


def starting(windows: torch.Tensor, first: int | None) -> torch.Tensor:
    """Windows [n, T - 1] with a first token before each: [n, T]; as they are without one."""
    if first is None:
        return windows
    return torch.cat([windows.new_full((len(windows), 1), first), windows], dim=1)


def consecutive_windows(
    stream: torch.Tensor,
    window: int,
    count: int | None,
    name: str,
    first: int | None = None,
) -> torch.Tensor:
    """The first `count` (None: all) consecutive non-overlapping windows [count, window].

    first: the token before each, which counts (`first_token`). A last short block is
    dropped. Raises RequestError when there are too few.
    """
    window -= first is not None
    have = len(stream) // window
    if have < (count or 1):
        wanted = f"{count} windows" if count else "one window"
        raise RequestError(
            f"text {name!r} holds {len(stream)} tokens, fewer than {wanted} of {window}; use a "
            "longer text, a smaller --window or fewer --windows"
        )
    have = count or have
    return starting(stream[: have * window].view(have, window), first)


def token_windows(
    text: str,
    split: str | None,
    tokenizer: PreTrainedTokenizerBase,
    window: int,
    count: int | None,
    seed: int | None = None,
    revision: str | None = None,
    bos: str = "auto",
) -> torch.Tensor:
    """Token windows [count, window] of a text, as `sample_windows` takes them.

    bos: see `first_token`.
    """
    limit = None if seed is not None or count is None else count * window
    first = first_token(tokenizer, bos)
    stream = token_stream(text, split, tokenizer, limit, revision=revision)
    return sample_windows(stream, window, count, seed, text, first=first)


def sample_windows(
    stream: torch.Tensor,
    window: int,
    count: int | None,
    seed: int | None,
    name: str,
    first: int | None = None,
) -> torch.Tensor:
    """`count` (None: all) token windows [count, window] of a stream [n].

    Without a seed: the first consecutive blocks. With one: sampled from all blocks without
    replacement. first: see `consecutive_windows`.
    """
    chosen = consecutive_windows(stream, window, count, name, first)
    if seed is None or count is None:
        return chosen
    every = consecutive_windows(stream, window, None, name, first=first)
    order = np.random.default_rng(seed).permutation(len(every))[:count]
    return every[torch.from_numpy(np.sort(order))]


def sliding_windows(
    stream: torch.Tensor, window: int, stride: int, first: int | None = None
) -> torch.Tensor:
    """Overlapping windows [n, window] every `stride` tokens; a short text is one short window.

    first: see `consecutive_windows`. Tokens after the last full window are dropped. Raises
    RequestError for fewer than 2 tokens.
    """
    if len(stream) < 2:
        raise RequestError(f"the text holds {len(stream)} token; LR needs at least 2")
    window = min(window - (first is not None), len(stream))
    return starting(stream.unfold(0, window, min(stride, len(stream))), first)


def _tokens(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[int]:
    for start in range(0, len(texts), 16):  # the tokenizer works on them in parallel
        part = [text + "\n\n" for text in texts[start : start + 16]]
        for ids in tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]:
            yield from ids
