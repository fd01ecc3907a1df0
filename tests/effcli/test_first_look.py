"""A gate that is clearly missed on little text ends a run before the full measurement; noise alone does not."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from effcli import first_look, gates
from effcli.errors import GivenUpError
from effcli.pipeline import optimize
from effcli.recipes import from_mapping
from effcli.staging import folder_for

QUALITY = {
    "perplexity": {"after": 12.0, "interval": [10.5, 13.5], "ratio": 1.10, "ratio_interval": [1.04, 1.16]},
    "kl": {"mean": 0.08, "interval": [0.06, 0.10], "p99": 0.9, "p99_interval": None},
    "top1_agreement": 0.80,
    "top1_interval": [0.75, 0.86],
    "tokens": 1022,
}


def look(*texts: str) -> None:
    job = SimpleNamespace(gates=tuple(gates.parse(text) for text in texts))
    first_look.check(cast(Any, job), cast(Any, SimpleNamespace(folder=Path("/staged"))), QUALITY)


@pytest.mark.parametrize(
    "gate", ["ppl<=+5%", "ppl<=1.05x", "ppl<=11", "kl<=0.07", "kl<0.0601", "top1>=0.85", "kl_p99<=0.1", "size<=0.1x"]
)
def test_what_the_interval_leaves_open_goes_on(gate: str) -> None:
    look(gate)


@pytest.mark.parametrize("gate", ["ppl<=+3%", "ppl<=1.03x", "ppl<=10", "kl<=0.05", "top1>=0.9"])
def test_what_even_the_better_end_misses_is_given_up(gate: str) -> None:
    with pytest.raises(GivenUpError) as given_up:
        look("size<=2x", gate)
    assert str(given_up.value).startswith(f"gate '{gate}' will not hold: ")
    assert "on the first 1022 tokens" in str(given_up.value)
    assert given_up.value.figures == {"ppl": 12.0, "kl": 0.08, "kl_p99": 0.9, "top1": 0.80}
    assert given_up.value.exit_code == 3


@pytest.mark.slow
@pytest.mark.thorough
def test_a_run_ends_at_its_first_look_and_goes_on_with_other_gates(tiny_folder: Path, tmp_path: Path) -> None:
    def recipe(gate: str) -> Any:
        return from_mapping(
            {
                "version": 1,
                "passes": [{"quantize": {"scheme": "w4a16", "group_size": 16, "method": "rtn"}}],
                "evaluation": {"tokens": 512, "context": 64, "first_look": 128},
                "gates": [gate],
            }
        )

    out = tmp_path / "out"
    with pytest.raises(GivenUpError, match=r"on the first 126 tokens"):
        optimize(str(tiny_folder), recipe("kl<=0.0000001"), out, context=32)
    assert not out.exists()
    assert not (folder_for(out) / "after").exists()
    report = optimize(str(tiny_folder), recipe("kl<=10"), out, context=32, resume=True)
    assert report.status == "passed"  # type: ignore[union-attr]
    assert report.quality["tokens"] == 8 * 63  # type: ignore[union-attr]
    assert any(stage.stage == "first look: quality" for stage in report.stages)  # type: ignore[union-attr]
