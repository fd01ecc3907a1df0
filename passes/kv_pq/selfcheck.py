"""Whether a model computes with a product-quantized cache what it computes with transformers' own.

As long as all tokens are among the kept and recent ones nothing is quantized, so both must agree to rounding. An
architecture that changes keys or values between its cache and its attention fails this and is refused.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from passes.base import PassError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from passes.kv_pq.codebooks import Codebooks

PROMPT_TOKENS = 12
STEPS = 3
TOLERANCE = 32
"""Times the dtype's epsilon, of the largest logit."""


def check_runs(model: PreTrainedModel, codebooks: Codebooks) -> None:
    """Compare a prompt and some steps with both caches; the model is left as it was.

    Parameters
    ----------
    model : PreTrainedModel
        With weights, in evaluation mode.
    codebooks : Codebooks
        Of this model.

    Raises
    ------
    PassError
        If the logits differ by more than rounding, or the architecture does not read the cache.
    """
    import torch
    from transformers import DynamicCache

    from passes.kv_pq.cache import PQCache, attach, detach

    name = type(model).__name__
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.randint(vocabulary, (1, PROMPT_TOKENS + STEPS), generator=torch.Generator().manual_seed(0))
    ids = ids.to(model.device)
    expected = _logits(model, ids, DynamicCache(config=model.config))
    roomy = replace(codebooks, recent_tokens=4 * (PROMPT_TOKENS + STEPS))
    attach(model, roomy)
    try:
        found = _logits(model, ids, PQCache(model.config, roomy))
    except PassError as error:
        raise PassError(
            f"{name} does not read its cache as its attention interface says, so kv-pq does not suit it: {error}"
        ) from error
    finally:
        detach(model)
    tolerance = TOLERANCE * torch.finfo(model.dtype).eps * expected.abs().max().item()
    worst = (found - expected).abs().max().item()
    if not worst <= tolerance:
        raise PassError(
            f"{name} gives other logits with keys and values held by kv-pq in full precision (by {worst:.3g}, rounding "
            f"explains {tolerance:.3g}): its attention changes what comes out of the cache; leave kv-pq out"
        )


def _logits(model: PreTrainedModel, ids: torch.Tensor, cache: object) -> torch.Tensor:
    import torch

    found = []
    with torch.no_grad():
        for part in (ids[:, :PROMPT_TOKENS], *torch.split(ids[:, PROMPT_TOKENS:], 1, dim=1)):
            found.append(model(input_ids=part, past_key_values=cache, use_cache=True).logits[:, -1].float())
    return torch.stack(found)
