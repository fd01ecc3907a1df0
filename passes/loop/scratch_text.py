"""The text that models are trained on from scratch: the part to train on, and its end, which none is trained on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from passes.base import PassError
from passes.loop.parameters import LoopParameters

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

HELD_OUT_SHARE = 0.05
"""Of a text, its end, that is not trained on."""
LEAST_WINDOWS = 4
"""Of the part that is held out."""


@dataclass(frozen=True)
class Text:
    """A text in its two parts, which share no character.

    Attributes
    ----------
    name : str
    training, held_out : str
    """

    name: str
    training: str
    held_out: str


@dataclass(frozen=True)
class Tokens:
    """A text's tokens, without special ones.

    Attributes
    ----------
    training, held_out : torch.Tensor
        Shape (N,) each, int64, on the CPU.
    bos : int or None
        The token that every window starts with, where the tokenizer starts texts with one.
    """

    training: torch.Tensor
    held_out: torch.Tensor
    bos: int | None


def sha256(path: Path) -> str:
    """Return the sha256 of a text.

    Raises
    ------
    PassError
        If it cannot be read.
    """
    try:
        with path.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except FileNotFoundError:
        raise PassError(f"no text at train_text='{path}'; give a UTF-8 file") from None
    except OSError as error:
        raise PassError(f"train_text='{path}' cannot be read ({error.strerror}); give a UTF-8 file") from None


def check_given(parameters: LoopParameters) -> None:
    """Refuse to train without a text and a number of tokens, or on a text that no tokenizer makes long enough.

    Raises
    ------
    PassError
    """
    path = parameters.train_text
    if path is None or not parameters.train_tokens:
        missing = "train_text" if path is None else "train_tokens"
        raise PassError(
            f"from_scratch needs {missing}: loop:from_scratch=true,train_text=FILE,train_tokens=5M,blocks=4,loops=3"
        )
    text = read(parameters)
    needed = (parameters.train_batch + 1) * parameters.train_length
    size = len(text.training.encode())
    if size < needed:  # a token is a byte at least
        raise PassError(
            f"train_text='{path}' has {size:,} bytes to train on, and {needed:,} tokens are needed "
            f"(train_length={parameters.train_length}, train_batch={parameters.train_batch}); give a longer text"
        )


def read(parameters: LoopParameters) -> Text:
    """Read the text, and divide it after 95 % of its characters, at the line end that follows where one is near.

    Raises
    ------
    PassError
        If it cannot be read.
    """
    path = parameters.train_text
    assert path is not None
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise PassError(f"no text at train_text='{path}'; give a UTF-8 file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise PassError(f"train_text='{path}' cannot be read ({error}); give a UTF-8 file") from None
    cut = round((1 - HELD_OUT_SHARE) * len(text))
    line_end = text.find("\n", cut)
    if 0 <= line_end < cut + (len(text) - cut) // 2:
        cut = line_end + 1
    return Text(path.name, text[:cut], text[cut:])


def tokenize(
    text: Text,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: int,
    parameters: LoopParameters,
    evaluation_window: int = 0,
) -> Tokens:
    """Return the tokens of both parts.

    Parameters
    ----------
    text : Text
    tokenizer : PreTrainedTokenizerBase
    vocabulary : int
        Of the model.
    parameters : LoopParameters
    evaluation_window : int
        Tokens that the held-out part has at least, whatever the windows of training are.

    Raises
    ------
    PassError
        If the tokenizer has tokens that the model has not, or a part is too short.
    """
    import torch

    from profilers.text import adds_bos

    if len(tokenizer) > vocabulary:
        raise PassError(
            f"the tokenizer beside the config has {len(tokenizer):,} tokens and the config says "
            f"vocab_size={vocabulary}; give vocab_size={len(tokenizer)} or more, or another tokenizer"
        )
    training, held_out = (
        torch.tensor(tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)
        for part in (text.training, text.held_out)
    )
    length, batch = parameters.train_length, parameters.train_batch
    for ids, needed, part in (
        # One window more: each round through the text begins at another token.
        (training, (batch + 1) * length, "to train on"),
        (held_out, max(LEAST_WINDOWS * length, evaluation_window), "in its last 5 %, which are held out"),
    ):
        if ids.numel() < needed:
            raise PassError(
                f"train_text='{text.name}' has {ids.numel():,} tokens {part}, and {needed:,} are needed "
                f"(train_length={length}, train_batch={batch}); give a longer text, or smaller ones"
            )
    bos = tokenizer.bos_token_id if adds_bos(tokenizer) else None
    return Tokens(training, held_out, bos)
