"""Parameters of the loop pass, checked before anything is loaded."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from passes.base import PassParameters

Pattern = Literal["cycle", "sequence", "free"]
Init = Literal["least-squares", "average", "stepwise", "lower"]
DEFAULT_RANK = 64
RANKS = (0, 8, 16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512)
"""What is chosen from; those that a layer's matrices are too small for are left out."""
_UNITS = {"k": 10**3, "M": 10**6, "G": 10**9}


def _count(value: Any) -> Any:
    """Return ``5M`` or ``500k`` as a number; anything else as it is."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kMG])", value) if isinstance(value, str) else None
    return value if found is None else round(float(found[1]) * _UNITS[found[2]])


class LoopParameters(PassParameters):
    """What ``--pass loop:…`` takes; see ``docs/passes/loop.md``."""

    blocks: int | None = Field(default=None, ge=1, description="Shared blocks; with loops, the number of layers.")
    loops: int | None = Field(default=None, ge=2, description="Layers that run with one block's weights.")
    target: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Parameters to keep, as a share of all that the model stores; in place of blocks and loops.",
    )
    rank: int | None = Field(
        default=None,
        ge=0,
        description=(
            "Of each layer's own low-rank part of a shared linear, 0: none; default: 64, and with pattern=free chosen "
            "for each block."
        ),
    )
    pattern: Literal["auto", "cycle", "sequence", "free"] = Field(
        default="auto",
        description=(
            "Which layers share: cycle (ABAB), sequence (AABB), free (neighbours, by measured damage); auto: sequence "
            "with blocks and loops, free with target."
        ),
    )
    keep_first: int = Field(default=0, ge=0, description="First layers that share with none.")
    keep_last: int = Field(default=0, ge=0, description="Last layers that share with none.")
    max_loops: int = Field(default=3, ge=2, description="Layers of one block at most, with pattern=free.")
    init: Init = Field(
        default="least-squares",
        description="Weights of a shared block: fitted on calibration text, the average, or those of one layer.",
    )
    align: bool = Field(
        default=True,
        description="Put hidden units of a block's layers in one order first; not with init=stepwise.",
    )
    rounds: int = Field(
        default=2, ge=1, description="Rounds of fitting shared and own weights together, with init=least-squares."
    )
    allocation: Literal["auto", "even"] = Field(
        default="auto", description="Share ranks out over a block's linears and layers by their error, or evenly."
    )
    samples: int = Field(default=32, ge=1, description="Calibration windows.")
    length: int = Field(default=512, ge=16, description="Tokens of one calibration window.")
    damage_samples: int = Field(
        default=4, ge=1, description="Windows that the damage of sharing is measured on, with pattern=free."
    )
    heal_tokens: Annotated[int, BeforeValidator(_count)] = Field(
        default=0, ge=0, description="Tokens of the calibration text to distil the original on afterwards, 5M or 500k."
    )
    heal_drawn: Annotated[int, BeforeValidator(_count)] = Field(
        default=0, ge=0, description="Tokens to draw from the original model, which healing sees beside the text."
    )
    heal_minutes: float | None = Field(default=None, gt=0, description="Most minutes of healing.")
    heal_train: Literal["all", "deltas"] = Field(
        default="all",
        description="What healing trains: everything but the embeddings, or the layers' own parts, norms and biases.",
    )
    heal_length: int = Field(default=512, ge=16, description="Tokens of one window of healing.")
    heal_batch: int = Field(default=4, ge=1, description="Windows of one step of healing.")
    learning_rate: float = Field(default=3e-4, gt=0, description="The highest of healing.")
    heal_processes: int | None = Field(
        default=None, ge=1, description="Processes that heal together, one a GPU; default: as many as there are GPUs."
    )
    gradient_checkpointing: bool = Field(
        default=False, description="Compute activations twice while healing, for less memory."
    )
    checkpoint_minutes: float = Field(
        default=5.0, ge=0, description="Minutes between two saved states of healing, which --resume goes on from."
    )

    runtime: Literal["plain", "depth-batched"] = Field(
        default="plain",
        description="How the result is meant to be served: model.generate, or effcli.depth_batched, which is measured.",
    )

    @model_validator(mode="after")
    def _agree(self) -> LoopParameters:
        if self.target is not None and (self.blocks is not None or self.loops is not None):
            raise ValueError("target and blocks, loops exclude each other: give blocks and loops, or a target")
        if (self.blocks is None) != (self.loops is None):
            given, missing = ("blocks", "loops") if self.loops is None else ("loops", "blocks")
            raise ValueError(f"{given} needs {missing} beside it: their product is the number of layers that share")
        if self.pattern == "free" and self.blocks is not None:
            raise ValueError("pattern=free chooses the blocks itself: give a target in place of blocks and loops")
        step = self.heal_length * self.heal_batch
        if 0 < self.heal_tokens < step:
            raise ValueError(
                f"heal_tokens={self.heal_tokens} is less than one step of heal_batch={self.heal_batch} windows of "
                f"heal_length={self.heal_length} tokens: give {step} or more, or 0 for none"
            )
        if self.heal_minutes is not None and not self.heal_tokens:
            raise ValueError("heal_minutes limits healing, and heal_tokens=0 is none: give heal_tokens too")
        if self.heal_drawn and not self.heal_tokens:
            raise ValueError("heal_drawn is text for healing, and heal_tokens=0 is none: give heal_tokens too")
        return self

    @property
    def even_rank(self) -> int:
        """The rank of every block, where none is chosen for each."""
        return DEFAULT_RANK if self.rank is None else self.rank

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that each block may have, ascending, with pattern=free."""
        return RANKS if self.rank is None else (self.rank,)

    @property
    def is_complete(self) -> bool:
        """Whether blocks and loops, or a target, are given."""
        return self.target is not None or self.blocks is not None

    @property
    def is_fitted(self) -> bool:
        """Whether calibration text is run to fit weights."""
        return self.init == "least-squares" or self.rank != 0

    @property
    def uses_importance(self) -> bool:
        """Whether errors of layers and linears are weighed against each other."""
        return self.init == "least-squares" or (self.rank != 0 and self.allocation == "auto")

    @property
    def aligns(self) -> bool:
        """Whether hidden units are put in one order; a block's weights may come from a layer outside it otherwise."""
        return self.align and self.init != "stepwise"

    @property
    def chosen_pattern(self) -> Pattern:
        """The pattern, ``auto`` resolved."""
        if self.pattern != "auto":
            return self.pattern
        return "free" if self.target is not None else "sequence"
