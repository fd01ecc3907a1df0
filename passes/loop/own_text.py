"""Text that is drawn from the model itself: what fitting and healing see of what it knows beyond the text it is given.

A model that is fitted to or healed on one kind of text forgets others. Its own samples are spread over all that it was
trained on, and distilling on them needs no data (LLM-QAT, Liu et al. 2023, arXiv:2305.17888, section 3.1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from profilers.base import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FILE = "own-text.safetensors"
ROWS = 128
"""Sequences that are drawn together."""


@torch.no_grad()
def draw(
    model: PreTrainedModel, tokens: int, length: int, start: int | None, work: Path, *, seed: int, progress: Progress
) -> torch.Tensor:
    """Return tokens drawn from a model at temperature 1, shape (N,), int64, on the CPU; N is at least ``tokens``.

    An end-of-text token does not end a sequence: what the model says after it follows, as in its training text.

    Parameters
    ----------
    model : PreTrainedModel
        In evaluation mode.
    tokens : int
    length : int
        Of one sequence; each begins anew.
    start : int or None
        The first token of each; default: a random one for each.
    work : Path
        Where finished sequences are kept, and found again by the next call with the same arguments.
    seed : int
    progress : Progress
    """
    from safetensors.torch import load_file, save_file

    path = work / FILE
    done = list(torch.split(load_file(path)["ids"], ROWS * length)) if path.is_file() else []
    rounds = -(-tokens // (ROWS * length))
    with progress.task("drawing text", total=rounds * length) as task:
        task.advance(len(done) * length)
        for number in range(len(done), rounds):
            generator = torch.Generator().manual_seed(1_000_003 * seed + number)
            done.append(_sequences(model, length, start, generator, task.advance))
            work.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"{FILE}.partial")
            try:
                save_file({"ids": torch.cat(done)}, partial)
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
    return torch.cat(done)


def _sequences(
    model: PreTrainedModel, length: int, start: int | None, generator: torch.Generator, advance: Callable[[], None]
) -> torch.Tensor:
    """Return the tokens of some sequences one after the other, shape (ROWS · length,)."""
    from transformers import DynamicCache

    vocabulary = model.get_input_embeddings().weight.shape[0]
    first = torch.randint(vocabulary, (ROWS, 1), generator=generator)
    drawn = [first if start is None else torch.full_like(first, start)]
    cache = DynamicCache(config=model.config)
    for _ in range(length - 1):
        logits = model(drawn[-1].to(model.device), past_key_values=cache, use_cache=True).logits[:, -1]
        # On the CPU: one seed draws the same text on every device, but for rounding.
        drawn.append(torch.multinomial(logits.float().softmax(-1).cpu(), 1, generator=generator))
        advance()
    advance()
    return torch.cat(drawn, dim=1).flatten()


def mixed(batches: Sequence[torch.Tensor], drawn: torch.Tensor) -> list[torch.Tensor]:
    """Return batches with every second window replaced by drawn text, as far as that goes.

    Parameters
    ----------
    batches : sequence of torch.Tensor
        Token ids, shape (B, T) each.
    drawn : torch.Tensor
        Shape (N,).
    """
    windows = torch.cat(list(batches))
    count = min(len(windows) // 2, drawn.numel() // windows.shape[1])
    windows[1 : 2 * count : 2] = drawn[: count * windows.shape[1]].view(count, -1)
    return list(torch.split(windows, batches[0].shape[0]))
