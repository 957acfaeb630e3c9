"""Multiple-choice log-likelihoods that compute the context of an item's choices only once.

lm-eval asks for each choice apart, so `HFLM` runs the context as often as there are choices: on
HellaSwag four times. Here the choices of one context share a sequence (*tree attention*):

    tokens      [ context            | choice 1 less its last token | choice 2 ... | padding ]
    positions     0 ... c - 1          c, c + 1, ...                  c, c + 1, ...
    each sees     itself and before    the context, itself and before in its own choice

Imported where tasks run, because lm-eval's model module takes seconds.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from lm_eval.models.huggingface import HFLM
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from dynslice.core.errors import RequestError
from dynslice.core.tensors import check_token
from dynslice.evaluate.perplexity import has_plain_head, head_chunks

Tokens = tuple[int, ...]
Answer = tuple[float, bool]  # summed log-likelihood (nats), and whether greedy decoding gives it
_PADDING = -1

# What each tokenizer made of a context and a continuation: the networks of a study share both.
_ENCODED: WeakKeyDictionary = WeakKeyDictionary()


@dataclass(frozen=True)
class Layout:
    """One sequence of T tokens for a context and its continuations.

    ids, segments, positions: [T]; segment 0 is the context, j the j-th continuation.
    places: by continuation, the indices into the sequence at which its tokens are predicted.
    """

    context: Tokens
    continuations: list[Tokens]
    ids: list[int]
    segments: list[int]
    positions: list[int]
    places: list[list[int]]

    @classmethod
    def of(cls, context: Tokens, continuations: list[Tokens]) -> "Layout":
        """Lay the continuations out one after another; those of one token take no place."""
        c = len(context)
        ids, segments, positions, places = list(context), [0] * c, list(range(c)), []
        for segment, continuation in enumerate(continuations, start=1):
            start, length = len(ids), len(continuation) - 1
            ids += continuation[:-1]
            segments += [segment] * length
            positions += range(c, c + length)
            places.append([c - 1, *range(start, start + length)])
        return cls(context, continuations, ids, segments, positions, places)


class SharedContextLM(HFLM):
    """lm-eval's transformers model, with the context of several continuations computed once.

    Log-likelihoods equal HFLM's up to rounding: only work that it repeats is left out, and the
    head runs only where a token is predicted. What the layout cannot hold goes to HFLM itself.
    """

    contexts_cut = 0  # to the positions that the model has

    def _model_generate(self, context, *arguments, **options):
        check_token(self.model.config, int(context.max()))
        return super()._model_generate(context, *arguments, **options)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        known = _ENCODED.setdefault(self.tokenizer, {})
        pair = (context, continuation)
        if pair not in known:
            known[pair] = super()._encode_pair(context, continuation)
        return known[pair]

    def _loglikelihood_tokens(
        self, requests: list[tuple], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        """requests: ((context, continuation), context tokens, continuation tokens)."""
        for texts, *parts in requests:
            if not all(parts):
                raise RequestError(
                    f"the tokenizer gives no token for {texts[parts.index([])]!r} of a task; use "
                    "the one that belongs to the model, or leave the task out"
                )
        tokens = ([*context, *continuation] for _, context, continuation in requests)
        check_token(self.model.config, max(map(max, tokens), default=0))
        lengths = (len(context) + len(continuation) for _, context, continuation in requests)
        self.contexts_cut += sum(length > self.max_length + 1 for length in lengths)
        if not self._can_share(requests):
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        pairs = [self._truncated(context, continuation) for _, context, continuation in requests]
        answers = {}
        silent = disable_tqdm or self.rank != 0
        with tqdm(total=len(set(pairs)), desc="tasks", leave=False, disable=silent) as bar:
            for batch in _batches(_layouts(pairs), 1024 if self.device.type == "cpu" else 8192):
                scored = self._score(batch)
                answers.update(scored)
                bar.update(len(scored))
        for (texts, *_), pair in zip(requests, pairs, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answers[pair])
        return [answers[pair] for pair in pairs]

    def _can_share(self, requests: list[tuple]) -> bool:
        config = self.model.config
        longest = max((len(ctx) + len(cont) - 1 for _, ctx, cont in requests), default=0)
        window = getattr(config, "sliding_window", None)
        return (
            self.backend == "causal"
            and has_plain_head(config)
            # The others take no mask of four dimensions.
            and config._attn_implementation in ("eager", "sdpa")
            # Our mask replaces the model's own, so a window must not cut anything off.
            and (window is None or min(longest, self.max_length) <= window)
            # Rolling requests name no texts: a document's windows, with next to nothing in common.
            and all(texts is not None for texts, *_ in requests)
        )

    def _truncated(self, context: list[int], continuation: list[int]) -> tuple[Tokens, Tokens]:
        """Keep the last max_length + 1 tokens, as HFLM does; the last is never an input.

        Raises RequestError where the continuation alone is longer.
        """
        if len(continuation) > self.max_length:
            raise RequestError(
                f"a continuation of {len(continuation)} tokens is longer than the "
                f"{self.max_length} positions of the model; leave the task out"
            )
        room = self.max_length + 1 - len(continuation)
        return tuple(context[-room:]), tuple(continuation)

    @torch.inference_mode()
    def _score(self, batch: list[Layout]) -> dict[tuple[Tokens, Tokens], Answer]:
        hidden = self.model.base_model(**self._inputs(batch), use_cache=False).last_hidden_state
        pairs = [(layout.context, cont) for layout in batch for cont in layout.continuations]
        rows = [i for i, layout in enumerate(batch) for p in layout.places for _ in p]
        columns = [place for layout in batch for places in layout.places for place in places]
        targets = [token for _, continuation in pairs for token in continuation]
        rows, columns, targets = (
            torch.tensor(part, device=self.device) for part in (rows, columns, targets)
        )

        log_p, greedy = [], []
        for logits, target in head_chunks(self.model, hidden[rows, columns], targets):
            log_p.append(logits.log_softmax(-1).gather(1, target[:, None])[:, 0])
            greedy.append(logits.argmax(-1) == target)
        lengths = [len(continuation) for _, continuation in pairs]
        log_p, greedy = (torch.cat(parts).cpu().split(lengths) for parts in (log_p, greedy))
        answers = [(float(p.sum()), bool(g.all())) for p, g in zip(log_p, greedy, strict=True)]
        return dict(zip(pairs, answers, strict=True))

    def _inputs(self, batch: list[Layout]) -> dict[str, torch.Tensor]:
        """ids and positions [b, T], and what is added to attention scores [b, 1, T, T]."""

        def padded(rows: list[list[int]], value: int) -> torch.Tensor:
            return pad_sequence([torch.tensor(row) for row in rows], True, value).to(self.device)

        segments = padded([layout.segments for layout in batch], _PADDING)
        visible, dtype = _visible(segments)[:, None], self.model.dtype
        mask = torch.zeros(visible.shape, dtype=dtype, device=self.device)
        return {
            "input_ids": padded([layout.ids for layout in batch], 0),
            "position_ids": padded([layout.positions for layout in batch], 0),
            "attention_mask": mask.masked_fill(~visible, torch.finfo(dtype).min),
        }


def _visible(segments: torch.Tensor) -> torch.Tensor:
    """Segments [b, T] -> whether query q sees key k, [b, T, T].

    Every query sees itself, padding too: a row that sees nothing would turn into NaN.
    """
    query, key = segments[:, :, None], segments[:, None, :]
    return ((key == 0) | (key == query)).tril()


def _layouts(pairs: list[tuple[Tokens, Tokens]]) -> list[Layout]:
    """One layout for each context, with each of its continuations once."""
    groups: dict[Tokens, dict[Tokens, None]] = {}
    for context, continuation in pairs:
        groups.setdefault(context, {})[continuation] = None
    return [Layout.of(context, list(continuations)) for context, continuations in groups.items()]


def _batches(layouts: list[Layout], tokens: int) -> Iterator[list[Layout]]:
    """Layouts of like length, the longest first: at most `tokens` a batch, padding included."""
    rest = sorted(layouts, key=lambda layout: -len(layout.ids))
    while rest:
        size = max(1, tokens // len(rest[0].ids))
        yield rest[:size]
        rest = rest[size:]
