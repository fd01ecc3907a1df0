"""Each edge of the graph against a run of its own; what a kill, little memory and noise leave of it."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from passes.base import PassDoesNotFitError, PassError
from passes.lemica import graph, inputs, recording, replay
from passes.lemica.driving import Residual
from passes.lemica.graph import build, edges_of
from passes.lemica.hook import Follower, attach
from passes.lemica.inputs import Sample, generate
from passes.lemica.schedule import ErrorGraph, Schedule
from tests.passes.lemica.tiny_pipelines import dit

STEPS, GAP = 8, 4
SAMPLES = (Sample(3, 11), Sample(7, 12))


def check_against_brute_force(
    pipeline: Any, found: ErrorGraph, arguments: dict[str, Any], *, output: Any = "latent", mode: Any = "auto"
) -> None:
    """Hold each edge against a run of its own, from step 0, in which only the edge's segment is cached."""

    def run(full: tuple[int, ...]) -> torch.Tensor:
        with attach(pipeline, Follower(Schedule(name="one", steps=STEPS, full=full)), mode=mode):
            result: torch.Tensor = generate(pipeline, SAMPLES, steps=STEPS, arguments=arguments, output=output)
        return result.double()

    assert found.edges == tuple(edges_of(STEPS, GAP))
    uncached = run(tuple(range(STEPS)))
    largest = 0.0
    for (start, end), errors in zip(found.edges, found.errors, strict=True):
        cached = run(tuple(step for step in range(STEPS) if not start < step < end))
        expected = (cached - uncached).abs().flatten(1).mean(1).tolist()
        assert errors == pytest.approx(expected, rel=1e-5, abs=2e-6), (start, end)
        largest = max(largest, *expected)
    assert largest > 1e-3  # reuse does something here


class Counter:
    """Counts the rows that a denoiser's first block computes, in units of one row."""

    def __init__(self, pipeline: Any, *, most: int | None = None) -> None:
        self.rows = 0
        self.largest = 0
        block = pipeline.transformer.transformer_blocks[0].attn1
        forward = block.forward

        def counted(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            rows = hidden_states.shape[0]
            if most is not None and rows > most:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
            self.rows += rows
            self.largest = max(self.largest, rows)
            return forward(hidden_states, *args, **kwargs)

        block.forward = counted


def calibrate(pipeline: Any, work: Path, **options: Any) -> ErrorGraph:
    return build(pipeline, SAMPLES, **({"steps": STEPS, "max_gap": GAP, "arguments": {}, "work": work} | options))


@pytest.mark.parametrize("guidance", [4.0, 1.0])
def test_each_edge_is_as_in_a_run_by_itself(tmp_path: Path, guidance: float) -> None:
    pipeline, arguments = dit(layers=2), {"guidance_scale": guidance}
    found = calibrate(pipeline, tmp_path, arguments=arguments)
    check_against_brute_force(pipeline, found, arguments)
    assert found.noise < 1e-4


def test_schedulers_with_memory(tmp_path: Path) -> None:
    from diffusers import DPMSolverMultistepScheduler

    pipeline = dit(layers=2)
    pipeline.scheduler = DPMSolverMultistepScheduler(algorithm_type="dpmsolver++")
    found = calibrate(pipeline, tmp_path)
    check_against_brute_force(pipeline, found, {})


def test_decoded_distance(tmp_path: Path) -> None:
    pipeline = dit(layers=2)
    found = calibrate(pipeline, tmp_path, distance="decoded")
    assert found.distance == "decoded"
    check_against_brute_force(pipeline, found, {}, output="pt")


def test_whole_output_mode(tmp_path: Path) -> None:
    pipeline = dit(layers=2)
    found = calibrate(pipeline, tmp_path, mode="output")
    check_against_brute_force(pipeline, found, {}, mode="output")
    stored = recording.Recording(tmp_path / "recording", 0)
    assert stored.whole_output
    assert torch.equal(stored.residual(0, 3, 0).hidden, stored.output(0, 3, 0))


def test_a_pipeline_is_left_as_it_was(tmp_path: Path) -> None:
    pipeline = dit(layers=2)
    before = generate(pipeline, SAMPLES, steps=4, arguments={})
    scheduler, attributes = dict(vars(pipeline.scheduler)), set(vars(pipeline))
    state = torch.random.get_rng_state()
    calibrate(pipeline, tmp_path)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert set(vars(pipeline)) == attributes
    assert "step" not in vars(pipeline.scheduler) and set(vars(pipeline.scheduler)) == set(scheduler)
    assert torch.equal(generate(pipeline, SAMPLES, steps=4, arguments={}), before)


def test_a_combined_residual_takes_the_place_of_the_last(tmp_path: Path) -> None:
    asked = set()

    def halved(full: int, skipped: int, branch: int, residual: Residual) -> Residual:
        asked.add((full, skipped, branch))
        return residual.map(lambda item: item * 0.5 ** (skipped - full))

    pipeline = dit(layers=2)
    found = calibrate(pipeline, tmp_path, reuse="fitted", combine=halved)
    assert found.reuse == "fitted"
    # A pair is asked for wherever a batch has a row with an edge from the full step over the skipped one.
    assert asked == {(i, s, 0) for i, j in found.edges for s in range(i + 1, j)}

    uncached = generate(pipeline, SAMPLES, steps=STEPS, arguments={}).double()
    for (start, end), errors in zip(found.edges, found.errors, strict=True):
        full = tuple(step for step in range(STEPS) if not start < step < end)
        driver = Follower(
            Schedule(name="one", steps=STEPS, full=full),
            lambda step, branch, residuals, start=start: halved(start, step, branch, residuals[0]),  # type: ignore[misc]
        )
        with attach(pipeline, driver):
            cached = generate(pipeline, SAMPLES, steps=STEPS, arguments={}).double()
        expected = (cached - uncached).abs().flatten(1).mean(1).tolist()
        assert errors == pytest.approx(expected, rel=1e-5, abs=2e-6), (start, end)


def test_reuse_and_combine_belong_together(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'last' needs none"):
        calibrate(dit(layers=2), tmp_path, reuse="fitted")


# --- cost ------------------------------------------------------------------------------------------------------------


def test_full_calls_are_those_of_the_formula(tmp_path: Path) -> None:
    pipeline = dit(layers=2)
    counter = Counter(pipeline)
    found = calibrate(pipeline, tmp_path)
    assert found.forwards == STEPS + sum(STEPS - end for _, end in found.edges)
    assert counter.rows == found.forwards * len(SAMPLES) * 2  # two branches of guidance in one batch
    assert found.equivalent_runs == found.forwards / STEPS


def test_the_formula_at_fifty_steps() -> None:
    edges = edges_of(50, 8)
    assert len(edges) == 315
    assert sum(50 - end for _, end in edges) == 7259


def test_edges_of_one_end_share_a_batch(tmp_path: Path) -> None:
    pipeline = dit(layers=2)
    counter = Counter(pipeline)
    calibrate(pipeline, tmp_path)
    assert counter.largest == (GAP - 1) * len(SAMPLES) * 2


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [8, 2])
def test_out_of_memory_halves_the_batch(tmp_path: Path, most: int) -> None:
    expected = calibrate(dit(layers=2), tmp_path / "whole")
    pipeline = dit(layers=2)
    counter = Counter(pipeline, most=most)
    found = calibrate(pipeline, tmp_path / "halved")
    assert counter.largest == most
    assert found.edges == expected.edges
    assert found.forwards == expected.forwards
    for errors, others in zip(found.errors, expected.errors, strict=True):
        assert errors == pytest.approx(others, rel=1e-4, abs=2e-6)


def test_one_row_that_does_not_fit_is_an_error(tmp_path: Path) -> None:
    pipeline = dit(layers=2)
    Counter(pipeline, most=1)
    with pytest.raises(PassDoesNotFitError, match="one sample by itself"):
        calibrate(pipeline, tmp_path)


def test_a_batch_bounds_every_call(tmp_path: Path) -> None:
    pipeline = dit(layers=2)
    counter = Counter(pipeline)
    found = calibrate(pipeline, tmp_path, batch=3)
    assert counter.largest == 3 * 2
    check_against_brute_force(pipeline, found, {})


def test_only_what_a_batch_needs_is_read(tmp_path: Path) -> None:
    calibrate(dit(layers=2), tmp_path)
    stored = recording.Recording(tmp_path / "recording", 0)
    end, starts = 6, [2, 3, 4]
    driver = replay.Replayer(
        stored, 0, [(start, sample) for start in starts for sample in (0, 1)], end, device=torch.device("cpu")
    )
    replay.replay(dit(layers=2), SAMPLES, driver, inference_steps=STEPS, arguments={}, mode="residual", output="latent")
    # Outputs up to the last start, residuals of the starts, and one of step 0 that tells how outputs are wrapped.
    assert stored.reads == (max(starts) + 1) + len(starts) + 1
    assert stored.held_bytes == 0


def test_reads_are_kept_up_to_a_bound(tmp_path: Path) -> None:
    calibrate(dit(layers=2), tmp_path)
    folder = tmp_path / "recording"
    size = recording.Recording(folder, 0).residual(0, 0, 0).bytes
    bounded = recording.Recording(folder, 2 * size)
    for step in (0, 1, 1, 0, 2, 2, 0):
        bounded.residual(0, step, 0)
        assert bounded.held_bytes <= 2 * size
    assert bounded.reads == 3
    bounded.residual(0, 1, 0)  # it had to go for that of step 2
    assert bounded.reads == 4


def test_a_full_disk_is_named_before_it_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 0, 60_000))
    with pytest.raises(PassDoesNotFitError, match=r"the recording takes 0\.\d GB and '.*recording' has 0\.0 GB"):
        calibrate(dit(layers=2), tmp_path)


class Encoder:
    """A pipeline's ``encode_prompt``, counted."""

    def __init__(self) -> None:
        self.calls = 0

    def encode_prompt(self, prompt: Any, device: Any = None, prompt_embeds: Any = None) -> torch.Tensor:
        self.calls += 1
        return torch.full((len(prompt),), float(self.calls))


def test_prompts_are_encoded_once() -> None:
    pipeline = Encoder()
    with graph.encoding_prompts_once(pipeline):
        first = pipeline.encode_prompt(["a", "b"], device=torch.device("cpu"))
        assert torch.equal(pipeline.encode_prompt(["a", "b"], device=torch.device("cpu")), first)
        assert pipeline.calls == 1
        pipeline.encode_prompt(["b", "a"], device=torch.device("cpu"))
        assert pipeline.calls == 2
        for _ in range(2):  # tensors are not told apart by their text
            pipeline.encode_prompt(["a", "b"], prompt_embeds=torch.zeros(3000))
        assert pipeline.calls == 4
        for number in range(graph.ENCODED_KEPT):
            pipeline.encode_prompt([str(number)])
        pipeline.encode_prompt(["a", "b"], device=torch.device("cpu"))  # the first was dropped
        assert pipeline.calls == 5 + graph.ENCODED_KEPT
    assert "encode_prompt" not in vars(pipeline)


# --- going on --------------------------------------------------------------------------------------------------------


class Interrupting:
    """A progress that is interrupted once a number of full steps of the graph are done."""

    def __init__(self, after: float) -> None:
        self.left = after

    def task(self, description: str, total: float | None = None) -> Any:
        import contextlib

        outer = self

        class Line:
            def advance(self, steps: float = 1.0) -> None:
                if description == "error graph":
                    outer.left -= steps
                    if outer.left < 0:
                        raise KeyboardInterrupt

            def describe(self, text: str) -> None:
                return None

        return contextlib.nullcontext(Line())


def test_an_interrupted_build_goes_on(tmp_path: Path) -> None:
    expected = calibrate(dit(layers=2), tmp_path / "whole")
    pipeline = dit(layers=2)
    counter = Counter(pipeline)
    with pytest.raises(KeyboardInterrupt):
        calibrate(pipeline, tmp_path / "work", progress=Interrupting(60))
    measured = [json.loads(line) for line in (tmp_path / "work/journal.jsonl").read_text().splitlines()]
    edges = [tuple(line["edge"]) for line in measured if "edge" in line]
    assert 0 < len(edges) < len(expected.edges)
    before = counter.rows
    found = calibrate(pipeline, tmp_path / "work")
    assert found == expected
    left = sum(STEPS - end for start, end in expected.edges if (start, end) not in edges)
    assert counter.rows - before == left * len(SAMPLES) * 2  # neither recorded nor measured again


def test_a_finished_build_runs_nothing(tmp_path: Path) -> None:
    pipeline = dit(layers=2)
    expected = calibrate(pipeline, tmp_path)
    counter = Counter(pipeline)
    assert calibrate(pipeline, tmp_path) == expected
    assert counter.rows == 0


def test_a_larger_gap_measures_only_the_new_edges(tmp_path: Path) -> None:
    pipeline = dit(layers=2)
    calibrate(pipeline, tmp_path, max_gap=3)
    counter = Counter(pipeline)
    found = calibrate(pipeline, tmp_path, max_gap=4)
    assert counter.rows == sum(STEPS - end for start, end in found.edges if end - start == 4) * len(SAMPLES) * 2


@pytest.mark.parametrize("change", ["samples", "steps", "arguments", "scheduler", "weights"])
def test_what_was_measured_of_something_else_is_not_used(tmp_path: Path, change: str) -> None:
    from diffusers import DPMSolverMultistepScheduler

    calibrate(dit(layers=2), tmp_path / "work")
    pipeline, options, samples = dit(layers=2), {"steps": STEPS, "arguments": {}}, SAMPLES
    if change == "samples":
        samples = (Sample(3, 11), Sample(7, 13))
    elif change == "steps":
        options["steps"] = STEPS - 1
    elif change == "arguments":
        options["arguments"] = {"guidance_scale": 2.0}
    elif change == "scheduler":
        pipeline.scheduler = DPMSolverMultistepScheduler()
    else:
        with torch.no_grad():
            pipeline.transformer.proj_out_2.weight.mul_(1.1)
    found = build(pipeline, samples, max_gap=GAP, work=tmp_path / "work", **options)  # type: ignore[arg-type]
    assert found == build(pipeline, samples, max_gap=GAP, work=tmp_path / "fresh", **options)  # type: ignore[arg-type]


def test_a_line_cut_short_is_measured_again(tmp_path: Path) -> None:
    pipeline = dit(layers=2)
    expected = calibrate(pipeline, tmp_path)
    journal = tmp_path / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-9])
    counter = Counter(pipeline)
    found = calibrate(pipeline, tmp_path)
    assert counter.rows == len(SAMPLES) * 2  # that edge alone, which ends at the last step
    for errors, others in zip(found.errors, expected.errors, strict=True):
        assert errors == pytest.approx(others, rel=1e-4, abs=2e-6)


KILLED = """
import sys
from pathlib import Path
from passes.lemica.graph import build
from tests.passes.lemica.test_graph import SAMPLES, STEPS, GAP
from tests.passes.lemica.tiny_pipelines import dit
build(dit(layers=2), SAMPLES, steps=STEPS, max_gap=GAP, arguments={}, work=Path(sys.argv[1]), batch=1)
"""


@pytest.mark.thorough
def test_a_killed_build_goes_on(tmp_path: Path) -> None:
    journal = tmp_path / "work/journal.jsonl"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "work")], cwd=Path(__file__).parents[3])
    try:
        deadline = time.monotonic() + 120
        while not journal.is_file() or journal.read_bytes().count(b"\n") < 5:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    pipeline = dit(layers=2)
    counter = Counter(pipeline)
    found = calibrate(pipeline, tmp_path / "work", batch=1)
    expected = calibrate(dit(layers=2), tmp_path / "whole", batch=1)
    assert found == expected
    assert counter.rows < found.forwards * len(SAMPLES) * 2


# --- what cannot be calibrated ---------------------------------------------------------------------------------------


def test_noise_of_a_scheduler_is_replayed_in_the_recorded_batch(tmp_path: Path) -> None:
    from diffusers import DDPMScheduler

    pipeline = dit(layers=2)
    pipeline.scheduler = DDPMScheduler(variance_type="fixed_small", clip_sample=False)
    counter = Counter(pipeline)
    found = calibrate(pipeline, tmp_path)
    assert counter.largest == len(SAMPLES) * 2  # one edge at a time
    assert found.noise < 1e-3
    assert found.forwards == STEPS + sum(STEPS - end for _, end in found.edges)


def test_noise_that_no_seed_controls_is_refused(tmp_path: Path) -> None:
    pipeline = dit(layers=2)
    step, generator = pipeline.scheduler.step, torch.Generator()

    def noisy(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        result.prev_sample = result.prev_sample + torch.randn(result.prev_sample.shape, generator=generator)
        return result

    pipeline.scheduler.step = noisy
    with pytest.raises(PassError, match="not deterministic.*DDIMScheduler.*eta=0"):
        calibrate(pipeline, tmp_path)


def test_pipelines_without_batches_are_asked_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = calibrate(dit(layers=2), tmp_path / "batches")
    for module in (inputs, graph, recording):
        monkeypatch.setattr(module, "takes_batches", lambda pipeline: False)
    pipeline = dit(layers=2)
    counter = Counter(pipeline)
    with pytest.MonkeyPatch.context() as patch:
        # What such a pipeline takes: one class, one generator. DiTPipeline wants its one class in a list.
        patch.setattr(inputs, "_conditions", lambda _, group: {"class_labels": [item.condition for item in group]})
        found = calibrate(pipeline, tmp_path / "single")
    assert counter.largest == 2
    for errors, others in zip(found.errors, expected.errors, strict=True):
        assert errors == pytest.approx(others, rel=1e-4, abs=2e-6)


def test_results_that_are_not_finite_name_the_sample(tmp_path: Path) -> None:
    pipeline = dit(layers=2)
    with torch.no_grad():
        pipeline.transformer.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.weight[7] = float("nan")
    with pytest.raises(PassError, match="without reuse of 7, seed 12, is not finite in torch.float32; load"):
        calibrate(pipeline, tmp_path)


def test_edges_that_are_not_finite_are_named(tmp_path: Path) -> None:
    def broken(full: int, skipped: int, branch: int, residual: Residual) -> Residual:
        return residual.map(lambda item: item * float("nan")) if full == 2 else residual

    with pytest.raises(PassError, match=r"edge \(2, 4\) is not finite for 3, seed 11; load"):
        calibrate(dit(layers=2), tmp_path, reuse="fitted", combine=broken)


@pytest.mark.parametrize(("options", "message"), [({"max_gap": 1}, "at least 2"), ({"steps": 2}, "leave none to skip")])
def test_what_makes_no_graph_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(PassError, match=message):
        calibrate(dit(layers=2), tmp_path, **options)


def test_no_samples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PassError, match="no samples"):
        build(dit(layers=2), (), steps=STEPS, max_gap=GAP, arguments={}, work=tmp_path)
