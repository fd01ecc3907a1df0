"""What a pipeline is asked for, and the one place that calls it.

::

    prompts file or defaults ──> Sample (prompt or class, seed) ──generate──> final latents, decoded tensors or pictures
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from passes.base import PassError

if TYPE_CHECKING:
    import torch

Output = Literal["latent", "pt", "pil"]

CALIBRATION_PROMPTS = (
    "A red bicycle leaning against a brick wall in the afternoon",
    "A bowl of oranges on a wooden kitchen table",
    "Waves breaking on a rocky shore under a grey sky",
    "A grey cat asleep on a folded blanket",
    "A narrow street with lanterns after rain",
    "A lighthouse on a cliff, painted in watercolour",
    "Snow falling on a row of pine trees",
    "An old steam train crossing a stone bridge",
    "A woman in a yellow coat reading on a park bench",
    "A close view of a bee on a purple flower",
    "A desk with an open notebook, a lamp and a cup of tea",
    "Hot air balloons above green hills at sunrise",
)
HELD_OUT_PROMPTS = (
    "A wooden boat tied to a pier on a calm lake",
    "A brown dog running through tall grass",
    "A market stall with baskets of vegetables",
    "A mountain village with smoke rising from chimneys",
    "A glass vase with white tulips by a window",
    "A blue tram turning a corner in an old town",
    "Two children flying a kite on a wide beach",
    "A clay teapot and four small cups, oil painting",
    "A heron standing in shallow water at dusk",
    "Shelves of books and a ladder in a quiet library",
    "A desert road that leads to distant red rocks",
    "A baker taking loaves of bread from an oven",
)
HELD_OUT_SEEDS = 1_000_000
"""Where the seeds of held-out samples start, beyond those of any calibration."""

_OWN_ARGUMENTS = frozenset(
    {"prompt", "class_labels", "generator", "num_inference_steps", "output_type", "return_dict", "latents", "timesteps"}
    | {"sigmas", "num_images_per_prompt", "num_videos_per_prompt"}
)


class RefusedCallError(PassError, ValueError):
    """A pipeline does not take what it is called with; the message is the pipeline's."""


@dataclass(frozen=True)
class Sample:
    """One result that a pipeline is asked for.

    Attributes
    ----------
    condition : str or int
        The prompt; for class-conditional pipelines the class, by number or by label.
    seed : int
        Of its noise.
    """

    condition: str | int
    seed: int


class _Denoised(Exception):
    """Ends a pipeline's call once the scheduler has made its last step."""


def takes_classes(pipeline: Any) -> bool:
    """Say whether a pipeline is asked by class instead of by prompt.

    Raises
    ------
    PassError
        If it takes neither.
    """
    known = _parameters(pipeline)
    if "class_labels" in known:
        return True
    if "prompt" in known:
        return False
    raise PassError(
        f"{type(pipeline).__name__} takes neither 'prompt' nor 'class_labels'; only pipelines that make something of "
        "a prompt or a class can be calibrated"
    )


def takes_batches(pipeline: Any) -> bool:
    """Say whether one call takes a list of prompts or classes, and a list of generators, after its signature."""
    known = _parameters(pipeline)
    condition = known["class_labels" if takes_classes(pipeline) else "prompt"]
    return "generator" in known and all(
        "list" in str(item.annotation).lower() or item.annotation is inspect.Parameter.empty
        for item in (condition, known["generator"])
    )


def classes(pipeline: Any) -> tuple[int, ...]:
    """Return the numbers of the classes that a class-conditional pipeline knows.

    Those with a label, where it has labels (``id2label``); else all that its denoiser embeds.
    """
    labels: dict[str, int] = getattr(pipeline, "labels", None) or {}
    if labels:
        return tuple(sorted({int(number) for number in labels.values()}))
    config = pipeline.transformer.config
    count = getattr(config, "num_embeds_ada_norm", None) or getattr(config, "num_classes", None)
    if not count:
        raise PassError(
            f"{type(pipeline).__name__} does not say how many classes it knows; give them in a prompts file, one a line"
        )
    return tuple(range(int(count)))


def read_conditions(pipeline: Any, path: Path) -> tuple[str | int, ...]:
    """Read prompts, or classes by number or label, one a line; empty lines count for nothing.

    Raises
    ------
    PassError
        If the file cannot be read, is empty, or names a class that the pipeline does not know.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise PassError(f"prompts file '{path}' cannot be read as UTF-8 text ({error})") from None
    found = [line for line in lines if line]
    by_class = takes_classes(pipeline)
    if not found:
        raise PassError(f"prompts file '{path}' is empty; write one {'class' if by_class else 'prompt'} a line")
    return tuple(_class_number(pipeline, line) for line in found) if by_class else tuple(found)


def calibration_samples(
    pipeline: Any, count: int, *, seed: int = 0, conditions: Sequence[str | int] | None = None
) -> tuple[Sample, ...]:
    """Return what to calibrate on: one condition after the other, each sample with a seed of its own.

    Parameters
    ----------
    pipeline : DiffusionPipeline
    count : int
        Samples; more than there are conditions begin again with other seeds.
    seed : int
        Of the first sample; below :data:`HELD_OUT_SEEDS`.
    conditions : sequence of str or int, optional
        Default: neutral prompts of this module, or every other class that the pipeline knows.

    Raises
    ------
    PassError
        If there is nothing to calibrate on, or the seeds reach those of held-out samples.
    """
    if count < 1:
        raise PassError(f"{count} calibration samples; give at least 1")
    if not 0 <= seed <= HELD_OUT_SEEDS - count:
        raise PassError(f"seed {seed} with {count} samples; give a seed between 0 and {HELD_OUT_SEEDS - count}")
    if conditions is None:
        conditions = classes(pipeline)[::2] if takes_classes(pipeline) else CALIBRATION_PROMPTS
    return tuple(Sample(conditions[number % len(conditions)], seed + number) for number in range(count))


def held_out_samples(pipeline: Any, calibration: Sequence[Sample], count: int, *, seed: int = 0) -> tuple[Sample, ...]:
    """Return samples to evaluate on: seeds that no calibration has, and prompts or classes that this one has not.

    Parameters
    ----------
    pipeline : DiffusionPipeline
    calibration : sequence of Sample
        A condition of theirs is taken only where the pipeline knows no other (a single class).
    count : int
    seed : int
        Added to :data:`HELD_OUT_SEEDS` for the first sample.
    """
    pool: tuple[str | int, ...]
    used: set[str | int]
    if takes_classes(pipeline):
        pool, used = classes(pipeline), {_class_number(pipeline, item.condition) for item in calibration}
    else:
        pool, used = HELD_OUT_PROMPTS + CALIBRATION_PROMPTS, {item.condition for item in calibration}
        pool = HELD_OUT_PROMPTS if used.isdisjoint(HELD_OUT_PROMPTS) else pool
    left = [item for item in pool if item not in used] or list(pool)
    taken = {item.seed for item in calibration}
    seeds = (number for number in range(HELD_OUT_SEEDS + seed, HELD_OUT_SEEDS + seed + count + len(taken)))
    free = [number for number in seeds if number not in taken]
    return tuple(Sample(left[number % len(left)], free[number]) for number in range(count))


def generate(
    pipeline: Any, samples: Sequence[Sample], *, steps: int, arguments: Mapping[str, Any], output: Output = "latent"
) -> Any:
    """Call the pipeline for all samples, as one batch where it takes one, else one by one.

    Each sample has a generator of its own, on the CPU: its noise depends neither on the batch nor on the device. What
    draws without a generator is seeded too; torch's own random state is left as it was.

    Parameters
    ----------
    pipeline : DiffusionPipeline
    samples : sequence of Sample
        B samples.
    steps : int
        ``num_inference_steps``.
    arguments : mapping
        Further arguments of the call: guidance, height, width, frames.
    output : {"latent", "pt", "pil"}
        ``latent``: what the scheduler's last step returned, (B, …) in the pipeline's own layout; nothing is decoded.
        ``pt``: decoded, in [0, 1], images (B, C, H, W) or videos (B, F, C, H, W). ``pil``: a list of B pictures, or
        of B lists of frames.

    Raises
    ------
    PassError
        If the call does not take an argument, needs one that is not given, or refuses a value (RefusedCallError).
    """
    import torch

    known = _parameters(pipeline)
    _check_arguments(pipeline, known, arguments)
    groups = [list(samples)] if takes_batches(pipeline) else [[item] for item in samples]
    found: list[Any] = []
    with _silent(pipeline), _random_state_kept(pipeline):
        for group in groups:
            asked = dict(arguments) | {"num_inference_steps": steps} | _conditions(pipeline, group)
            generators = [torch.Generator("cpu").manual_seed(item.seed) for item in group]
            if "generator" in known:
                asked["generator"] = generators if takes_batches(pipeline) else generators[0]
            torch.manual_seed(group[0].seed)
            try:
                if output == "latent":
                    found.append(_final_latents(pipeline, len(group), asked))
                    continue
                result = pipeline(**asked, output_type=output)[0]
            except ValueError as error:  # diffusers checks sizes and the like in the call
                name, given = type(pipeline).__name__, ", ".join(f"{key}={value}" for key, value in arguments.items())
                raise RefusedCallError(f"{name} refuses the call with {given or 'its defaults'}: {error}") from error
            stacked = output == "pt" and isinstance(result, (list, tuple))
            found.append(torch.stack(list(result)) if stacked else result)
    if output == "pil":
        return [picture for part in found for picture in part]
    return found[0] if len(found) == 1 else torch.cat(found)


def check_arguments(pipeline: Any, arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that a pipeline's call does not take, or lacks.

    Raises
    ------
    PassError
    """
    _check_arguments(pipeline, _parameters(pipeline), arguments)


def _parameters(pipeline: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(pipeline.__call__).parameters


def _check_arguments(pipeline: Any, known: Mapping[str, inspect.Parameter], arguments: Mapping[str, Any]) -> None:
    name = type(pipeline).__name__
    if "num_inference_steps" not in known:
        raise PassError(f"{name} takes no number of sampling steps; only pipelines that denoise in steps can be cached")
    free = sorted(set(known) - _OWN_ARGUMENTS)
    for key in arguments:
        if key in _OWN_ARGUMENTS:
            raise PassError(f"argument '{key}' of {name} is set by each run; leave it out")
        if key not in known:
            close = difflib.get_close_matches(key, free, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"it takes: {', '.join(free)}"
            raise PassError(f"{name} takes no argument '{key}'; {hint}")
    for key, parameter in known.items():
        needed = parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        if needed and key not in _OWN_ARGUMENTS and key not in arguments:
            raise PassError(
                f"{name} needs the argument '{key}' beside a prompt; give a pipeline that needs a prompt only"
            )


def _conditions(pipeline: Any, group: Sequence[Sample]) -> dict[str, Any]:
    if takes_classes(pipeline):
        return {"class_labels": [_class_number(pipeline, item.condition) for item in group]}
    prompts = [str(item.condition) for item in group]
    return {"prompt": prompts if takes_batches(pipeline) else prompts[0]}


def _class_number(pipeline: Any, condition: str | int) -> int:
    """Return the number of a class that is given by number or label."""
    labels: dict[str, int] = getattr(pipeline, "labels", None) or {}
    if isinstance(condition, str) and condition in labels:
        return int(labels[condition])
    known = classes(pipeline)
    if isinstance(condition, int) or condition.isdecimal():
        if int(condition) in known:
            return int(condition)
        raise PassError(f"class {condition} is not one of {len(known)} known ones ({known[0]} … {known[-1]})")
    close = difflib.get_close_matches(condition, labels, n=1)
    hint = f"did you mean '{close[0]}'?" if close else f"give a number between {known[0]} and {known[-1]}"
    raise PassError(f"{type(pipeline).__name__} knows no class '{condition}'; {hint}")


def _final_latents(pipeline: Any, count: int, asked: Mapping[str, Any]) -> torch.Tensor:
    """Call a pipeline up to the scheduler's last step, and return what this returned for each sample."""
    scheduler = pipeline.scheduler
    step = scheduler.step
    own = "step" in vars(scheduler)
    watched = _LastStep(scheduler, step)
    scheduler.step = watched
    try:
        pipeline(**asked)
    except _Denoised:
        pipeline.maybe_free_model_hooks()  # as the call itself does at its end
    finally:
        if own:
            scheduler.step = step
        else:
            del scheduler.step
    latest = watched.latest
    if latest is None or latest.shape[0] % count:
        shape = None if latest is None else tuple(latest.shape)
        raise PassError(f"final latents {shape} of {type(pipeline).__name__} are not {count} samples' worth of rows")
    # DiTPipeline carries the rows of both branches of guidance through its scheduler; the first are the result.
    return cast("torch.Tensor", latest[:count].detach())


class _LastStep:
    """A scheduler's ``step`` that keeps what it returned, and ends the pipeline's call after the last time step."""

    def __init__(self, scheduler: Any, step: Callable[..., Any]) -> None:
        functools.update_wrapper(self, step)
        self._scheduler = scheduler
        self._step = step
        self._made = 0
        self.latest: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self._step(*args, **kwargs)
        self.latest = result[0] if isinstance(result, tuple) else result.prev_sample
        self._made += 1
        if self._made == len(self._scheduler.timesteps):
            raise _Denoised
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # A copy of the scheduler (for a second stream, say) steps itself, unwatched.
        return copy.deepcopy(self._step, memo)


@contextlib.contextmanager
def _silent(pipeline: Any) -> Iterator[None]:
    """Switch the pipeline's progress bar off for a while."""
    missing = object()
    before = getattr(pipeline, "_progress_bar_config", missing)
    pipeline.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        if before is missing:
            del pipeline._progress_bar_config
        else:
            pipeline._progress_bar_config = before


@contextlib.contextmanager
def _random_state_kept(pipeline: Any) -> Iterator[None]:
    """Put torch's random state back at the end, of the CPU and of the pipeline's device."""
    import torch

    device = pipeline._execution_device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
