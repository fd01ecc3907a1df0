"""Healing: distil the model as it was into the looped one, on text.

::

    text ──> windows ──┬──> the model as it was ──> logits, hidden states ──┐
                       └──> the looped model ─────> logits, hidden states ──┴──> loss ──> AdamW (training.py)

The loss of a token is ``KL(original ‖ looped) + hidden_weight · h``, where h is the mean over layers of the squared
distance of their outputs as a share of the original's squared length: logits say what must come out, hidden states
give every layer a target of its own (Relaxed Recursive Transformers, section 3.3, distils logits; TinyBERT, section 3,
hidden states). In place of a share of the divergence the text's own next tokens can be trained on (Hinton et al. 2015,
arXiv:1503.02531, section 2).
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
    label_weight: float = 0.0,
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
    label_weight : float
        Share of the cross-entropy of the text's next tokens, 0 to 1; the divergence has the rest.
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
        loss, divergence = logits_loss(wanted.logits, found.logits, windows, label_weight)
        return loss + hidden_weight * _distance(wanted.hidden_states, found.hidden_states), divergence

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


def logits_loss(
    wanted: torch.Tensor, found: torch.Tensor, windows: torch.Tensor, label_weight: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what logits add to the loss, and KL(wanted ‖ found) without a gradient: means over tokens, in nats.

    The loss of a token is (1 − label_weight) · KL(wanted ‖ found) − label_weight · log p(next token); a window's last
    token has no next one, and its KL in full. A few rows at a time: all probabilities in float32 would be larger than
    the model. The gradient with regard to the found logits is the found probabilities less those aimed at, and is made
    on the way forth.

    Parameters
    ----------
    wanted, found : torch.Tensor
        Logits, shape (B, T, V); the gradient goes to ``found`` alone.
    windows : torch.Tensor
        Token ids, shape (B, T).
    label_weight : float
    """
    shares = torch.full(windows.shape, label_weight, dtype=torch.float32, device=found.device)
    shares[:, -1] = 0
    following = windows.roll(-1, dims=1)
    loss, divergence = _LogitsLoss.apply(wanted, found, following.flatten(), shares.flatten())  # type: ignore[no-untyped-call]
    return loss, divergence


class _LogitsLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, wanted: torch.Tensor, found: torch.Tensor, following: torch.Tensor, shares: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        targets, logits = wanted.flatten(0, 1), found.flatten(0, 1)
        rows = len(logits)
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[1] else None
        loss, divergence = torch.zeros((2,), dtype=torch.float32, device=logits.device)
        for start in range(0, rows, KL_ROWS):
            part = slice(start, start + KL_ROWS)
            target, own = targets[part].float().log_softmax(-1), logits[part].float().log_softmax(-1)
            aim, share, label = target.exp(), shares[part, None], following[part, None]
            apart = (aim * target.sub_(own)).sum(-1, keepdim=True)
            divergence += apart.sum()
            loss += ((1 - share) * apart - share * own.gather(-1, label)).sum()
            if gradient is not None:
                aim.mul_(1 - share).scatter_add_(-1, label, share)
                gradient[part] = own.exp_().sub_(aim).div_(rows)
        ctx.gradient, ctx.shape = gradient, found.shape
        divergence = divergence / rows
        ctx.mark_non_differentiable(divergence)
        return loss / rows, divergence

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[None, torch.Tensor, None, None]:
        return None, (ctx.gradient * upstream[0]).view(ctx.shape), None, None


def _distance(wanted: tuple[torch.Tensor, ...], found: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Return the mean over layers of the squared distance of their outputs, as a share of the squared length."""
    # The first token's states are thousands of times larger than others' (massive activations): left out.
    shares = [
        (mine[:, 1:].float() - target[:, 1:].float()).square().sum()
        / target[:, 1:].float().square().sum().clamp_min(1e-20)
        for target, mine in zip(wanted[1:], found[1:], strict=True)
    ]
    return torch.stack(shares).mean()
