"""Samples, prompts files, and the call of a pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from passes.base import PassError
from passes.lemica import inputs
from passes.lemica.inputs import (
    CALIBRATION_PROMPTS,
    HELD_OUT_PROMPTS,
    Sample,
    calibration_samples,
    classes,
    generate,
    held_out_samples,
    read_conditions,
    takes_batches,
)
from tests.passes.lemica.tiny_pipelines import dit, wan


class Prompted:
    """Nothing but the signature of a pipeline that takes prompts."""

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        num_inference_steps: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> None:
        raise NotImplementedError


class Single:
    """The signature of one that takes one prompt only."""

    def __call__(self, prompt: str, num_inference_steps: int = 50, generator: torch.Generator | None = None) -> None:
        raise NotImplementedError


class Imaged:
    """The signature of one that needs an image as well."""

    def __call__(self, image: Any, prompt: str | list[str], num_inference_steps: int = 50) -> None:
        raise NotImplementedError


class Unasked:
    """The signature of one that takes neither prompts nor classes."""

    def __call__(self, num_inference_steps: int = 50) -> None:
        raise NotImplementedError


# --- samples ---------------------------------------------------------------------------------------------------------


def test_default_prompts_are_a_dozen_and_have_nothing_in_common() -> None:
    assert len(set(CALIBRATION_PROMPTS)) == len(CALIBRATION_PROMPTS) == 12
    assert len(set(HELD_OUT_PROMPTS)) == len(HELD_OUT_PROMPTS) == 12
    assert not set(CALIBRATION_PROMPTS) & set(HELD_OUT_PROMPTS)


@pytest.mark.parametrize("count", [1, 5, 12, 30])
@pytest.mark.parametrize("by_class", [False, True])
def test_held_out_samples_share_nothing_with_calibration(count: int, by_class: bool) -> None:
    pipeline = dit(layers=1) if by_class else Prompted()
    calibration = calibration_samples(pipeline, count, seed=5)
    held_out = held_out_samples(pipeline, calibration, count)
    assert len(set(calibration)) == len(set(held_out)) == count
    assert not {item.condition for item in calibration} & {item.condition for item in held_out}
    assert not {item.seed for item in calibration} & {item.seed for item in held_out}


def test_held_out_prompts_avoid_those_of_a_file() -> None:
    calibration = calibration_samples(Prompted(), 3, conditions=HELD_OUT_PROMPTS[:3])
    held_out = held_out_samples(Prompted(), calibration, 24)
    assert not {item.condition for item in calibration} & {item.condition for item in held_out}


def test_a_class_by_its_label_is_not_held_out() -> None:
    held_out = held_out_samples(dit(layers=1), [Sample("class 4", 0)], 20)
    assert 4 not in {item.condition for item in held_out}


def test_a_pipeline_of_one_class_has_held_out_seeds_only() -> None:
    pipeline = dit(classes=1, layers=1)
    calibration = calibration_samples(pipeline, 2)
    held_out = held_out_samples(pipeline, calibration, 2)
    assert {item.condition for item in held_out} == {0}
    assert not {item.seed for item in calibration} & {item.seed for item in held_out}


def test_classes_are_those_with_labels_or_all() -> None:
    pipeline = dit(classes=10, layers=1)
    assert classes(pipeline) == tuple(range(10))
    pipeline.labels = {}
    assert classes(pipeline) == tuple(range(1000))


@pytest.mark.parametrize(("count", "seed"), [(0, 0), (2, -1), (2, inputs.HELD_OUT_SEEDS - 1)])
def test_samples_that_could_be_held_out_are_refused(count: int, seed: int) -> None:
    with pytest.raises(PassError, match="give"):
        calibration_samples(Prompted(), count, seed=seed)


# --- prompts files ---------------------------------------------------------------------------------------------------


def test_prompts_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeffA café\n\n  two owls \r\n", encoding="utf-8")
    assert read_conditions(Prompted(), path) == ("A café", "two owls")


def test_classes_file(tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    path.write_text("3\nclass 7\n", encoding="utf-8")
    assert read_conditions(dit(layers=1), path) == (3, 7)


@pytest.mark.parametrize("content", ["", "\n  \n"])
def test_an_empty_file_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "nothing.txt"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(PassError, match=r"nothing.txt' is empty; write one prompt a line"):
        read_conditions(Prompted(), path)
    with pytest.raises(PassError, match=r"nothing.txt' is empty; write one class a line"):
        read_conditions(dit(layers=1), path)


def test_files_that_are_no_text_are_named(tmp_path: Path) -> None:
    path = tmp_path / "binary"
    path.write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(PassError, match="binary' cannot be read"):
        read_conditions(Prompted(), path)
    with pytest.raises(PassError, match="missing' cannot be read"):
        read_conditions(Prompted(), tmp_path / "missing")


@pytest.mark.parametrize(
    ("line", "message"),
    [("class 77", "did you mean 'class 7'"), ("10", "class 10 is not one of 10"), ("xyz", "a number between 0 and 9")],
)
def test_unknown_classes_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "classes.txt"
    path.write_text(line, encoding="utf-8")
    with pytest.raises(PassError, match=message):
        read_conditions(dit(layers=1), path)


# --- calls -----------------------------------------------------------------------------------------------------------


def test_final_latents_are_those_of_the_last_step() -> None:
    pipeline, seen = dit(layers=1), []
    step = pipeline.scheduler.step

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append(step(*args, **kwargs))
        return seen[-1]

    pipeline.scheduler.step = watched
    latents = generate(pipeline, [Sample(1, 5), Sample(2, 6)], steps=4, arguments={})
    assert len(seen) == 4
    assert latents.shape == (2, 4, 8, 8)
    assert torch.equal(latents, seen[-1].prev_sample[:2])
    assert pipeline.scheduler.step is watched
    decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    pictures = generate(pipeline, [Sample(1, 5), Sample(2, 6)], steps=4, arguments={}, output="pt")
    assert torch.allclose(pictures, (decoded / 2 + 0.5).clamp(0, 1), atol=1e-6)


def test_noise_does_not_depend_on_the_batch() -> None:
    pipeline, samples = dit(layers=1), [Sample(1, 5), Sample("class 2", 6), Sample("3", 7)]
    together = generate(pipeline, samples, steps=3, arguments={"guidance_scale": 2.0})
    for row, sample in zip(together, samples, strict=True):
        alone = generate(pipeline, [sample], steps=3, arguments={"guidance_scale": 2.0})
        assert torch.allclose(row, alone[0], atol=1e-5)


def test_pictures() -> None:
    pictures = generate(dit(layers=1), [Sample(1, 5), Sample(2, 6)], steps=2, arguments={}, output="pil")
    assert [picture.size for picture in pictures] == [(16, 16), (16, 16)]


def test_random_state_and_progress_bar_are_put_back() -> None:
    pipeline = dit(layers=1)
    pipeline.set_progress_bar_config(desc="mine")
    state = torch.random.get_rng_state()
    generate(pipeline, [Sample(1, 5)], steps=2, arguments={})
    assert torch.equal(torch.random.get_rng_state(), state)
    assert pipeline._progress_bar_config == {"desc": "mine"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"guidance": 2.0}, "takes no argument 'guidance'; did you mean 'guidance_scale'?"),
        ({"zzz": 2.0}, "takes no argument 'zzz'; it takes: guidance_scale"),
        ({"generator": None}, "'generator' of DiTPipeline is set by each run"),
    ],
)
def test_arguments_that_the_call_does_not_take(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(PassError, match=message):
        generate(dit(layers=1), [Sample(1, 5)], steps=2, arguments=arguments)


def test_values_that_the_call_refuses() -> None:
    pipeline = wan().pipeline
    with pytest.raises(PassError, match=r"WanPipeline refuses the call with height=36: .*divisible by 16"):
        generate(pipeline, [Sample("a", 5)], steps=2, arguments={"height": 36})


def test_arguments_that_the_call_needs() -> None:
    with pytest.raises(PassError, match="Imaged needs the argument 'image'"):
        generate(Imaged(), [Sample("a", 5)], steps=2, arguments={})


def test_batches_after_the_signature() -> None:
    assert takes_batches(dit(layers=1))
    assert takes_batches(Prompted())
    assert not takes_batches(Single())
    assert not takes_batches(Imaged())


def test_pipelines_of_other_inputs_are_refused() -> None:
    with pytest.raises(PassError, match="Unasked takes neither 'prompt' nor 'class_labels'"):
        calibration_samples(Unasked(), 1)
