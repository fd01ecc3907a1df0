import random
import sys

import pytest
import torch

from profilers.base import ProfilerError
from profilers.text import DEFAULT_TEXT_NAME, TokenStream, adds_bos, default_text, split_texts, token_stream


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


# --- splits ---------------------------------------------------------------------------------------------------------


class Characters:
    """One id a character, and a BOS token where it is asked for."""

    bos_token_id = None

    def __init__(self, bos=None):
        self.bos_token_id = bos

    def __call__(self, text, add_special_tokens=True, verbose=True):
        start = [self.bos_token_id] if add_special_tokens and self.bos_token_id is not None else []
        return {"input_ids": start + [ord(character) for character in text]}


def runs(stream):
    """Return every run of 32 tokens, the slow way."""
    ids = stream.ids.tolist()
    return {tuple(ids[start : start + 32]) for start in range(len(ids) - 31)}


def split(calibration=None, evaluation=None, **options):
    return split_texts(Characters(), 0, calibration_text=calibration, evaluation_text=evaluation, **options)


def noise(length, seed):
    return "".join(random.Random(seed).choices("abcdefgh", k=length))


def test_the_default_text_gives_two_streams_that_share_no_run():
    found = split()
    assert not runs(found.calibration) & runs(found.evaluation)
    total = len(default_text())
    assert found.calibration.ids.numel() + found.evaluation.ids.numel() + found.removed_tokens == total
    assert found.evaluation.ids.numel() == total // 4
    # The text does repeat itself: a cut alone would not do.
    assert found.removed_tokens > 1_000
    assert f"{found.removed_tokens:,} tokens" in found.notes[0]
    version = f"Python {sys.version_info.major}.{sys.version_info.minor}"
    assert version in found.evaluation.name and "last 25%" in found.evaluation.name
    assert torch.equal(split().calibration.ids, found.calibration.ids)


def test_only_the_shared_spans_are_cut_out():
    shared, mine, theirs = noise(50, 1), noise(400, 2), noise(300, 3)
    found = split(mine[:200] + shared + mine[200:], theirs + shared)
    assert "".join(map(chr, found.calibration.ids.tolist())) == mine
    assert found.removed_tokens == 50
    assert found.evaluation.ids.numel() == 350


def test_a_run_of_31_tokens_is_not_shared_and_one_of_32_is():
    shared = noise(32, 1)
    assert split("X" + shared + noise(100, 2), noise(100, 3) + shared + "Y").removed_tokens == 32
    assert split("X" + shared[1:] + noise(100, 2), noise(100, 3) + shared[1:] + "Y").removed_tokens == 0


def test_cutting_until_nothing_is_shared():
    """Cutting one span joins its neighbours into another shared run."""
    inner, outer = noise(40, 1), noise(40, 2)
    found = split(noise(100, 3) + outer[:20] + inner + outer[20:] + noise(100, 4), inner + "Z" + outer)
    assert not runs(found.calibration) & runs(found.evaluation)
    assert found.removed_tokens == 80


def test_nothing_is_shared_by_texts_of_common_phrases():
    phrases = [noise(20, seed) for seed in range(8)]
    for seed in range(10):
        choose = random.Random(seed)
        found = split("".join(choose.choices(phrases[:6], k=60)), "".join(choose.choices(phrases[3:], k=20)))
        assert not runs(found.calibration) & runs(found.evaluation)
        assert found.removed_tokens > 0


def test_one_text_for_both_is_divided():
    text = noise(1_000, 1)
    found = split(text, text, calibration_name="a.txt", evaluation_name="a.txt")
    assert "".join(map(chr, found.calibration.ids.tolist())) == text[:750]
    assert "".join(map(chr, found.evaluation.ids.tolist())) == text[750:]
    assert (found.calibration.name, found.evaluation.name) == ("a.txt, first 75%", "a.txt, last 25%")
    assert "one text" in found.notes[0]


def test_the_default_calibration_text_does_not_depend_on_what_is_evaluated_on():
    found = split(None, noise(500, 1), evaluation_name="mine")
    assert torch.equal(found.calibration.ids, split().calibration.ids)
    assert found.evaluation.name == "mine" and found.removed_tokens == split().removed_tokens
    assert torch.equal(split(noise(500, 1), None).evaluation.ids, split().evaluation.ids)


def test_default_calibration_text_is_cut_where_the_users_text_quotes_it():
    quoted = default_text()[1_000:2_000]
    found = split(None, noise(100, 1) + quoted)
    assert not runs(found.calibration) & runs(found.evaluation)
    assert found.removed_tokens >= split().removed_tokens + 900


@pytest.mark.parametrize(
    ("calibration", "evaluation", "message"),
    [
        ("short", noise(100, 1), "the calibration text has 5 tokens but at least 32 are needed"),
        (noise(100, 1), "short", "the evaluation text has 5 tokens but at least 32 are needed"),
        (noise(100, 1) + "end", noise(100, 1), "has 3 tokens left once 100 shared ones are cut out but at least 32"),
    ],
)
def test_too_short_texts_are_refused(calibration, evaluation, message):
    with pytest.raises(ProfilerError, match=message):
        split(calibration, evaluation)


def test_without_tokenizer_both_streams_are_random_and_differ():
    found = split_texts(None, 50, seed=3)
    assert not runs(found.calibration) & runs(found.evaluation)
    assert "random" in found.evaluation.name and found.removed_tokens == 0
    assert torch.equal(found.evaluation.ids, split_texts(None, 50, seed=3).evaluation.ids)


def test_separate_windows_do_not_overlap_and_reach_the_end():
    stream = TokenStream(torch.arange(100), "numbers")
    windows = stream.separate_windows(4, 10)
    assert windows[:, 0].tolist() == [0, 30, 60, 90]
    for count, length in ((7, 14), (50, 2), (1, 100), (9, 11)):
        windows = stream.separate_windows(count, length)
        assert windows.shape == (count, length)
        assert windows.unique().numel() == count * length
    assert stream.separate_windows(99, 30).shape == (3, 30)
    with pytest.raises(ProfilerError, match="100 tokens but 101 are needed for one window"):
        stream.separate_windows(1, 101)


def test_whether_a_tokenizer_adds_bos():
    assert adds_bos(Characters(bos=1)) and not adds_bos(Characters()) and not adds_bos(None)
