"""The graph of every family of pipelines, each edge against a run of its own, in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from passes.lemica.graph import build
from passes.lemica.hook import Follower, attach
from passes.lemica.inputs import Sample, generate
from passes.lemica.schedule import ErrorGraph, Schedule
from tests.passes.lemica import tiny_pipelines
from tests.passes.lemica.tiny_pipelines import Tiny

PROMPTS = 3
SAMPLES = (Sample("2", 11), Sample("0", 12))


def prompted(tiny: Tiny, *, padded: bool = False) -> Any:
    """Return a family's pipeline, which has no text encoder, as one that takes prompts: numbers of rows of states.

    With ``padded``, prompt n has n + 3 tokens, and a batch as many as its longest.
    """
    kind = type(tiny.pipeline)
    table = tiny.arguments(PROMPTS)

    def picked(value: Any, rows: list[int]) -> Any:
        if isinstance(value, torch.Tensor) and value.shape[0] == PROMPTS:
            return value[rows]
        return [value[row] for row in rows] if isinstance(value, list) and len(value) == PROMPTS else value

    def call(
        self: Any,
        prompt: str | list[str],
        num_inference_steps: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> Any:
        rows = [int(prompt)] if isinstance(prompt, str) else [int(item) for item in prompt]
        states = {name: picked(value, rows) for name, value in table.items()}
        if padded:
            for name in ("prompt_embeds", "negative_prompt_embeds"):
                states[name] = states[name][:, : max(rows) + 3]
        return kind.__call__(self, num_inference_steps=num_inference_steps, generator=generator, **states)

    tiny.pipeline.__class__ = type(kind.__name__, (kind,), {"__call__": call})
    return tiny.pipeline


def check(pipeline: Any, found: ErrorGraph, mode: Any = "auto") -> None:
    def run(full: tuple[int, ...]) -> torch.Tensor:
        with attach(pipeline, Follower(Schedule(name="one", steps=found.steps, full=full)), mode=mode):
            return generate(pipeline, SAMPLES, steps=found.steps, arguments={}).double()  # type: ignore[no-any-return]

    uncached = run(tuple(range(found.steps)))
    for (start, end), errors in zip(found.edges, found.errors, strict=True):
        cached = run(tuple(step for step in range(found.steps) if not start < step < end))
        expected = (cached - uncached).abs().flatten(1).mean(1).tolist()
        assert errors == pytest.approx(expected, rel=1e-5, abs=1e-7), (start, end)
    assert max(map(max, found.errors)) > 1e-4


FAMILIES: dict[str, Callable[[], Tiny]] = {
    "pixart_alpha": tiny_pipelines.pixart_alpha,
    "sd3": tiny_pipelines.sd3,
    "flux": tiny_pipelines.flux,
    "qwen_image": tiny_pipelines.qwen_image,
    "wan": tiny_pipelines.wan,
    "hunyuan_video": tiny_pipelines.hunyuan_video,
    "cogvideox": tiny_pipelines.cogvideox,
    "ltx_video": tiny_pipelines.ltx_video,
    "latte": tiny_pipelines.latte,
    "z_image": tiny_pipelines.z_image,
    "sd15": tiny_pipelines.sd15,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_each_edge_is_as_in_a_run_by_itself(tmp_path: Path, name: str) -> None:
    pipeline = prompted(FAMILIES[name]())
    found = build(pipeline, SAMPLES, steps=5, max_gap=3, arguments={}, work=tmp_path)
    assert found.noise < 1e-6
    assert '"as_recorded": false' in (tmp_path / "journal.jsonl").read_text()  # edges in batches
    check(pipeline, found)


def test_a_segment_over_the_change_of_transformers(tmp_path: Path) -> None:
    """Wan 2.2: the first step of the other transformer has nothing to reuse, and runs in full within the segment."""
    pipeline = prompted(tiny_pipelines.wan(two=True))
    found = build(pipeline, SAMPLES, steps=6, max_gap=4, arguments={}, work=tmp_path)
    check(pipeline, found)
    assert found.forwards > found.steps + sum(found.steps - end for _, end in found.edges)


@pytest.mark.parametrize("limit", [1, 3])
def test_texts_padded_to_the_longest_of_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """A batch without the longest text has other shapes than the recorded one: edges are replayed one at a time."""
    tiny = tiny_pipelines.flux()
    pipeline = prompted(tiny, padded=True)
    monkeypatch.setattr("passes.lemica.graph._rows_that_fit", lambda *_: limit)
    found = build(pipeline, SAMPLES, steps=5, max_gap=3, arguments={}, work=tmp_path)
    assert '"as_recorded": true' in (tmp_path / "journal.jsonl").read_text()
    check(pipeline, found)
    assert found == build(pipeline, SAMPLES, steps=5, max_gap=3, arguments={}, work=tmp_path)
