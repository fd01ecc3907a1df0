"""Search a recipe's parameters with Optuna: every trial is a job, and what the jobs measured says what to try next.

::

    SearchSpec ── ask ──> values ── Recipe.chain(), Pass.check ──> Job ──driver──> Outcome
                   ▲        │ tried already, or refused: told so, nothing runs        │
                   └────────┴──────────── the study, in its storage <──── tell ───────┘

The study is all that is remembered: what a driver that was killed had running is asked again under its name, and what
had ended is not. The sampler is seeded anew for each trial from the search's seed and the trial's number, so an
interrupted search goes on as the undisturbed one would have.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effcli import gates
from effcli.batch.locking import state_folder
from effcli.batch.model import Job, Outcome, SearchResult
from effcli.batch.search_space import QUALITY, Choice, SearchSpec
from effcli.batch.study import open_study, optuna_for
from effcli.batch.trial_files import TrialFiles
from effcli.batch.trial_results import Judge, Result
from effcli.errors import BadInputError, EffcliError, did_you_mean
from effcli.recipes import VERSION, from_mapping
from passes.base import PassError

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial

    from effcli.batch.jobs_file import JobsFile
    from effcli.batch.keeping import Fingerprinting

_TRIES = 64
"""Trials in a row that were tried before, or that a pass refuses, after which a search has nothing new to try."""
_RANDOM_FIRST = 5
"""Trials at random before TPE has something to go by."""
_SAME_FAILURES = 3
"""A search whose first jobs all fail alike is not going to find anything."""


def searches(file: JobsFile, output: str, fingerprints: Fingerprinting, *, parallel: int | None = None) -> list[Search]:
    """Return the searches of a jobs file.

    Parameters
    ----------
    file : JobsFile
    output : str
        An absolute folder or a URL.
    fingerprints : Fingerprinting
        Asked once the engine is entered.
    parallel : int, optional
        As for :class:`Search`; default: the file's ``workers``, else 1.

    Raises
    ------
    BadInputError
    """
    from effcli.batch.matrix import search_job

    def of_model(base: Job) -> Mapping[str, Any] | None:
        try:
            return fingerprints.of(replace(base, settings={}))
        except (PassError, EffcliError):  # its jobs will say what is wrong with the model; others go on
            return None

    found = []
    for name, spec in file.search.items():
        base = search_job(file, name)
        ask = partial(of_model, base)
        found.append(Search(name, spec, base, output, parallel=parallel or file.workers or 1, fingerprint=ask))
    return found


class Search:
    """A source of jobs for the driver (:class:`effcli.batch.engine.JobSource`).

    Parameters
    ----------
    name : str
        Jobs are called ``name.001`` and so on.
    spec : SearchSpec
    base : Job
        An ``optimize`` job of the model, whose recipe and point are replaced.
    output : str
        Of the batch, an absolute folder or a URL.
    state : Path, optional
        Folder of the default storage; default: :func:`effcli.batch.locking.state_folder`.
    parallel : int
        How many of its jobs run at a time. Further ones know as much less about the results.
    fingerprint : callable, optional
        Returns what the model and its measurement depend on, JSON-ready: another one begins another study.

    Raises
    ------
    BadInputError
        If Optuna is missing or its storage cannot be opened, or a pass or parameter is not known.
    """

    def __init__(
        self,
        name: str,
        spec: SearchSpec,
        base: Job,
        output: str,
        *,
        state: Path | None = None,
        parallel: int = 1,
        fingerprint: Callable[[], Mapping[str, Any] | None] | None = None,
    ) -> None:
        self.name = name
        self.spec = spec
        self._base = base
        self._output = output
        self._parallel = max(1, parallel)
        self._fingerprint = fingerprint
        self._files = TrialFiles(output)
        self._judge = Judge(spec)
        self._folder = state or state_folder(output)
        self._check_names()
        optuna_for(name)
        self._started: float | None = None
        self._ended: str | None = None

    def ask(self, running: int) -> Sequence[Job]:
        """Return jobs to run now; first those that an earlier run has left."""
        if self._started is None:
            self._started = time.monotonic()
            again = self._left_by_earlier_run()
            if again:
                return again
        asked: list[Job] = []
        while running + len(asked) < self._parallel and not self.finished():
            job = self._next()
            if job is None:
                break
            asked.append(job)
        return asked

    def tell(self, job: Job, outcome: Outcome) -> None:
        """Take a result; one of a job that was told before changes nothing."""
        from optuna.trial import Trial, TrialState

        frozen = self._jobs().get(job.name)
        if frozen is None or frozen.state.is_finished():
            return
        trial = Trial(self._study, frozen._trial_id)
        value = outcome.figures.get(self.spec.metric)
        judged = self._files.gates(outcome.report) if outcome.report is not None else {}
        excess = self._judge.excess(outcome, judged)
        if excess is not None and not frozen.constraints:  # it has some if a kill came right after them
            for gate, beyond in zip(self.spec.subject_to, excess, strict=True):
                trial.set_constraint(gate, beyond)
        end = {"status": outcome.status, "message": outcome.message, "figures": dict(outcome.figures)}
        if value is None and outcome.status == "passed":
            end |= {"status": "failed", "message": f"{self.spec.metric} was not measured"}
        trial.set_user_attr("end", end)
        if end["status"] == "failed":
            self._study.tell(trial, state=TrialState.FAIL)
        elif value is None:
            self._study.tell(trial, state=TrialState.PRUNED)
        else:
            self._study.tell(trial, value)
        self._tidy()

    def finished(self) -> bool:
        """Say whether no job will come any more."""
        if self._started is None:
            return False
        jobs = self._jobs()
        if self._ended is None:
            ends = [item.user_attrs.get("end") for item in jobs.values()]
            messages = [end["message"] for end in ends if end is not None and end["status"] == "failed"]
            if len(jobs) == len(messages) >= _SAME_FAILURES and len(set(messages)) == 1:
                self._ended = f"stopped, since the first {len(jobs)} trials all failed: {messages[0]}"
            elif self.spec.time is not None and time.monotonic() - self._started > self.spec.time:
                self._ended = "its time is over"
        return self._ended is not None or (self.spec.limit is not None and len(jobs) >= self.spec.limit)

    def result(self) -> SearchResult:
        """Return what was found so far."""
        jobs, results = self._jobs().values(), self._results()
        passed = [result for result in results if result.status == "passed"]
        best = self._judge.best(passed)
        if best is not None:
            value = best.figures[self.spec.metric]
            assert value is not None
            message = f"{best.job} has {self.spec.metric} {gates.METRICS[self.spec.metric].show(value)}"
        elif passed:
            message = f"no trial measured {self.spec.metric}"
        else:
            message = f"no trial keeps {' and '.join(self.spec.subject_to)}" if results else "no trial was run"
        if self._ended is not None:
            message += f"; {self._ended}"
        refused = [reason for item in self._trials() if (reason := item.user_attrs.get("refused")) is not None]
        if refused:
            message += f"; {len(refused)} more cannot be run, the first because {refused[0]}"
        return SearchResult(
            name=self.name,
            minimize=self.spec.metric,
            subject_to=self.spec.subject_to,
            trials=len(jobs),
            pruned=sum(item.state.name == "PRUNED" for item in jobs),
            failed=sum(result.status == "failed" for result in results),
            best=None if best is None else best.job,
            front=tuple(result.job for result in self._judge.front(passed)),
            quality=self._judge.quality,
            cost=self._judge.cost,
            message=message,
        )

    @cached_property
    def _study(self) -> Study:
        """The study, opened when it is first needed: a dry run writes nothing."""
        return open_study(self.name, self.spec, self._study_name(), self._folder)

    # --- what to try

    def _next(self) -> Job | None:
        """Return the next job that is new and that every pass takes, None where there is none."""
        from optuna.trial import TrialState

        for attempt in range(_TRIES):
            if not self._enqueue(attempt):
                break
            self._study.sampler = self._sampler()
            trial = self._study.ask()
            values = self._values(trial)
            passes = _text(self.spec.chosen(values))
            if passes in self._tried():
                trial.set_user_attr("repeated", True)
            else:
                problem = self._problem(self._recipe(passes))
                if problem is None:
                    job = self._job(f"{self.name}.{len(self._jobs()) + 1:03d}", passes)
                    trial.set_user_attr("passes", passes)
                    trial.set_user_attr("job", job.name)
                    return job
                trial.set_user_attr("passes", passes)
                trial.set_user_attr("refused", problem)
            self._study.tell(trial, state=TrialState.FAIL)
        self._ended = "there is nothing new to try"
        return None

    def _enqueue(self, attempt: int) -> bool:
        """Say what to try where the sampler is not to be asked; False where everything has been tried.

        A sampler does not know what was tried: in a small space it comes back to the best. Where the values can be
        counted, what it has left out is taken instead, at random.
        """
        if self.spec.sampler != "grid" and attempt == 0:
            return True
        if any(space.values() is None for space in self.spec.spaces().values()):
            return True
        tried = self._tried()
        chance = random.Random(f"{self.spec.seed}:{len(tried)}")
        chosen, seen = None, 0
        for values in self.spec.combinations():
            if _text(self.spec.chosen(values)) in tried:
                continue
            seen += 1
            if self.spec.sampler == "grid" or chance.random() < 1 / seen:
                chosen = values
            if self.spec.sampler == "grid" or seen == 10_000:
                break
        if chosen is None:
            return False
        self._study.enqueue_trial({name: self._stored(name, value) for name, value in chosen.items()})
        return True

    def _sampler(self) -> Any:
        import optuna

        # Trials that a kill cut short while their values were chosen do not count: the next one is what they were.
        number = sum(_decided(item) for item in self._trials())
        seed = random.Random(f"{self.spec.seed}:{number}").getrandbits(32)
        if self.spec.sampler != "tpe":
            return optuna.samplers.RandomSampler(seed=seed)
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=_RANDOM_FIRST)

    def _values(self, trial: Trial) -> dict[str, Any]:
        """Let the study choose, one value after the other; what an absent pass would need is not asked for."""
        spaces = self.spec.spaces()
        values: dict[str, Any] = {}
        while (name := self.spec.needed(values)) is not None:
            space = spaces[name]
            counted = space.values()
            if isinstance(space, Choice):
                values[name] = json.loads(trial.suggest_categorical(name, [json.dumps(item) for item in space.choose]))
            elif counted is not None and space.whole:
                low, high, step = int(counted[0]), int(counted[-1]), int(space.step or 1)
                values[name] = trial.suggest_int(name, low, high, step=step, log=space.log)
            elif counted is not None:
                found = trial.suggest_float(name, counted[0], counted[-1], step=space.step)
                values[name] = min(counted, key=lambda value, found=found: abs(value - found))
            else:
                values[name] = trial.suggest_float(name, float(space.low), float(space.high), log=space.log)
        return values

    def _stored(self, name: str, value: Any) -> Any:
        """Return a value as the study has it: of a choice, its text, since Optuna takes no lists."""
        return json.dumps(value) if isinstance(self.spec.spaces()[name], Choice) else value

    def _recipe(self, passes: str) -> dict[str, Any]:
        evaluation = self.spec.evaluation.model_dump(mode="json", exclude_none=True)
        calibration = self.spec.calibration.model_dump(mode="json", exclude_none=True)
        for part in (evaluation, calibration):
            part |= {key: str(Path(part[key]).absolute()) for key in ("text", "tasks") if key in part}
        if self.spec.prune and any(gates.parse(text).metric in QUALITY for text in self.spec.subject_to):
            evaluation.setdefault("first_look", self.spec.prune_tokens)
        return {
            "version": VERSION,
            "seed": self.spec.seed,
            "passes": json.loads(passes),
            "calibration": calibration,
            "evaluation": evaluation,
            "gates": list(self.spec.subject_to),
        }

    def _job(self, name: str, passes: str) -> Job:
        settings = {"recipe": self._recipe(passes), "context": self.spec.context, "batch": self.spec.batch}
        given = {key: value for key, value in settings.items() if value is not None}
        return replace(self._base, name=name, kind="optimize", part=self.name, settings=given, device=self.spec.device)

    def _problem(self, recipe: Mapping[str, Any]) -> str | None:
        """Say why no run of this recipe can work, None where one may."""
        from effcli import preflight

        try:
            chain = from_mapping(recipe, f"search '{self.name}'").chain()
            if self._model is not None:
                preflight.check_chain(chain, self._model)
        except (PassError, EffcliError) as error:
            return str(error)
        return None

    @cached_property
    def _model(self) -> Any:
        """The model on the meta device, to ask passes; None where it cannot be opened here, as its jobs will say."""
        from effcli import loading, sources
        from effcli.quiet import quiet_transformers
        from profilers.base import ProfilerError

        job = self._base
        trust: dict[str, Any] = {"allow_pickle": job.allow_pickle, "trust_remote_code": job.trust_remote_code}
        if not job.model:
            return None
        try:
            with quiet_transformers():
                source = sources.resolve(job.model, revision=job.revision, **trust)
                return loading.load(source, device="cpu", dtype=job.dtype, config_only=True, **trust).model
        except (EffcliError, PassError, ProfilerError):
            return None

    def _check_names(self) -> None:
        from passes import registry

        for step in self.spec.passes:
            try:
                known = registry.load(step.name).parameters_type.model_fields
            except PassError as error:
                raise BadInputError(f"search '{self.name}': {error}") from None
            for key in step.parameters:
                if key not in known:
                    raise BadInputError(
                        f"search '{self.name}': pass '{step.name}' has no parameter '{key}'{did_you_mean(key, known)}; "
                        f"known: {', '.join(known)}"
                    )

    def _tidy(self) -> None:
        """Remove the weights of what is not kept."""
        results = self._results()
        kept = self._judge.kept(results)
        for result in results:
            if result not in kept and result.status != "failed":  # what a failed one has staged, another attempt uses
                self._files.drop(result.job)

    # --- the study

    def _study_name(self) -> str:
        """Return a name that changes with all that a trial's figures depend on, and not with how long the search is."""
        free = {"trials", "time", "storage", "sampler", "keep"}
        data = {
            "spec": self.spec.model_dump(mode="json", by_alias=True, exclude=free),
            "model": [self._base.model, self._base.model_from, self._base.revision, self._base.dtype],
            "fingerprint": None if self._fingerprint is None else self._fingerprint(),
        }
        return f"{self.name}-{hashlib.sha256(_text(data).encode()).hexdigest()[:12]}"

    def _left_by_earlier_run(self) -> list[Job]:
        """Return the jobs to ask for again: what was running or failed, and what passed, for the driver to keep."""
        from optuna.trial import TrialState, create_trial

        for item in self._trials():
            if item.state == TrialState.RUNNING and "job" not in item.user_attrs:
                self._study.tell(item.number, state=TrialState.FAIL)  # cut short while its values were chosen
        again = []
        for name, item in self._jobs().items():
            status = item.user_attrs["end"]["status"] if item.state.is_finished() else None
            passes = item.user_attrs["passes"]
            if status == "failed":  # a trial that has ended cannot be told again, so it gets a new one
                self._study.add_trial(
                    create_trial(
                        state=TrialState.RUNNING, params=item.params, distributions=item.distributions,
                        user_attrs={"job": name, "passes": passes},
                    )
                )  # fmt: skip
            if status in (None, "failed", "passed"):
                again.append(self._job(name, passes))
        return again

    def _trials(self) -> list[FrozenTrial]:
        trials: list[FrozenTrial] = self._study.get_trials(deepcopy=False)
        return trials

    def _jobs(self) -> dict[str, FrozenTrial]:
        """Return the last trial of each job, in the order in which the jobs were first asked for."""
        return {item.user_attrs["job"]: item for item in self._trials() if "job" in item.user_attrs}

    def _tried(self) -> set[str]:
        decided = (item.user_attrs for item in self._trials() if _decided(item))
        return {attributes["passes"] for attributes in decided if "passes" in attributes}

    def _results(self) -> list[Result]:
        ended = ((name, item.user_attrs["end"]) for name, item in self._jobs().items() if item.state.is_finished())
        return [Result(name, end["status"], end["figures"]) for name, end in ended]


def _decided(trial: FrozenTrial) -> bool:
    return any(key in trial.user_attrs for key in ("job", "refused", "repeated"))


def _text(data: Any) -> str:
    """Return data as a text that is the same for the same data."""
    return json.dumps(data, sort_keys=True, ensure_ascii=False)
