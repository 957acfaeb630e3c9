"""Texts, splits and windows."""

import pytest
import torch
from prose import paragraphs
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from dynslice.core import assets
from dynslice.core.errors import RequestError
from dynslice.inputs import corpora, models, texts
from dynslice.inputs.windows import consecutive_windows, first_token, token_stream, token_windows


@pytest.fixture(scope="module")
def tokenizer():
    """Reads bytes, so that a token is a byte."""
    return models.load("embedded:tiny-random", torch.device("cpu"), torch.float32)[1]


@pytest.fixture(scope="module", autouse=True)
def fetched():
    assets.fetch()


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(paragraphs(20), encoding="utf-8")
    return str(path)


def rows(windows):
    return [tuple(row) for row in windows.tolist()]


def test_tokens_are_the_document_and_a_blank_line(text, tokenizer):
    stream = token_stream(text, None, tokenizer)
    assert tokenizer.decode(stream) == paragraphs(20) + "\n\n"


def test_documents_follow_each_other_between_blank_lines(tokenizer):
    first, second = texts.documents("wikipedia", "test")[:2]
    stream = token_stream("wikipedia", "test", tokenizer, limit=len((first + second).encode()))
    assert f"{first}\n\n{second}\n\n".startswith(tokenizer.decode(stream))


def test_seed_shuffles_documents(tokenizer):
    plain, one, again, two = (
        token_stream("wikipedia", "test", tokenizer, limit=500, seed=seed)
        for seed in (None, 1, 1, 2)
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, plain)
    assert not torch.equal(one, two)


def of_words(words, begins):
    """A tokenizer that gives nothing for a word it lacks, unless it has <unk>."""
    vocabulary = {word: i for i, word in enumerate(words)}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<s>" if "<unk>" in words else None))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if begins:
        backend.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("words", [["<s>", "b"], ["<s>", "<unk>", "b"]], ids=str)
def test_a_tokenizer_without_the_letter_tells_whether_it_begins_texts(words, begins):
    """The second gives BOS for what it does not know."""
    assert first_token(of_words(words, begins)) == (0 if begins else None)


def test_blocks_are_consecutive_and_the_last_short_one_is_dropped():
    blocks = consecutive_windows(torch.arange(26), 8, None, "numbers")
    assert torch.equal(blocks, torch.arange(24).view(3, 8))


def test_count_takes_the_first_blocks(text, tokenizer):
    every = token_windows(text, None, tokenizer, 64, None)
    assert len(every) == len(paragraphs(20) + "\n\n") // 64
    assert torch.equal(token_windows(text, None, tokenizer, 64, 5), every[:5])


@pytest.mark.parametrize("seed", [None, 3])
def test_too_few_windows_is_refused_naming_the_text(text, tokenizer, seed):
    length = len(paragraphs(20)) + 2
    with pytest.raises(
        RequestError, match=rf"{text}' holds {length} tokens, fewer than 200 windows of 64"
    ):
        token_windows(text, None, tokenizer, 64, 200, seed)


def test_text_shorter_than_one_window_is_refused(text, tokenizer):
    with pytest.raises(RequestError, match="fewer than one window of 9999"):
        token_windows(text, None, tokenizer, 9999, None)


def test_sampled_windows_are_distinct_reproducible_blocks_of_the_text(text, tokenizer):
    every = rows(token_windows(text, None, tokenizer, 64, None))
    assert len(set(every)) == len(every)
    sampled = rows(token_windows(text, None, tokenizer, 64, 100, seed=7))
    assert len(set(sampled)) == 100
    assert set(sampled) < set(every)
    assert rows(token_windows(text, None, tokenizer, 64, 100, seed=7)) == sampled
    assert rows(token_windows(text, None, tokenizer, 64, 100, seed=8)) != sampled
    assert sampled != every[:100]


BAD_FILES = {
    "empty": (b"", "is empty"),
    "blank": (b" \n\t\n", "is empty"),
    "binary": (b"PK\x03\x04\x00\x00", "is binary .*NUL"),
    "latin-1": ("caf\u00e9 au lait".encode("latin-1"), r"is not UTF-8 \(byte 3\)"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_file_that_is_no_text_is_refused(name, tmp_path, tokenizer):
    content, message = BAD_FILES[name]
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(RequestError, match=f"text.txt' {message}"):
        token_stream(str(path), None, tokenizer)


@pytest.mark.parametrize("name", ["no-such-text", "very long " * 500])
def test_name_of_nothing_is_refused(name):
    with pytest.raises(
        RequestError, match=r"neither a corpus \(sotu, .*, pg19\) nor a file or directory"
    ):
        texts.check(name, None)


def test_file_has_no_splits(text):
    with pytest.raises(RequestError, match="is a file and has no splits"):
        texts.check(text, "test")


def test_unknown_split_is_refused():
    with pytest.raises(RequestError, match="split 'dev' is unknown; use train, validation, test"):
        texts.check("sotu", "dev")


@pytest.mark.parametrize("name", corpora.CORPORA)
def test_splits_hold_documents_each_once(name):
    splits = [texts.documents(name, split) for split in texts.SPLITS]
    every = [document for split in splits for document in split]
    assert all(split for split in splits)
    assert len(set(every)) == len(every)


def test_wikipedia_splits_share_no_long_sentence():
    seen = {}
    for split in texts.SPLITS:
        for passage in texts.documents("wikipedia", split):
            for sentence in passage.split(". "):
                if len(sentence) > 40:
                    assert seen.setdefault(sentence, split) == split


def test_corpus_without_a_split_is_its_validation_text():
    assert texts.documents("sotu", None) == texts.documents("sotu", "validation")
