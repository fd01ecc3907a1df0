"""Hand a loaded model over to lm-evaluation-harness and take its figures into our report."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import numbers
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from effcli.errors import BadInputError
from profilers import own_cache

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from profilers.base import Progress
    from profilers.tasks import TaskComparison

INSTALL = "pip install lm-eval"
KIND = "lm-eval"
# Metrics that are shares of samples; others (perplexities, BLEU, …) stay in the raw results.
SHARES = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match", "mc1", "mc2", "f1")
_Metrics = dict[tuple[str, str], tuple[float, float | None]]


def check_installed(tasks: Sequence[str]) -> None:
    """Refuse ``--lm-eval`` where the harness is not installed.

    Raises
    ------
    BadInputError
    """
    if tasks and find_spec("lm_eval") is None:
        raise BadInputError(
            f"--lm-eval {','.join(tasks)} needs lm-evaluation-harness, which is not installed; {INSTALL}"
        )


def run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    tasks: Sequence[str],
    *,
    limit: int | None,
    seed: int,
    progress: Progress,
) -> dict[str, Any]:
    """Score tasks of lm-evaluation-harness on a loaded model.

    The harness downloads the tasks' data sets from the hub where they are not cached.

    Parameters
    ----------
    model : PreTrainedModel
    tokenizer : PreTrainedTokenizerBase or None
    tasks : sequence of str
        Names of its tasks or groups.
    limit : int or None
        Samples of each task, the first ones.
    seed : int
    progress : Progress

    Returns
    -------
    dict
        ``results``, ``versions``, ``n-shot`` and ``n-samples`` as the harness returns them.

    Raises
    ------
    BadInputError
        If it is not installed, knows no such task, or fails.
    """
    check_installed(tasks)
    if tokenizer is None:
        raise BadInputError("--lm-eval needs a tokenizer and the model has none")
    with _silenced(), _untied(model), own_cache.applied(model), progress.task(f"lm-eval {', '.join(tasks)}"):
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        try:
            found = simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1),
                tasks=list(tasks),
                limit=limit,
                log_samples=False,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
        except (KeyError, ValueError, OSError, RuntimeError, ImportError, AssertionError) as error:
            first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise BadInputError(f"lm-evaluation-harness failed on --lm-eval {','.join(tasks)}: {first}") from error
    return {key: _plain(found.get(key) or {}) for key in ("results", "versions", "n-shot", "n-samples")}


def comparisons(after: dict[str, Any], before: dict[str, Any] | None, confidence: float) -> tuple[TaskComparison, ...]:
    """Return the harness's accuracies in the form of our own tasks.

    The interval is the harness's standard error times the normal quantile; differences have none, since the harness
    does not pair samples.
    """
    from profilers.tasks import TaskComparison

    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    first = {} if before is None else _shares(before)
    found = []
    for (task, metric), (value, error) in _shares(after).items():
        was = first.get((task, metric), (None, None))[0]
        samples = (after["n-samples"].get(task) or {}).get("effective")
        if error is None or samples is None:
            continue  # a group's mean: its tasks are there themselves
        found.append(
            TaskComparison(
                name=task,
                kind=KIND,
                samples=int(samples),
                before=was,
                after=value,
                interval=(max(0.0, value - z * error), min(1.0, value + z * error)),
                difference=None if was is None else value - was,
                difference_interval=None,
                metric=metric,
                available=(after["n-samples"].get(task) or {}).get("original"),
            )
        )
    return tuple(found)


def other_figures(results: dict[str, Any]) -> list[str]:
    """Return a line for each figure of the harness that is not a share of samples."""
    lines = []
    for (task, metric), (value, error) in _metrics(results).items():
        if metric.partition(",")[0] not in SHARES:
            spread = "" if error is None else f" ± {error:.4g} (standard error)"
            lines.append(f"lm-eval {task}: {metric.removesuffix(',none')} {value:.6g}{spread}")
    return lines


def _plain(value: Any) -> Any:
    """Return what JSON has: the harness's results hold numpy numbers, NaN and functions too."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        number = float(value)
        return None if not math.isfinite(number) else int(number) if number.is_integer() else number
    return value if value is None or isinstance(value, (str, bool)) else str(value)


def _shares(results: dict[str, Any]) -> _Metrics:
    """Return the metrics that are shares of samples; the filter stays in the name unless it is the only one, none."""
    return {
        (task, metric.removesuffix(",none")): value
        for (task, metric), value in _metrics(results).items()
        if metric.partition(",")[0] in SHARES and 0.0 <= value[0] <= 1.0
    }


def _metrics(results: dict[str, Any]) -> _Metrics:
    """Return value and standard error by task and ``metric,filter``."""
    found: _Metrics = {}
    for task, metrics in results["results"].items():
        for key, value in metrics.items():
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = metrics.get(f"{metric}_stderr,{chosen}")
            found[task, key] = float(value), float(error) if isinstance(error, (int, float)) else None
    return found


@contextlib.contextmanager
def _untied(model: PreTrainedModel) -> Iterator[None]:
    """Keep the harness from tying weights again: a tied head may have been packed for a faster kernel since."""
    own = model.__dict__
    before = own.get("tie_weights")
    own["tie_weights"] = lambda *args, **kwargs: None
    try:
        yield
    finally:
        if before is None:
            del own["tie_weights"]
        else:
            own["tie_weights"] = before


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Keep the harness's logs, bars and prints from the terminal."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(level)
