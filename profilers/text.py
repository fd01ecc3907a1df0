"""Text to measure on: the user's, or one that every Python has; and text to calibrate on that shares nothing with it.

::

    calibration text ──> tokens ──> spans that the evaluation text has too are cut out ──> TextSplit.calibration
    evaluation text  ──> tokens ─────────────────────────────────────────────────────────> TextSplit.evaluation

Two streams share nothing when no run of 32 tokens occurs in both.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import TYPE_CHECKING

from profilers.base import ProfilerError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

DEFAULT_TEXT_NAME = "Python language reference (pydoc_data.topics)"

SHARED_RUN_TOKENS = 32
"""A run of this many tokens that two texts both have counts as shared; a power of two."""

EVALUATION_SHARE = 0.25
"""Share of a text, its end, that is evaluated on where the same text is calibrated on."""

RANDOM_TOKENS = 1 << 18
"""Length of a stream of random tokens."""

# An odd multiplier near 2^64 / golden ratio, as a signed number: arithmetic is modulo 2^64.
_HASH_MULTIPLIER = -7_046_029_254_386_353_131


@dataclass(frozen=True)
class TokenStream:
    """One long run of token ids, without special tokens, and where it came from.

    Attributes
    ----------
    ids : torch.Tensor
        Shape (N,), int64, on the CPU.
    name : str
        What the text was, for the report.
    """

    ids: torch.Tensor
    name: str

    def windows(self, count: int, length: int) -> torch.Tensor:
        """Return ``count`` evenly spaced windows of ``length`` tokens, shape (count, length).

        Raises
        ------
        ProfilerError
            If the text is shorter than one window.
        """
        import torch

        total = self.ids.numel()
        if total < length:
            raise ProfilerError(
                f"the text has {total} tokens but {length} are needed in one piece; give a longer --text or a shorter "
                "--context"
            )
        starts = torch.linspace(0, total - length, count).long()
        return torch.stack([self.ids[start : start + length] for start in starts.tolist()])

    def separate_windows(self, count: int, length: int) -> torch.Tensor:
        """Return ``count`` evenly spaced windows that do not overlap, or as many as there are; shape (n, length).

        Raises
        ------
        ProfilerError
            If the text is shorter than one window.
        """
        import torch

        total = self.ids.numel()
        count = min(count, total // length)
        if count < 1:
            raise ProfilerError(
                f"the text to evaluate on has {total} tokens but {length} are needed for one window; give a longer "
                "text or a shorter context"
            )
        starts = torch.arange(count) * (total - length) // max(1, count - 1)
        return torch.stack([self.ids[start : start + length] for start in starts.tolist()])


@dataclass(frozen=True)
class TextSplit:
    """Text to calibrate on and text to evaluate on, of which no run of 32 tokens occurs in both.

    Attributes
    ----------
    calibration, evaluation : TokenStream
    removed_tokens : int
        Tokens cut out of the calibration text because the evaluation text has them too.
    notes : tuple of str
        What was done to the texts, one line each.
    """

    calibration: TokenStream
    evaluation: TokenStream
    removed_tokens: int
    notes: tuple[str, ...]


def default_text() -> str:
    """Return the text of Python's language reference, which every CPython ships."""
    from pydoc_data import topics

    return "\n\n".join(topics.topics[key] for key in sorted(topics.topics))


def token_stream(
    tokenizer: PreTrainedTokenizerBase | None, vocabulary_size: int, text: str | None = None, seed: int = 0
) -> TokenStream:
    """Tokenize ``text`` (``None``: the default text) without special tokens.

    Without a tokenizer the ids are random and the name says so.

    Raises
    ------
    ProfilerError
        If the text holds no tokens.
    """
    import torch

    if tokenizer is None:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, vocabulary_size, (RANDOM_TOKENS,), generator=generator)
        return TokenStream(ids, "random tokens (the model has no tokenizer)")
    name = DEFAULT_TEXT_NAME if text is None else "user text"
    encoded = tokenizer(default_text() if text is None else text, add_special_tokens=False, verbose=False)
    ids = torch.tensor(encoded["input_ids"], dtype=torch.long)
    if ids.numel() == 0:
        raise ProfilerError("the text has no tokens; give a --text file that is not empty")
    return TokenStream(ids, name)


def adds_bos(tokenizer: PreTrainedTokenizerBase | None) -> bool:
    """Return whether the tokenizer starts every text with a BOS token unless told otherwise."""
    if tokenizer is None or tokenizer.bos_token_id is None:
        return False
    first = tokenizer("a", verbose=False)["input_ids"][:1]
    return list(first) == [tokenizer.bos_token_id]


def split_texts(
    tokenizer: PreTrainedTokenizerBase | None,
    vocabulary_size: int,
    *,
    calibration_text: str | None = None,
    evaluation_text: str | None = None,
    seed: int = 0,
    calibration_name: str = "user text",
    evaluation_name: str = "user text",
) -> TextSplit:
    """Tokenize a text to calibrate on and one to evaluate on, and cut out of the first what the second has too.

    Where both are the same text, its last quarter is for evaluation and the rest for calibration; the default text is
    divided so in any case, so that what is calibrated on does not depend on what is evaluated on.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase or None
        Without one, both streams are random tokens, with different seeds.
    vocabulary_size : int
        For random tokens.
    calibration_text, evaluation_text : str or None
        ``None`` means the default text.
    seed : int
        Of random tokens; nothing else is random.
    calibration_name, evaluation_name : str
        What the texts are called in reports.

    Returns
    -------
    TextSplit

    Raises
    ------
    ProfilerError
        If fewer than 32 tokens are left on either side.
    """
    notes: list[str] = []
    removed = 0
    if tokenizer is None:
        calibration = token_stream(None, vocabulary_size, seed=seed)
        evaluation = token_stream(None, vocabulary_size, seed=seed + 1)
    elif calibration_text == evaluation_text:
        names = (_default_name(),) * 2 if calibration_text is None else (calibration_name, evaluation_name)
        calibration, evaluation = _parts(token_stream(tokenizer, vocabulary_size, calibration_text).ids, *names)
        if calibration_text is not None:
            notes.append("calibration and evaluation are parts of one text, so they are alike in style and subject")
    elif calibration_text is None:
        head, tail = _parts(token_stream(tokenizer, vocabulary_size).ids, _default_name(), _default_name())
        kept, removed = _without_shared_runs(head.ids, tail.ids)
        calibration = TokenStream(kept, head.name)
        evaluation = TokenStream(token_stream(tokenizer, vocabulary_size, evaluation_text).ids, evaluation_name)
    else:
        calibration = TokenStream(token_stream(tokenizer, vocabulary_size, calibration_text).ids, calibration_name)
        if evaluation_text is None:
            _, evaluation = _parts(token_stream(tokenizer, vocabulary_size).ids, _default_name(), _default_name())
        else:
            evaluation = TokenStream(token_stream(tokenizer, vocabulary_size, evaluation_text).ids, evaluation_name)
    kept, cut = _without_shared_runs(calibration.ids, evaluation.ids)
    removed += cut
    if removed:
        notes.append(
            f"{removed:,} tokens of the calibration text were cut out: runs of {SHARED_RUN_TOKENS} tokens that the "
            "evaluation text has too"
        )
    _check_long_enough("evaluation", evaluation.ids.numel(), "")
    _check_long_enough(
        "calibration", kept.numel(), f" left once {removed:,} shared ones are cut out" if removed else ""
    )
    return TextSplit(TokenStream(kept, calibration.name), evaluation, removed, tuple(notes))


def _check_long_enough(what: str, tokens: int, after: str) -> None:
    if tokens < SHARED_RUN_TOKENS:
        raise ProfilerError(
            f"the {what} text has {tokens} tokens{after} but at least {SHARED_RUN_TOKENS} are needed; give a longer one"
        )


def _default_name() -> str:
    """Name the default text with Python's version: it is another with each release, and figures on it are too."""
    version = ".".join(platform.python_version_tuple()[:2])
    return DEFAULT_TEXT_NAME.replace(")", f", Python {version})")


def _parts(ids: torch.Tensor, calibration_name: str, evaluation_name: str) -> tuple[TokenStream, TokenStream]:
    """Return the part of one text to calibrate on and the part to evaluate on."""
    middle = ids.numel() - int(ids.numel() * EVALUATION_SHARE)
    return (
        TokenStream(ids[:middle], f"{calibration_name}, first {1 - EVALUATION_SHARE:.0%}"),
        TokenStream(ids[middle:], f"{evaluation_name}, last {EVALUATION_SHARE:.0%}"),
    )


def _without_shared_runs(ids: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return ``ids`` without any run of tokens that ``other`` has too, and how many tokens that took away.

    Runs are compared by a hash, in linear time: equal runs have equal hashes, so no shared one is left; two different
    runs of the same hash (about one chance in 2^64 a pair) would only cut out too much. Cutting joins what lay apart,
    so it is done again until nothing is shared.
    """
    import torch

    before = ids.numel()
    hashes = _run_hashes(other)
    while True:
        (starts,) = torch.isin(_run_hashes(ids), hashes).nonzero(as_tuple=True)
        if not starts.numel():
            return ids, before - ids.numel()
        edges = torch.zeros(ids.numel() + 1, dtype=torch.long)
        edges[starts] += 1
        edges[starts + SHARED_RUN_TOKENS] -= 1
        ids = ids[edges[:-1].cumsum(0) == 0]


def _run_hashes(ids: torch.Tensor) -> torch.Tensor:
    """Return a hash of every run of 32 tokens, shape (N - 31,): a polynomial modulo 2^64, by doubling the length."""
    hashes, multiplier, length = ids + 1, _HASH_MULTIPLIER, 1
    if ids.numel() < SHARED_RUN_TOKENS:
        return hashes[:0]
    while length < SHARED_RUN_TOKENS:
        hashes = hashes[:-length] * multiplier + hashes[length:]
        multiplier = (multiplier * multiplier + 2**63) % 2**64 - 2**63
        length *= 2
    return hashes
