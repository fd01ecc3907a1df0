"""Quality of a checkpoint: on which text it is measured, and the report of ``effcli eval``.

::

    --against ── load ── reference of its logits, tasks ── dropped ──┐
    MODEL     ── load ── quality, tasks, lm-eval ────────────────────┴──> EvalReport
"""

from __future__ import annotations

import dataclasses
import gc
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from effcli import harness, provenance
from effcli.errors import BadInputError
from effcli.eval_text import DATASET_CHARACTERS_PER_TOKEN, read_dataset, read_text
from effcli.recipes import Calibration, Evaluation
from effcli.reports.model import EVAL_SCHEMA, Environment, ModelInfo, plain
from passes.base import KernelUse
from profilers.base import Progress, SilentProgress
from profilers.tasks import SAMPLES

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from effcli.checkpoint import Loaded
    from profilers.tasks import Task, TaskResult
    from profilers.text import TokenStream


@dataclass(frozen=True)
class EvalReport:
    """One run of ``effcli eval``.

    Attributes
    ----------
    against : ModelInfo or None
        The original that the model was compared with.
    quality : QualityResult
        :class:`profilers.quality.QualityResult`; with ``against`` it has divergence and agreement, and every figure has
        a value before.
    evaluation : dict
        What was asked for, as a recipe has it.
    kernels : tuple of KernelUse
        Which kernels ran the model's quantized layers.
    lm_eval, lm_eval_against : dict or None
        What lm-evaluation-harness returned for the model, and for the original.
    """

    schema: str
    created: str  # ISO 8601, UTC
    command: str
    seconds_spent: float
    model: ModelInfo
    against: ModelInfo | None
    environment: Environment
    seed: int
    evaluation: dict[str, Any]
    quality: Any
    kernels: tuple[KernelUse, ...]
    lm_eval: dict[str, Any] | None
    lm_eval_against: dict[str, Any] | None
    notes: tuple[str, ...]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready data."""
        data: dict[str, Any] = plain(self)
        return data

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False, ensure_ascii=False) + "\n"


class EvaluationText(NamedTuple):
    """What quality is measured on, and what passes may calibrate on.

    Attributes
    ----------
    calibration : TokenStream
        Shares no run of 32 tokens with the text of ``windows``.
    windows : torch.Tensor
        Shape (n, context), int64, on the CPU; no two overlap.
    name : str
        Of the text evaluated on, for reports.
    notes : tuple of str
        What the reader should know about the texts, one line each.
    """

    calibration: TokenStream
    windows: torch.Tensor
    name: str
    notes: tuple[str, ...]


def evaluate(
    model: str | Path,
    *,
    against: str | Path | None = None,
    evaluation: Evaluation | None = None,
    task_samples: int = SAMPLES,
    lm_eval: Sequence[str] = (),
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    kernels: Literal["auto", "plain"] = "auto",
    revision: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    command: str | None = None,
) -> EvalReport:
    """Measure a model's quality, by itself or against the original; the two are never in memory together.

    Parameters
    ----------
    model : str or Path
        Any source: a folder that ``effcli optimize`` wrote, a transformers folder, a ``.gguf`` file, a built-in name,
        a hub id.
    against : str or Path, optional
        The original, any source too.
    evaluation : Evaluation, optional
        Text or data set, tokens and context, tasks. Default: 8,192 tokens of the Python documentation.
    task_samples : int
        Samples of a task, and of each task of ``lm_eval``, at most.
    lm_eval : sequence of str
        Tasks of lm-evaluation-harness.
    seed : int
        Of the choice of samples, and of random tokens for a model without a tokenizer.
    device, dtype, kernels, revision, allow_pickle, trust_remote_code
        As in :func:`effcli.load`; ``revision`` is that of ``model``.
    progress : Progress, optional
    command : str, optional
        What the report records as the way to repeat it.

    Raises
    ------
    effcli.errors.EffcliError
        If a source, text, data set, device or dtype cannot be used, or lm-evaluation-harness is not installed.
    profilers.base.ProfilerError
        If a text is too short, the model is no decoder, the two do not share a vocabulary, or a task file is wrong.
    """
    from effcli.api import environment_of, model_info
    from effcli.checkpoint import load
    from effcli.quiet import quiet_transformers
    from profilers.quality import measure_quality, record_reference
    from profilers.tasks import compare, read_task, score

    started = time.perf_counter()
    shown = progress or SilentProgress()
    wanted = evaluation or Evaluation()
    harness.check_installed(lm_eval)
    task = None if wanted.tasks is None else read_task(wanted.tasks, limit=task_samples, seed=seed)
    calibration, notes = _calibration_of(model)
    ours = (Path(model) / provenance.FILE).is_file()
    options: dict[str, Any] = {"device": device, "dtype": dtype, "progress": shown}
    options |= {"allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code}

    def tasks_of(loaded: Loaded) -> tuple[TaskResult | None, dict[str, Any] | None]:
        mine = None if task is None else score(loaded.model, loaded.tokenizer, task, progress=shown)
        theirs = None
        if lm_eval:
            theirs = harness.run(loaded.model, loaded.tokenizer, lm_eval, limit=task_samples, seed=seed, progress=shown)
        return mine, theirs

    def text_of(loaded: Loaded) -> EvaluationText:
        vocabulary = loaded.model.config.get_text_config(decoder=True).vocab_size
        return evaluation_windows(loaded.tokenizer, vocabulary, wanted, calibration, seed, calibrates=ours)

    reference = against_info = text = task_before = harness_before = None
    with quiet_transformers():
        if against is not None:
            original = load(against, kernels=kernels, **options)
            text = text_of(original)
            reference = record_reference(original.model, text.windows, progress=shown)
            task_before, harness_before = tasks_of(original)
            against_info = model_info(original.source)
            del original
            gc.collect()
        loaded = load(model, kernels=kernels, revision=revision, **options)
        text = text or text_of(loaded)
        quality = measure_quality(loaded.model, text.windows, reference, text_name=text.name, progress=shown)
        task_after, harness_after = tasks_of(loaded)
    tasks = () if task_after is None else compare(task_after, task_before)
    if harness_after is not None:
        tasks += harness.comparisons(harness_after, harness_before, quality.confidence)
        notes += harness.other_figures(harness_after)
    return EvalReport(
        schema=EVAL_SCHEMA,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command or f"effcli.evaluation.evaluate({str(model)!r}, ...)",
        seconds_spent=time.perf_counter() - started,
        model=model_info(loaded.source),
        against=against_info,
        environment=dataclasses.replace(environment_of(loaded.source, None), peaks_reason="quality needs no peaks"),
        seed=seed,
        evaluation=wanted.model_dump(),
        quality=dataclasses.replace(quality, tasks=tasks),
        kernels=loaded.record.kernels,
        lm_eval=harness_after,
        lm_eval_against=harness_before,
        notes=(*notes, *_task_notes(task, seed), *text.notes),
        warnings=(),
    )


def _task_notes(task: Task | None, seed: int) -> list[str]:
    if task is None or len(task.samples) == task.available:
        return []
    return [f"task {task.name}: {len(task.samples):,} of {task.available:,} samples, drawn with seed {seed}"]


def _calibration_of(model: str | Path) -> tuple[Calibration, list[str]]:
    """Return the text that a checkpoint of ours was calibrated on, so that it is not evaluated on it."""
    made = provenance.read(Path(model)) if Path(model).is_dir() else None
    text = ((made.recipe.get("calibration") or {}).get("text")) if made is not None else None
    if text is None:
        return Calibration(), []
    if not Path(text).is_file():
        return Calibration(), [
            f"the model was calibrated on '{text}', which is not here: whether the text evaluated on has parts of it "
            "cannot be told"
        ]
    return Calibration(text=text), []


def evaluation_windows(
    tokenizer: PreTrainedTokenizerBase | None,
    vocabulary_size: int,
    evaluation: Evaluation,
    calibration: Calibration,
    seed: int,
    *,
    calibrates: bool = True,
) -> EvaluationText:
    """Return the windows to evaluate on and a stream to calibrate on that shares nothing with their text.

    A window starts with a BOS token if the tokenizer adds one by itself, as the model then expects; it counts as one of
    its ``context`` tokens.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase or None
        Without one, tokens are random.
    vocabulary_size : int
    evaluation : Evaluation
        At most ``tokens`` tokens in windows of ``context``, evenly spaced over the text.
    calibration : Calibration
    seed : int
        Of random tokens.
    calibrates : bool
        Whether anything was or will be calibrated; False leaves out notes about that text.

    Raises
    ------
    BadInputError
        If a text or data set cannot be read, or both are given.
    profilers.base.ProfilerError
        If a text is too short.
    """
    import torch

    from profilers.text import adds_bos, split_texts

    if evaluation.text is not None and evaluation.dataset is not None:
        raise BadInputError("evaluation names both a text and a data set; leave one out")
    text: str | None = None
    name = ""
    if evaluation.dataset is not None:
        text, name = read_dataset(evaluation.dataset, evaluation.tokens * DATASET_CHARACTERS_PER_TOKEN)
    elif evaluation.text is not None:
        text, name = read_text(evaluation.text), evaluation.text.name
    split = split_texts(
        tokenizer,
        vocabulary_size,
        calibration_text=None if calibration.text is None else read_text(calibration.text),
        evaluation_text=text,
        seed=seed,
        calibration_name="" if calibration.text is None else calibration.text.name,
        evaluation_name=name,
    )
    notes = list(split.notes) if calibrates else []
    bos = tokenizer is not None and adds_bos(tokenizer)
    length = evaluation.context - bos
    asked = max(1, evaluation.tokens // evaluation.context)
    windows = split.evaluation.separate_windows(asked, length)
    if windows.shape[0] < asked:
        notes.append(
            f"the text to evaluate on has {split.evaluation.ids.numel():,} tokens: {windows.numel():,} of the "
            f"{evaluation.tokens:,} asked for are used"
        )
    if bos:
        assert tokenizer is not None
        windows = torch.cat([torch.full((windows.shape[0], 1), tokenizer.bos_token_id), windows], dim=1)
        notes.append("every window starts with a BOS token, as the tokenizer adds it")
    return EvaluationText(split.calibration, windows, split.evaluation.name, tuple(notes))
