"""What training from scratch leaves behind: each model's figures, the twin's in a file of its own, both in words."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from passes.base import PassError

FILE = "training.json"
FORMAT = "effcli.from-scratch/1"


@dataclass(frozen=True)
class Trained:
    """What training one model gave.

    Attributes
    ----------
    tokens, steps : int
    seconds : float
        Of all runs together.
    held_out_loss : float
        Nats a token, on all windows that are held out, of the weights in float32.
    parameters : int
        Each shared one once.
    flops_per_token : int
        Of a forward pass, in products with weights; attention comes on top, and is the same for both models.
    curve : list of dict
        ``tokens``, ``seconds``, ``loss`` (mean since the point before; None at first), ``held_out_loss``.
    """

    tokens: int
    steps: int
    seconds: float
    held_out_loss: float
    parameters: int
    flops_per_token: int
    curve: list[dict[str, Any]]


def write(folder: Path, trained: Trained) -> None:
    """Put the record of a twin's training beside its weights."""
    text = json.dumps({"format": FORMAT, **asdict(trained)}, indent=1, allow_nan=False) + "\n"
    (folder / FILE).write_text(text, encoding="utf-8")


def read(folder: Path | None) -> dict[str, Any]:
    """Return the record of a twin's training.

    Raises
    ------
    PassError
        If the folder has none.
    """
    path = None if folder is None else folder / FILE
    if path is None or not path.is_file():
        raise PassError(f"'{folder}' is no twin that was trained from scratch (it has no {FILE}); run with --force")
    said: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if said.pop("format", None) != FORMAT:
        raise PassError(f"'{path}' is not of format {FORMAT!r}; run with --force to train the twin again")
    return said


def summary(said: dict[str, Any]) -> str:
    """Return both models' figures in words, for the record's one line."""
    twin, looped = said["twin"], said["looped"]
    return (
        f"trained from scratch on {looped['tokens']:,} tokens: held-out loss {looped['held_out_loss']:.4f} against "
        f"{twin['held_out_loss']:.4f} of the unshared twin ({said['loss_ratio'] - 1:+.2%})"
    )


def notes(said: dict[str, Any]) -> tuple[str, ...]:
    """Return what belongs beside the figures, one line each."""
    twin, looped = said["twin"], said["looped"]
    return (
        f"both models saw the same windows of '{said['text']}' in the same order: {looped['tokens']:,} tokens, "
        f"{said['rounds']:.1f} rounds through {said['training_tokens']:,}; {said['held_out_tokens']:,} were held out",
        f"looped {looped['parameters']:,} parameters, {looped['flops_per_token']:,} FLOPs a token, "
        f"{looped['seconds'] / 60:.1f} minutes; twin {twin['parameters']:,} parameters, "
        f"{twin['flops_per_token']:,} FLOPs a token, {twin['seconds'] / 60:.1f} minutes",
    )


def curve(said: dict[str, Any]) -> dict[str, Any]:
    """Return both models' curves as reports draw them."""
    return {
        "title": "Held-out loss by tokens trained on",
        "unit": "nats a token",
        "series": [
            {"name": name, "points": [[point["tokens"], point["held_out_loss"]] for point in said[key]["curve"]]}
            for name, key in (("looped", "looped"), ("unshared twin", "twin"))
        ],
    }
