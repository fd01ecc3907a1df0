"""Prompts that arrive one after another, served by a looped model: depth-wise batching beside three other ways.

Prints one JSON object for each layout of the built-in model: a gain above 1 says that depth-wise batching was faster
than that way, with its 95 % interval. Nothing must be reached: beside ordinary continuous batching only the wait to
join can be gained. The blocks take the first layer's weights, and low-rank parts that are zero in effect: times do not
depend on values.

    python -m tests.benchmarks.bench_loop_serving [sequence] [cycle] [few]
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

import torch
from transformers import PreTrainedModel

from effcli import checkpoint
from effcli.devices import choose_device, native_dtypes
from passes.loop import LoopParameters, grouping, reuse, serving, targets
from passes.loop.convert import convert
from passes.loop.layout import LoopPlan

BUILT_IN = "smollm2-135m"
RANK = 64
LAYOUTS: dict[str, dict[str, Any]] = {
    "sequence": {"blocks": 15, "loops": 2, "pattern": "sequence"},
    "cycle": {"blocks": 15, "loops": 2, "pattern": "cycle"},
    "few": {"blocks": 3, "loops": 10, "pattern": "cycle"},
}


def looped(device: torch.device, dtype: str, values: dict[str, Any]) -> PreTrainedModel:
    """Return the built-in model with layers that share their weights."""
    model = checkpoint.load(BUILT_IN, device=str(device), dtype=dtype).model
    structure = targets.find(model)
    groups = grouping.regular(LoopParameters(rank=RANK, **values), structure)
    convert(model, LoopPlan.even(structure, groups, RANK))
    return model.eval()


def main(names: list[str]) -> int:
    """Run the layouts named, or all."""
    device, _ = choose_device("auto")
    dtype = "bfloat16" if torch.bfloat16 in native_dtypes(device) else "float32"
    for name, values in LAYOUTS.items():
        if names and name not in names:
            continue
        model = looped(device, dtype, values)
        served = serving.measure(model)
        moved = reuse.measure(
            model, LoopPlan.from_json(model.config.loop), batch=1, context=512, bandwidth_bytes_per_second=1e12
        )  # the bandwidth only bounds bytes, which are not printed
        line = {
            "benchmark": "loop_serving",
            "layout": name,
            "device": str(device),
            "threads": torch.get_num_threads(),
            "dtype": dtype,
            **{key: value for key, value in asdict(served).items() if key != "gains"},
            "gains": {gain.way: {k: v for k, v in asdict(gain).items() if k != "way"} for gain in served.gains},
            "one_set_over_own_sets": {"linears": [moved.looped.ratio, moved.looped.interval],
                                      "step": [moved.step.ratio, moved.step.interval]},
        }  # fmt: skip
        print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
