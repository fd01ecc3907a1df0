"""An architecture that does not read the cache as it should is refused before anything is written."""

from __future__ import annotations

import pytest
import torch

from passes.base import PassError
from passes.kv_pq import attention
from passes.kv_pq.selfcheck import check_runs
from tests.passes.kv_pq.small import random_codebooks
from tests.tiny_models import build


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "jamba", "diffllama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_architectures_agree_with_their_own_cache(name: str, dtype: torch.dtype) -> None:
    model = build(name, dtype=dtype)
    before = model.config._attn_implementation
    check_runs(model, random_codebooks(model, rope=True, recent=4))
    assert model.config._attn_implementation == before


def test_an_attention_that_says_something_else_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    own = attention.merge
    monkeypatch.setattr(attention, "merge", lambda parts: (1.01 * own(parts)[0], own(parts)[1]))
    model = build("llama")
    with pytest.raises(PassError, match=r"gives other logits .* leave kv-pq out"):
        check_runs(model, random_codebooks(model))
