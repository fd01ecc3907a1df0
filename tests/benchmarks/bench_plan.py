"""Predicted against measured: weight bytes, TPOT, TTFT, peak memory and pass time of w4a16 on the built-in model.

``python -m tests.benchmarks.bench_plan [--model MODEL] [--pass STEP]``; without ``--model`` the built-in one. Profile,
prediction, pass and the profile afterwards are those of ``effcli optimize``, each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

LIMIT = 0.20
MUST = ("weight_bytes", "tpot_seconds", "peak_memory_bytes")


def main() -> int:
    """Print one JSON line for each figure; return 1 if one that must is further off than the limit."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--pass", dest="step", default="quantize:scheme=w4a16")
    options = parser.parse_args()

    from effcli import recipes
    from effcli.pipeline import optimize

    with tempfile.TemporaryDirectory() as folder:
        recipe = recipes.from_options([options.step])
        report = optimize(options.model, recipe, Path(folder) / "out").to_dict()
    predicted = report["predicted"]
    reached = True
    for metric in predicted["metrics"]:
        error = metric["relative_error"]
        must = metric["metric"] in MUST
        within = error is not None and abs(error) <= LIMIT
        reached = reached and (within or not must)
        line = {
            "benchmark": "plan",
            "pass": options.step,
            **metric,
            "must_reach": f"within {LIMIT:.0%}" if must else None,
        }
        print(json.dumps({**line, "reached": within if must else None}), flush=True)
    seconds, measured = predicted["pass_seconds"], predicted["measured_pass_seconds"]
    line = {"benchmark": "plan", "metric": "pass_seconds", "predicted": seconds, "measured": measured}
    print(json.dumps({**line, "relative_error": None if seconds is None else seconds / measured - 1}), flush=True)
    return 0 if reached else 1


if __name__ == "__main__":
    raise SystemExit(main())
