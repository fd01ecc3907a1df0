import pytest
import torch

from profilers.base import ProfilerError
from profilers.text import DEFAULT_TEXT_NAME, TokenStream, default_text, token_stream


class WordTokenizer:
    """One id a word, in order of appearance; refuses special tokens so that none can slip in."""

    def __call__(self, text, add_special_tokens, verbose):
        assert add_special_tokens is False
        return {"input_ids": list(range(len(text.split())))}


def test_default_text_is_long_enough_for_long_contexts_and_ships_with_python():
    text = default_text()
    assert len(text) > 400_000
    assert default_text() == text
    assert 'The "try" statement' in text


def test_user_text_and_default_text_are_named():
    assert token_stream(WordTokenizer(), 10, "a b c").name == "user text"
    assert token_stream(WordTokenizer(), 10, "a b c").ids.tolist() == [0, 1, 2]
    default = token_stream(WordTokenizer(), 10)
    assert default.name == DEFAULT_TEXT_NAME
    assert default.ids.numel() == len(default_text().split())


@pytest.mark.parametrize("text", ["", "  \n "])
def test_text_without_tokens_is_refused(text):
    with pytest.raises(ProfilerError, match="no tokens.*--text"):
        token_stream(WordTokenizer(), 10, text)


def test_without_tokenizer_ids_are_random_seeded_and_say_so():
    one, same, other = (token_stream(None, 50, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.ids, same.ids) and not torch.equal(one.ids, other.ids)
    assert "random" in one.name
    assert one.ids.min() == 0 and one.ids.max() == 49 and one.ids.dtype == torch.long


def test_windows_are_evenly_spaced_pieces():
    stream = TokenStream(torch.arange(100), "numbers")
    windows = stream.windows(4, 10)
    assert windows.shape == (4, 10)
    assert windows[:, 0].tolist() == [0, 30, 60, 90]
    assert torch.equal(windows[3], torch.arange(90, 100))
    assert torch.equal(stream.windows(1, 100)[0], torch.arange(100))


def test_window_longer_than_the_text_is_refused():
    with pytest.raises(ProfilerError, match="100 tokens but 101 are needed"):
        TokenStream(torch.arange(100), "numbers").windows(1, 101)
