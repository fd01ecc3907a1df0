"""Parameters of the loop pass, checked before anything is loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_serializer, model_validator

from passes.base import PassParameters

Pattern = Literal["cycle", "sequence", "free"]
Init = Literal["least-squares", "average", "stepwise", "lower"]
DEFAULT_RANK = 64
RANKS = (0, 8, 16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512)
"""What is chosen from; those that a layer's matrices are too small for are left out."""
_UNITS = {"k": 10**3, "M": 10**6, "G": 10**9}
SCRATCH_RATE = 1e-3
"""Learning rate from scratch where none is given."""
_OF_SCRATCH = ("train_text", "train_tokens", "train_length", "train_batch")
_NOT_OF_SCRATCH = (
    "density", "init", "align", "rounds", "allocation", "samples", "length", "damage_samples", "max_loops", "drawn",
    "heal_tokens", "heal_minutes", "heal_train", "heal_labels", "heal_length", "heal_batch",
)  # fmt: skip
"""Parameters that fit trained weights, or heal them."""


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
            "Of each layer's own low-rank part of a shared linear, 0: none; default: 64, 0 with density, and with "
            "pattern=free chosen for each block."
        ),
    )
    density: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description=(
            "Share of a shared linear's entries that each further layer has for itself, where it differs most: sparse "
            "parts, beside which rank is 0 unless given. Decode becomes slower, each step unpacks them."
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
    drawn: Annotated[int, BeforeValidator(_count)] = Field(
        default=0,
        ge=0,
        description="Tokens to draw from the model itself: up to half of the calibration windows, and text to heal on.",
    )
    damage_samples: int = Field(
        default=4, ge=1, description="Windows that the damage of sharing is measured on, with pattern=free."
    )
    heal_tokens: Annotated[int, BeforeValidator(_count)] = Field(
        default=0, ge=0, description="Tokens of the calibration text to distil the original on afterwards, 5M or 500k."
    )
    heal_minutes: float | None = Field(default=None, gt=0, description="Most minutes of healing.")
    heal_train: Literal["all", "deltas"] = Field(
        default="all",
        description="What healing trains: everything but the embeddings, or the layers' own parts, norms and biases.",
    )
    heal_labels: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Share of the text's own next tokens in what healing aims at; the original has the rest.",
    )
    heal_length: int = Field(default=512, ge=16, description="Tokens of one window of healing.")
    heal_batch: int = Field(default=4, ge=1, description="Windows of one step of healing.")
    learning_rate: float = Field(default=1.5e-4, gt=0, description="The highest of healing; from scratch 1e-3.")
    heal_processes: int | None = Field(
        default=None, ge=1, description="Processes that heal together, one a GPU; default: as many as there are GPUs."
    )
    gradient_checkpointing: bool = Field(
        default=False, description="Compute activations twice while training, for less memory."
    )
    checkpoint_minutes: float = Field(
        default=5.0, ge=0, description="Minutes between two saved states of training, which --resume goes on from."
    )
    from_scratch: bool = Field(
        default=False, description="Train the looped model, and the unshared one beside it, from a config alone."
    )
    train_text: Path | None = Field(
        default=None, description="UTF-8 file to train on from scratch; its last 5 % are evaluated on instead."
    )
    train_tokens: Annotated[int, BeforeValidator(_count)] = Field(
        default=0, ge=0, description="Tokens to train each model on from scratch, 5M or 500k."
    )
    train_length: int = Field(default=256, ge=16, description="Tokens of one window of training from scratch.")
    train_batch: int = Field(default=8, ge=1, description="Windows of one step of training from scratch.")

    @field_serializer("train_text")
    def _as_text(self, value: Path | None) -> str | None:
        return None if value is None else str(value)

    @model_validator(mode="before")
    @classmethod
    def _rate_from_scratch(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("from_scratch") and "learning_rate" not in values:
            return {**values, "learning_rate": SCRATCH_RATE}
        return values

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
        if self.density and self.target is not None:
            raise ValueError("density goes with blocks and loops, and target chooses them: leave one of them out")
        if self.density and self.init != "least-squares":
            raise ValueError(f"density fits the shared weights itself, and init={self.init} sets them: leave one out")
        step = self.heal_length * self.heal_batch
        if 0 < self.heal_tokens < step:
            raise ValueError(
                f"heal_tokens={self.heal_tokens} is less than one step of heal_batch={self.heal_batch} windows of "
                f"heal_length={self.heal_length} tokens: give {step} or more, or 0 for none"
            )
        if self.heal_minutes is not None and not self.heal_tokens:
            raise ValueError("heal_minutes limits healing, and heal_tokens=0 is none: give heal_tokens too")
        if self.drawn and not self.heal_tokens and self.drawn < self.length:
            raise ValueError(f"drawn={self.drawn} is less than one window of length={self.length}: give more, or 0")
        self._check_scratch()
        return self

    def _check_scratch(self) -> None:
        """Hold what is for training from scratch against what is not."""
        changed = [name for name, known in type(self).model_fields.items() if getattr(self, name) != known.default]
        if not self.from_scratch:
            if extra := [name for name in _OF_SCRATCH if name in changed]:
                raise ValueError(f"{extra[0]} is for training from scratch: give from_scratch=true, or leave it out")
            return
        if extra := [name for name in _NOT_OF_SCRATCH if name in changed]:
            raise ValueError(
                f"{extra[0]} is for weights that are trained already, and from_scratch starts without: leave it out"
            )
        if self.is_complete and self.chosen_pattern == "free":
            raise ValueError(
                "pattern=free chooses by the damage to trained weights, and from_scratch starts without: give blocks "
                "and loops, or pattern=sequence or cycle"
            )
        step = self.train_length * self.train_batch
        if 0 < self.train_tokens < step:
            raise ValueError(
                f"train_tokens={self.train_tokens} is less than one step of train_batch={self.train_batch} windows of "
                f"train_length={self.train_length} tokens: give {step} or more"
            )

    @property
    def even_rank(self) -> int:
        """The rank of every block, where none is chosen for each."""
        if self.rank is not None:
            return self.rank
        return 0 if self.density else DEFAULT_RANK

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
        return not self.from_scratch and (self.init == "least-squares" or self.rank != 0)

    @property
    def uses_importance(self) -> bool:
        """Whether errors of layers and linears are weighed against each other."""
        fitted = self.init == "least-squares" or (self.rank != 0 and self.allocation == "auto")
        return fitted and not self.from_scratch

    @property
    def loop_entries(self) -> dict[str, str]:
        """What the config's ``loop`` says of how the model is meant to be served; nothing for plain."""
        return {} if self.runtime == "plain" else {"runtime": self.runtime}

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
