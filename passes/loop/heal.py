"""Healing: distil the model as it was into the looped one, on text.

::

    text ──> windows ──┬──> the model as it was ──> logits, hidden states ──┐
                       └──> the looped model ─────> logits, hidden states ──┴──> loss ──> AdamW (training.py)

The loss of a token is ``KL(original ‖ looped) + hidden_weight · h``, where h is the mean over layers of the squared
distance of their outputs as a share of the original's squared length: logits say what must come out, hidden states
give every layer a target of its own (Relaxed Recursive Transformers, section 3.3, distils logits; TinyBERT, section 3,
hidden states).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from passes.loop.modeling_looped import BLOCKS, LoopedLinear
from passes.loop.training import Settings, Trained, train
from profilers.base import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STATE = "healing.safetensors"
HIDDEN_WEIGHT = 1.0
KL_ROWS = 256
"""Tokens whose probabilities are in memory at once."""


def heal(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    ids: torch.Tensor,
    settings: Settings,
    work: Path,
    *,
    names: Literal["deltas", "all"] = "all",
    hidden_weight: float = HIDDEN_WEIGHT,
    seed: int = 0,
    progress: Progress | None = None,
) -> Trained:
    """Train a looped model in place to give what the original gives.

    Parameters
    ----------
    student : PreTrainedModel
        Looped, on the device to train on.
    teacher : PreTrainedModel
        The original, on the same device; only read.
    ids : torch.Tensor
        Shape (N,): the text. The held-out figure is the KL divergence on its last windows, nats a token.
    settings : Settings
    work : Path
        Folder of the saved state.
    names : str
        ``deltas``: train the layers' own low-rank parts, norms and biases; ``all``: everything but the embeddings.
    hidden_weight : float
    seed : int
    progress : Progress, optional

    Raises
    ------
    PassError
        If the text is too short, or healing diverges.
    """

    def losses(model: Any, windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        given: dict[str, Any] = {"input_ids": windows, "use_cache": False, "output_hidden_states": True}
        with torch.no_grad(), torch.autocast(windows.device.type, enabled=False):
            wanted = teacher(**given)
        found = model(**given)
        divergence = kl_divergence(wanted.logits, found.logits)
        distance = _distance(wanted.hidden_states, found.hidden_states)
        return divergence + hidden_weight * distance, divergence.detach()

    return train(
        student, trainable(student, names), ids, settings, work / STATE, losses,
        what="healing", seed=seed, progress=progress,
    )  # fmt: skip


def trainable(model: PreTrainedModel, train: Literal["deltas", "all"]) -> list[str]:
    """Return the names of the parameters to train: never those of the embeddings, nor a head that shares them."""
    fixed = {
        id(parameter)
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
        if module is not None
        for parameter in module.parameters()
    }
    named = [(name, parameter) for name, parameter in model.named_parameters() if id(parameter) not in fixed]
    if train == "all":
        return [name for name, _ in named]
    own = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, LoopedLinear)
        for parameter in module.parameters(recurse=False)
    }
    return [
        name
        for name, parameter in named
        if id(parameter) in own or (parameter.dim() == 1 and f"{BLOCKS}." not in name)  # norms and biases
    ]


def kl_divergence(wanted: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """Return KL(wanted ‖ found), the mean over tokens, in nats.

    A few rows at a time: all probabilities in float32 would be larger than the model. The gradient of a token with
    regard to the found logits is q − p, and is made on the way forth.

    Parameters
    ----------
    wanted, found : torch.Tensor
        Logits, shape (B, T, V); the gradient goes to ``found`` alone.
    """
    divergence: torch.Tensor = _Divergence.apply(wanted, found)  # type: ignore[no-untyped-call]
    return divergence


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, wanted: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
        targets, logits = wanted.flatten(0, 1), found.flatten(0, 1)
        rows = len(logits)
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[1] else None
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        for start in range(0, rows, KL_ROWS):
            part = slice(start, start + KL_ROWS)
            target, own = targets[part].float().log_softmax(-1), logits[part].float().log_softmax(-1)
            chance = target.exp()
            total += (chance * target.sub_(own)).sum()
            if gradient is not None:
                gradient[part] = own.exp_().sub_(chance).div_(rows)
        ctx.gradient, ctx.shape = gradient, found.shape
        return total / rows

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[None, torch.Tensor]:
        return None, (ctx.gradient * upstream[0]).view(ctx.shape)


def _distance(wanted: tuple[torch.Tensor, ...], found: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Return the mean over layers of the squared distance of their outputs, as a share of the squared length."""
    # The first token's states are thousands of times larger than others' (massive activations): left out.
    shares = [
        (mine[:, 1:].float() - target[:, 1:].float()).square().sum()
        / target[:, 1:].float().square().sum().clamp_min(1e-20)
        for target, mine in zip(wanted[1:], found[1:], strict=True)
    ]
    return torch.stack(shares).mean()
