"""Models small enough to quantize in a test, with shapes that every scheme takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from passes.base import PassContext, PassRecord
from passes.quantize import QuantizePass
from profilers.text import TokenStream

VOCABULARY = 97
SAMPLES, LENGTH = 8, 64
_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_SHAPE),
    "mixtral": MixtralConfig(
        **_SHAPE | {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 64} | _EXPERTS
    ),
    "qwen3_moe": Qwen3MoeConfig(
        **_SHAPE | {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 64},
        head_dim=16,
        moe_intermediate_size=64,
        num_experts=4,
        num_experts_per_tok=2,
    ),
    "gemma3": Gemma3TextConfig(**_SHAPE, head_dim=32, layer_types=["full_attention"] * 3),
}


def build(name: str = "llama", dtype: torch.dtype = torch.float32, device: str = "cpu") -> PreTrainedModel:
    """Return a seeded model, with norms that are not all ones."""
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[name].__class__(**CONFIGS[name].to_dict()), dtype=dtype)
        for key, tensor in model.named_parameters():
            if "norm" in key and device != "meta":
                tensor.data.add_(0.1 * torch.randn(tensor.shape))
    return model.eval()


def text(tokens: int = 4096, seed: int = 1) -> TokenStream:
    """Return a first-order Markov chain: inputs whose channels are correlated, as real ones are."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randint(0, VOCABULARY, (VOCABULARY, 3), generator=torch.Generator().manual_seed(7))
    picks = torch.randint(0, 3, (tokens,), generator=generator).tolist()
    ids = [0]
    for pick in picks[1:]:
        ids.append(int(table[ids[-1], pick]))
    return TokenStream(torch.tensor(ids), "a Markov chain")


def context(work: Path, **changes: Any) -> PassContext:
    """Return what a pass runs with."""
    return PassContext(
        **{"tokenizer": None, "device": torch.device("cpu"), "calibration": text(), "work": work} | changes
    )


def parameters(**given: Any) -> dict[str, Any]:
    """Return parameters for a small calibration."""
    return {"samples": SAMPLES, "length": LENGTH} | given


def quantize(model: PreTrainedModel, work: Path, out: Path | None = None, **given: Any) -> PassRecord:
    """Run the pass, and save where asked to."""
    step = QuantizePass.from_mapping(parameters(**given))
    record = step.apply(model, context(work))
    if out is not None:
        step.save(model, out)
    return record


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    """Return the logits on text that calibration has not seen, shape (1, T, V)."""
    found: torch.Tensor = model(text(48, seed=2).ids[None]).logits
    return found


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Return every tensor on disk by name."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors
