"""Gates: their grammar, their arithmetic, and what they say."""

from __future__ import annotations

import pytest

from effcli.errors import BadInputError
from effcli.gates import METRICS, evaluate, parse

BEFORE = {"ppl": 20.0, "size": 269e6, "tpot": 0.05, "ttft": 1.0, "sinks": 0.0, "tokens_per_second": 20.0, "bits": 16.0}
AFTER = {
    "ppl": 20.5,
    "size": 112e6,
    "tpot": 0.02,
    "ttft": 1.2,
    "sinks": 0.1,
    "tokens_per_second": 50.0,
    "bits": 6.66,
    "kl": 0.04,
    "top1": 0.93,
}


def judge(text: str):
    (result,) = evaluate([parse(text)], BEFORE, AFTER, {"joules_per_token": "no energy counter on a CPU"})
    return result


@pytest.mark.parametrize(
    ("text", "measured", "limit", "passed"),
    [
        ("ppl<=+3%", 0.025, 0.03, True),
        ("ppl <= +2%", 0.025, 0.02, False),
        ("ppl<=20.5", 20.5, 20.5, True),
        ("ppl<20.5", 20.5, 20.5, False),
        ("size<=0.5x", 112 / 269, 0.5, True),
        ("size<=-60%", 112 / 269 - 1, -0.6, False),
        ("tpot<=0.8x", 0.4, 0.8, True),
        ("ttft<=+10%", 0.2, 0.1, False),
        ("tokens_per_second>=1.5x", 2.5, 1.5, True),
        ("tokens_per_second>2.5x", 2.5, 2.5, False),
        ("bits<=4.6", 6.66, 4.6, False),
        ("KL<=0.05", 0.04, 0.05, True),
        ("top1>=.95", 0.93, 0.95, False),
        ("size<=1.2e8", 112e6, 1.2e8, True),
    ],
)
def test_a_gate_holds_a_change_a_ratio_or_a_value(text: str, measured: float, limit: float, passed: bool) -> None:
    result = judge(text)
    assert result.gate == text
    assert result.measured == pytest.approx(measured)
    assert result.limit == pytest.approx(limit)
    assert result.passed is passed


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ppl<=+3%", "perplexity rose by 2.5 % (20 → 20.5), at most +3 % allowed"),
        ("size<=0.5x", "size of the weights is 0.416 x the original's (269 MB → 112 MB), at most 0.5 x allowed"),
        ("kl<=0.05", "KL divergence to the original is 0.04, at most 0.05 allowed"),
        ("tpot<=-10%", "time per output token fell by 60 % (50.0 ms → 20.0 ms), at most -10 % allowed"),
        ("top1>=0.95", "top-1 agreement with the original is 0.93, at least 0.95 required"),
    ],
)
def test_the_explanation_is_in_words(text: str, words: str) -> None:
    assert judge(text).explanation == words


def test_a_metric_that_was_not_measured_fails_with_the_reason() -> None:
    result = judge("joules_per_token<=0.9x")
    assert (result.passed, result.measured) == (False, None)
    assert result.explanation == "joules per token was not measured: no energy counter on a CPU"


def test_a_change_from_zero_fails_rather_than_divide() -> None:
    result = judge("sinks<=+5%")
    assert (result.passed, result.measured) == (False, None)
    assert "was 0 before" in result.explanation


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ppl", "is not METRIC OP LIMIT"),
        ("ppl==3", "is not METRIC OP LIMIT"),
        ("ppl<=", "is not METRIC OP LIMIT"),
        ("ppl<=3%", r"write '\+3%' or '-3%' for a change"),
        ("pppl<=3", "unknown metric 'pppl' \\(did you mean 'ppl'"),
        ("kl<=+3%", "already compares with the original"),
        ("top1>=0.9x", "already compares with the original"),
        ("ppl<=nan", "is not METRIC OP LIMIT"),
    ],
)
def test_a_gate_that_means_nothing_is_refused(text: str, message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        parse(text)


def test_every_metric_can_be_asked_for() -> None:
    for name in METRICS:
        assert parse(f"{name}<=1").metric == name
