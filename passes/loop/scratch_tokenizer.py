"""A tokenizer for a model that has none: byte-level BPE (Sennrich et al., ACL 2016) of the text it is trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from passes.base import PassError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

BYTES = 256
PLACES = 16
"""Special tokens keep the id that a config gives them where that is below this; a BPE's first ids are theirs."""
_NAMES = {"bos_token_id": "<s>", "eos_token_id": "</s>", "pad_token_id": "<pad>"}
_END = "<|endoftext|>"


@dataclass(frozen=True)
class Special:
    """Special tokens of a tokenizer to be trained.

    Attributes
    ----------
    tokens : tuple of str
        By id, from 0.
    roles : dict of str to int
        The config's ``bos_token_id``, ``eos_token_id`` and ``pad_token_id`` as they shall be, where it has them.
    """

    tokens: tuple[str, ...]
    roles: dict[str, int]


def special_tokens(config: PreTrainedConfig) -> Special:
    """Return the special tokens that a config asks for: at its own ids where these are small, else at 0.

    An id such as GPT-2's 50256 lies behind all merges, and a small text does not make so many.
    """
    asked = {role: getattr(config, role, None) for role in _NAMES}
    roles = {role: value for role, value in asked.items() if isinstance(value, int) and value >= 0}
    if not roles or max(roles.values()) >= PLACES:
        return Special((_END,), dict.fromkeys(roles, 0))
    names = {value: _NAMES[role] for role, value in roles.items()}
    if len(set(roles.values())) < len(roles):  # one token for several roles
        names |= {value: _END for value in roles.values() if list(roles.values()).count(value) > 1}
    return Special(tuple(names.get(place, f"<unused{place}>") for place in range(max(names) + 1)), roles)


def train(text: str, vocabulary: int, special: Special) -> PreTrainedTokenizerBase:
    """Train a tokenizer on a text; the same text gives the same one.

    Parameters
    ----------
    text : str
    vocabulary : int
        Tokens at most, special ones and the 256 bytes included; a short text makes fewer.
    special : Special

    Raises
    ------
    PassError
        If the vocabulary has no room for the bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    least = BYTES + len(special.tokens)
    if vocabulary < least:
        raise PassError(
            f"the config's vocab_size={vocabulary} is less than the {least} tokens of a byte-level BPE without merges; "
            f"give vocab_size={least} or more, or put a tokenizer beside the config"
        )
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(special.tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([text], trainer)
    named = {role.removesuffix("_id"): special.tokens[place] for role, place in special.roles.items()}
    return PreTrainedTokenizerFast(tokenizer_object=raw, **named)
