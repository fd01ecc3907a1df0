"""Text to measure on: the user's, or one that every Python has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from profilers.base import ProfilerError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

DEFAULT_TEXT_NAME = "Python language reference (pydoc_data.topics)"


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
        ids = torch.randint(0, vocabulary_size, (1 << 18,), generator=generator)
        return TokenStream(ids, "random tokens (the model has no tokenizer)")
    name = DEFAULT_TEXT_NAME if text is None else "user text"
    encoded = tokenizer(default_text() if text is None else text, add_special_tokens=False, verbose=False)
    ids = torch.tensor(encoded["input_ids"], dtype=torch.long)
    if ids.numel() == 0:
        raise ProfilerError("the text has no tokens; give a --text file that is not empty")
    return TokenStream(ids, name)
