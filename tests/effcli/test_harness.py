"""The call into lm-evaluation-harness, recorded by a stand-in: the harness is no dependency."""

from __future__ import annotations

import json
import logging
import math
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from effcli import harness
from effcli.errors import BadInputError
from effcli.reports.model import plain
from profilers.base import SilentProgress

RESULTS = {
    "results": {
        "arc_easy": {
            "alias": "arc_easy",
            "acc,none": np.float64(0.5),
            "acc_stderr,none": 0.05,
            "acc_norm,none": 0.4,
            "acc_norm_stderr,none": 0.04,
        },
        "gsm8k": {"alias": "gsm8k", "exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": 0.02},
        "wikitext": {"word_perplexity,none": 23.5, "word_perplexity_stderr,none": "N/A"},
        "group": {"acc,none": 0.45, "acc_stderr,none": math.nan},
    },
    "n-samples": {"arc_easy": {"original": 2376, "effective": 100}, "gsm8k": {"original": 1319, "effective": 1319}},
    "versions": {"arc_easy": 1.0},
    "n-shot": {"arc_easy": 0},
    "config": {"model": object()},
}


class Tied:
    """A model whose weights must not be tied again."""

    def tie_weights(self) -> None:
        raise AssertionError("tied again")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Install a harness that records how it is called."""
    found: list[Any] = []

    class HFLM:
        def __init__(self, **options: Any) -> None:
            options["pretrained"].tie_weights()
            found.append(options)

    def simple_evaluate(**options: Any) -> dict[str, Any]:
        print("chatter")
        sys.stderr.write("chatter\n")
        logging.getLogger("lm_eval").error("chatter")
        found.append(options)
        if options["tasks"] == ["nonsense"]:
            raise KeyError("nonsense")
        return RESULTS

    package, models, huggingface = (
        ModuleType(name) for name in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface")
    )
    package.simple_evaluate = simple_evaluate  # type: ignore[attr-defined]
    huggingface.HFLM = HFLM  # type: ignore[attr-defined]
    for module in (package, models, huggingface):
        module.__spec__ = SimpleNamespace(name=module.__name__)  # type: ignore[assignment]
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return found


def run(tasks: list[str], model: Any = None, tokenizer: Any = "tokenizer") -> dict[str, Any]:
    return harness.run(model or Tied(), tokenizer, tasks, limit=100, seed=7, progress=SilentProgress())


def test_the_loaded_model_is_handed_over(calls: list[Any], capfd: pytest.CaptureFixture[str]) -> None:
    model = Tied()
    found = run(["arc_easy", "gsm8k"], model)
    wrapped, asked = calls
    assert wrapped["pretrained"] is model and wrapped["tokenizer"] == "tokenizer"
    assert type(asked.pop("model")).__name__ == "HFLM"
    seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    assert asked == {"tasks": ["arc_easy", "gsm8k"], "limit": 100, "log_samples": False} | dict.fromkeys(seeds, 7)
    assert set(found) == {"results", "versions", "n-shot", "n-samples"}
    json.dumps(plain(found), allow_nan=False)
    assert capfd.readouterr() == ("", "")
    assert "tie_weights" not in model.__dict__
    assert logging.getLogger("lm_eval").isEnabledFor(logging.ERROR)


def test_accuracies_become_comparisons(calls: list[Any]) -> None:
    after = run(["arc_easy"])
    before = json.loads(json.dumps(after))
    before["results"]["arc_easy"]["acc,none"] = 0.6
    accuracy, normed, matched = harness.comparisons(after, before, 0.95)
    assert (accuracy.name, accuracy.kind, accuracy.metric) == ("arc_easy", "lm-eval", "acc")
    assert (accuracy.samples, accuracy.available) == (100, 2376)
    assert (accuracy.before, accuracy.after, accuracy.difference) == (0.6, 0.5, pytest.approx(-0.1))
    assert accuracy.interval == pytest.approx((0.5 - 1.959964 * 0.05, 0.5 + 1.959964 * 0.05))
    assert normed.metric == "acc_norm" and matched.metric == "exact_match,strict-match"
    assert harness.comparisons(after, None, 0.95)[0].before is None


def test_other_figures_are_told_in_words(calls: list[Any]) -> None:
    assert harness.other_figures(run(["wikitext"])) == ["lm-eval wikitext: word_perplexity 23.5"]


def test_failures_are_one_line(calls: list[Any]) -> None:
    with pytest.raises(BadInputError, match="failed on --lm-eval nonsense: 'nonsense'"):
        run(["nonsense"])
    with pytest.raises(BadInputError, match="needs a tokenizer"):
        run(["arc_easy"], tokenizer=None)


def test_without_the_harness_the_command_that_installs_it_is_named() -> None:
    if harness.find_spec("lm_eval") is not None:
        pytest.skip("lm-eval is installed")
    with pytest.raises(BadInputError, match="--lm-eval arc_easy,piqa needs .*; pip install lm-eval"):
        harness.check_installed(["arc_easy", "piqa"])
    harness.check_installed([])
