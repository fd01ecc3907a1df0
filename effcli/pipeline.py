"""``effcli optimize``: measure, change, verify what was written, and publish it with its report, or refuse to.

::

    check ──> before ──> plan ──> pass 1 … pass N ──> after ──> (onnx) ──> gates ──> out/ ──rename──> the target
              fresh process       load, apply, save,   fresh process,
                                  audit of the bytes   reads only the staged folder

Every stage ends in the staging folder (:mod:`effcli.staging`), so a run that was stopped goes on where it was. See
``docs/optimize.md``.
"""

from __future__ import annotations

import contextlib
import gc
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from effcli import assembly, first_look, measuring, onnx_stage, planning, provenance, worker
from effcli import dry_run as dry_runs
from effcli.audit import audit
from effcli.batch import spread
from effcli.diffusion.opening import is_pipeline
from effcli.disk import free_bytes
from effcli.dry_run import DryRun as DryRun
from effcli.dry_run import disk_needed
from effcli.errors import BadInputError, InterruptedRunError, NoRoomError
from effcli.formatting import data_size
from effcli.preflight import Job, Options, check_saved_profile, prepare, source_as_json
from effcli.recipes import Recipe
from effcli.reports.model import plain
from effcli.reports.optimize_model import OnnxResult, OptimizeReport, PlannedPass, StageTime
from effcli.stage_times import Times
from effcli.staging import Staging, link_or_copy, open_staging
from passes.base import Figures, Pass, PassContext, Prediction
from profilers.base import SilentProgress

if TYPE_CHECKING:
    import torch

    from effcli.batch.engines import EngineName
    from effcli.loading import LoadedModel
    from effcli.reports.pipeline_model import PipelineOptimizeReport
    from effcli.sources import Source
    from passes.base import Spread
    from profilers.base import Progress

GPU_SHARE_FOR_PASS = 0.5
"""Share of a GPU's free memory up to which a pass gets the whole model there; else layers are moved one by one."""
SHARD_BYTES = 2 * 10**9


def optimize(
    model: str,
    recipe: Recipe,
    output: Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    before: Mapping[str, Any] | None = None,
    resume: bool = False,
    force: bool = False,
    dry_run: bool = False,
    kernels: Literal["auto", "plain"] = "auto",
    compile: bool = False,
    context: int | None = None,
    batch: int = 1,
    workers: int | None = None,
    engine: EngineName = "local",
    address: str | None = None,
    export: str | None = None,
    progress: Progress | None = None,
    on_warning: Callable[[str], None] | None = None,
    command: str | None = None,
) -> OptimizeReport | PipelineOptimizeReport | DryRun:
    """Apply a recipe's passes to a model, verify what was written, and publish it with its before/after report.

    Parameters
    ----------
    model : str
        A source as on the command line.
    recipe : Recipe
        Passes, texts, seed and gates.
    output : Path
        Folder of the checkpoint; it appears whole or not at all.
    device, dtype : str
        ``auto`` or a torch name; dtype is that of activations and of weights that are not quantized.
    revision : str, optional
        Of a hub model.
    allow_pickle, trust_remote_code : bool
        Accept pickled weights, run the model's own code. Both can run arbitrary code.
    before : mapping, optional
        A saved ``effcli.profile/1`` of this source on this device, instead of measuring it again.
    resume : bool
        Go on with what an earlier run has staged.
    force : bool
        Replace a checkpoint that is there, at the very end; without ``resume``, drop staged work.
    dry_run : bool
        Stop after the checks that need no weights.
    kernels : str
        Kernels that the result is measured with: ``auto`` or ``plain``.
    compile : bool
        Measure decode with ``torch.compile`` too.
    context, batch : int
        The point that is measured; default: 512 tokens, or the model's limit.
    workers : int, optional
        Processes that do parts of a pass side by side, where it has independent parts; the result is the same. Default:
        1, on a Ray cluster as many as its nodes have room for.
    engine : str
        Where those run: ``local`` or ``ray``. On a cluster, every node must see ``output`` and the model's folder.
    address : str, optional
        Of the Ray cluster; default: one that is started here.
    export : str, optional
        ``onnx``: write the result as ONNX too, into ``onnx`` in the folder, and measure that on ONNX Runtime.
    progress : Progress, optional
    on_warning : callable, optional
        Told each warning as soon as it is known; the report holds them all.
    command : str, optional
        What the report records as the way to repeat it.

    Returns
    -------
    OptimizeReport, PipelineOptimizeReport (of a diffusers pipeline) or DryRun

    Raises
    ------
    effcli.errors.GateFailedError
        If a gate does not hold, or an export differs from torch by more than its tolerance; nothing is published.
    effcli.errors.InterruptedRunError
        On Ctrl-C; finished stages are kept.
    effcli.errors.EffcliError
        If a source, output, option or staged file cannot be used, or what was written is not what it should be.
    passes.base.PassError, profilers.base.ProfilerError
        If a pass or a measurement cannot do what was asked.
    """
    shown = progress or SilentProgress()
    make_spread = spread.maker(engine, address, workers)
    options = Options(
        device, dtype, revision, allow_pickle, trust_remote_code, resume, force, kernels, compile, context, batch,
        command, export,
    )  # fmt: skip
    if export is not None:
        onnx_stage.check_format(export)
    if is_pipeline(model):
        from effcli.diffusion.run import optimize_pipeline

        if before is not None:
            raise BadInputError("a saved profile is of a language model, and a pipeline is given; leave --profile out")
        if export is not None:
            raise onnx_stage.refused_pipeline(model, export)
        return optimize_pipeline(
            model, recipe, Path(output), options, dry_run=dry_run, progress=shown, on_warning=on_warning,
            spread=make_spread,
        )  # fmt: skip
    times = Times()
    with contextlib.ExitStack() as stack:
        # Started first: it imports while this process checks.
        measurer = None if dry_run else stack.enter_context(worker.Worker())
        job = prepare(model, recipe, Path(output), options, shown, times, make_source=not dry_run)
        with times.stage("check", own=True):
            if before is not None:
                check_saved_profile(job, before, _name_of(job.bare.dtype))
            fingerprint = job.fingerprint()
        if measurer is None:
            return dry_runs.dry_run(job, shown)
        staging = stack.enter_context(open_staging(job.target, fingerprint, resume=resume, force=force))
        workers_of_parts = stack.enter_context(make_spread(staging.folder, job.device.type))
        try:
            return Run(job, staging, times, measurer, shown, before, on_warning, workers_of_parts).run()
        except KeyboardInterrupt:
            if staging.is_empty():
                raise InterruptedRunError("interrupted before anything was finished; nothing was written") from None
            raise InterruptedRunError(
                f"interrupted; finished stages are kept in '{staging.folder}': run again with --resume to go on, or "
                "with --force to start again"
            ) from None


@dataclass
class Run:
    """One run over a staging folder."""

    job: Job
    staging: Staging
    times: Times
    measurer: worker.Worker
    progress: Progress
    saved_profile: Mapping[str, Any] | None
    on_warning: Callable[[str], None] | None
    spread: Spread | None = None

    def run(self) -> OptimizeReport:
        """Do what is not done yet, then publish."""
        count = len(self.job.chain)
        with self.progress.task(
            f"optimize {self.job.spec}", total=count + 3 + (self.job.options.export is not None)
        ) as overall:
            before = self._stage("before", self._before)
            self._warn(assembly.profile_warnings("before", before))
            overall.advance()
            planned = self._stage("plan", lambda folder: self._plan(before))
            self._warn(planning.slower_warnings(_planned_from(planned)))
            overall.advance()
            done: list[dict[str, Any]] = []
            for number, item in enumerate(self.job.chain, start=1):
                apply = partial(self._pass, number=number, item=item, before=before, done=tuple(done))
                done.append(self._stage(f"pass-{number}", apply))
                overall.advance()
            if self.job.recipe.evaluation.first_look is not None and before["quality_reason"] is None:
                looked = self._stage("first-look", lambda folder: self._first_look(folder, before))
                first_look.check(self.job, self.staging, looked["quality"])
            after = self._stage("after", lambda folder: self._after(folder, before))
            self._warn(assembly.profile_warnings("after", after))
            overall.advance()
            exported = None
            if self.job.options.export is not None:
                exported = self._export(before)
                overall.advance()
            results = assembly.Results(before, _planned_from(planned), tuple(done), after, exported)
            return assembly.finish(self.job, self.staging, results, self.times)

    def _stage(self, name: str, work: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """Return a stage's result: of an earlier run where it is finished, else by doing it."""
        known = self.staging.finished(name)
        if known is None:
            earlier = self.times.copy()
            folder = self.staging.begin(name)
            result = work(folder)
            with self.times.stage("staging", own=True):
                result["times"] = self.times.since(earlier)
                self.staging.finish(name, result)
                self.staging.drop_work(name)
            return result
        for entry in known["times"]:
            self.times.add(StageTime(**entry))
        return known

    def _warn(self, lines: tuple[str, ...]) -> None:
        for line in lines if self.on_warning is not None else ():
            assert self.on_warning is not None
            self.on_warning(line)

    def _before(self, folder: Path) -> dict[str, Any]:
        from safetensors.torch import save_file

        job, options = self.job, self.job.options
        save_file({"windows": job.texts.windows.contiguous()}, folder / measuring.WINDOWS_FILE)
        result = self._measure(
            "before",
            folder,
            source=source_as_json(job.source),
            kept_in=str(folder),
            profile=self.saved_profile is None,
            dtype=options.dtype,
            tasks=self._tasks(),
            **options.trust,
        )
        if self.saved_profile is not None:
            check_saved_profile(job, self.saved_profile, result["dtype"])
            result["profile"] = dict(self.saved_profile)
        return result

    def _measure(self, name: str, folder: Path, **arguments: Any) -> dict[str, Any]:
        """Run a measuring process and account for its time: its start is the pipeline's own."""
        job, options = self.job, self.job.options
        started = time.perf_counter()
        result = self.measurer.run(
            name,
            {
                "device": str(job.device),
                "batch": options.batch,
                "context": job.context,
                "seed": job.recipe.seed,
                "text_name": job.texts.name,
                "command": job.command,
                **arguments,
            },
            folder,
            self.progress,
        )
        spent = time.perf_counter() - started
        measured = {"profile": name, "quality": f"{name}: quality", "passes": f"{name}: what passes measure"}
        for part, label in measured.items():
            seconds = result["seconds"].get(part)
            if seconds is None:
                continue
            spent -= seconds
            self.times.add(StageTime(label, seconds, own=False))
        self.times.add(StageTime("starting measuring processes", max(0.0, spent), own=True))
        return result

    def _plan(self, before: Mapping[str, Any]) -> dict[str, Any]:
        job = self.job
        with self.times.stage("passes: plan", own=False):
            known = planning.model_profile(
                before["profile"], job.bare.model, job.device, batch=job.options.batch, context=job.context
            )
            planned = planning.plan_chain(job.chain, known, job.recipe.passes)
            needed, free = disk_needed(job, planned), free_bytes(self.staging.folder)
            if needed > free:
                raise NoRoomError(
                    f"staging in '{self.staging.folder}' needs about {data_size(needed)} of disk and {data_size(free)} "
                    "are free; free some, or choose another --output"
                )
        return {"planned": plain(planned)}

    def _pass(
        self, folder: Path, *, number: int, item: Pass, before: Mapping[str, Any], done: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        from effcli.quiet import quiet_transformers

        job, label = self.job, f"pass: {item.name}"
        work = self.staging.work(f"pass-{number}")
        previous = self.staging.path(f"pass-{number - 1}") if number > 1 else None
        with self.times.stage("passes: loading", own=False), quiet_transformers(self.progress):
            loaded = self._load(previous, before["dtype"])
            if not item.changes & {"weights", "structure"}:
                _carry_weights(loaded, previous, folder)
        with self.times.stage(label, own=False), quiet_transformers(self.progress):
            started = time.perf_counter()
            record = item.apply(
                loaded.model,
                PassContext(
                    tokenizer=loaded.tokenizer,
                    device=job.device,
                    calibration=job.texts.calibration if item.needs_calibration else None,
                    work=work,
                    seed=job.recipe.seed,
                    progress=self.progress,
                    source=previous or job.source.path,
                    spread=self.spread,
                    opening=self._opening(previous, before["dtype"]),
                ),
            )
            record = replace(record, seconds=record.seconds or time.perf_counter() - started)
            item.save(loaded.model, folder)
        with self.times.stage("writing", own=True), quiet_transformers():
            _write_companions(job, loaded, folder)
            records = [*(provenance.record_from(dict(stage["record"])) for stage in done), record]
            made = assembly.provenance_of(job, before["dtype"], tuple(records), {})
            (folder / provenance.FILE).write_text(made.to_json(), encoding="utf-8")
            del loaded
            _release(job.device)
        with self.times.stage("audit", own=True):
            found = audit(folder, self._expected_model(folder), records, job.chain[:number], parameters=job.parameters)
        return {
            "record": plain(record),
            "audit": plain(found),
            "bits_per_parameter": found.bits_per_parameter,
        }

    def _load(self, previous: Path | None, dtype: str) -> LoadedModel:
        """Load what a pass starts from: the source, or what the pass before it wrote."""
        from effcli import loading

        return loading.load(
            self._source(previous), device=self._pass_device(), dtype=dtype, kernels="plain", progress=self.progress,
            **self.job.options.trust,
        )  # fmt: skip

    def _source(self, previous: Path | None) -> Source:
        from effcli.sources import Source

        return self.job.source if previous is None else Source(str(previous), "folder", previous)

    def _opening(self, previous: Path | None, dtype: str) -> dict[str, Any]:
        """Say how a worker loads what :meth:`_load` does."""
        source = source_as_json(self._source(previous))
        device = self._pass_device().partition(":")[0]  # a worker sees one GPU
        arguments = {"source": source, "device": device, "dtype": dtype, **self.job.options.trust}
        return {"function": "effcli.pass_models:model_of", "arguments": arguments}

    def _pass_device(self) -> str:
        """Return where a pass gets its model: on the device if it fits with room for the work, else on the CPU."""
        from profilers.device import memory_available_bytes

        device = self.job.device
        if device.type == "cpu":
            return "cpu"
        needed = self.job.parameters * self.job.bare.dtype.itemsize
        return str(device) if needed < GPU_SHARE_FOR_PASS * memory_available_bytes(device) else "cpu"

    def _expected_model(self, folder: Path) -> Any:
        """Return the meta model that tensors are audited against: the source's, unless a pass changed the structure."""
        if not any("structure" in item.changes for item in self.job.chain):
            return self.job.bare.model
        from effcli import loading
        from effcli.sources import Source

        written = Source(str(folder), "folder", folder)
        return loading.load(written, config_only=True, **self.job.options.trust).model

    def _first_look(self, folder: Path, before: Mapping[str, Any]) -> dict[str, Any]:
        job, options, started = self.job, self.job.options, time.perf_counter()
        result = self.measurer.run(
            "first-look",
            {
                "checkpoint": str(self.staging.path(f"pass-{len(job.chain)}")),
                "before_folder": str(self.staging.path("before")),
                "device": str(job.device),
                "dtype": before["dtype"],
                "kernels": options.kernels,
                "tokens": job.recipe.evaluation.first_look,
                "text_name": job.texts.name,
                "trust_remote_code": options.trust_remote_code,
            },
            folder,
            self.progress,
        )
        self.times.add(StageTime("first look: quality", time.perf_counter() - started, own=False))
        return result

    def _after(self, folder: Path, before: Mapping[str, Any]) -> dict[str, Any]:
        job, options = self.job, self.job.options
        return self._measure(
            "after",
            folder,
            checkpoint=str(self.staging.path(f"pass-{len(job.chain)}")),
            shown_as=str(job.target),
            before_folder=str(self.staging.path("before")),
            before_profile=before["profile"],
            task_before=before["task"],
            quality=before["quality_reason"] is None,
            kernels=options.kernels,
            compile=options.compile,
            parameters=job.parameters,
            trust_remote_code=options.trust_remote_code,
            dtype=before["dtype"],
            tasks=self._tasks(),
        )

    def _tasks(self) -> str | None:
        tasks = self.job.recipe.evaluation.tasks
        return None if tasks is None else str(tasks.absolute())

    def _export(self, before: Mapping[str, Any]) -> OnnxResult:
        """Write the result as ONNX and measure that; an export that is finished and made alike is kept."""
        onnx_stage.forget_other(self.job, self.staging)
        made = self._stage(onnx_stage.FOLDER, self._write_onnx)
        measured = self._stage(onnx_stage.MEASURED, lambda folder: self._after_onnx(folder, before))
        self._warn(assembly.profile_warnings("ONNX Runtime", measured))
        return onnx_stage.result_of(made["export"], measured)

    def _write_onnx(self, folder: Path) -> dict[str, Any]:
        with self.times.stage("export: onnx", own=False):
            result = onnx_stage.write(self.job, self.staging, folder, self.progress)
            _release(self.job.device)
        return result

    def _after_onnx(self, folder: Path, before: Mapping[str, Any]) -> dict[str, Any]:
        job, options = self.job, self.job.options
        return self._measure(
            onnx_stage.MEASURED,
            folder,
            export=str(self.staging.path(onnx_stage.FOLDER)),
            shown_as=str(job.target / onnx_stage.FOLDER),
            before_folder=str(self.staging.path("before")),
            quality_reason=before["quality_reason"],
            device=options.device,
            trust_remote_code=options.trust_remote_code,
        )


def _planned_from(data: Mapping[str, Any]) -> tuple[PlannedPass, ...]:
    """Return the plan that :func:`effcli.reports.model.plain` made this data from."""
    planned = []
    for item in data["planned"]:
        said = item["prediction"]
        prediction = None
        if said is not None:
            prediction = Prediction(**{**said, "figures": Figures(**said["figures"]), "notes": tuple(said["notes"])})
        planned.append(PlannedPass(**{**item, "prediction": prediction}))
    return tuple(planned)


def _carry_weights(loaded: LoadedModel, previous: Path | None, folder: Path) -> None:
    """Put what a pass does not change into its folder: the files of the stage before, else the weights as loaded."""
    if previous is None:
        loaded.model.save_pretrained(folder, max_shard_size=SHARD_BYTES)
        return
    for path in previous.glob("*.safetensors"):  # weights, and what passes put beside them
        link_or_copy(path, folder / path.name)
    for path in (*previous.glob("*.json"), *previous.glob("*.py")):  # copies: a pass may write into its config
        if path.name != provenance.FILE:
            shutil.copyfile(path, folder / path.name)


def _write_companions(job: Job, loaded: LoadedModel, folder: Path) -> None:
    """Put tokenizer, generation config and licence files beside the weights: the source's own where it has them."""
    origin = job.source.path
    if origin is not None and origin.is_dir():
        for path in sorted(origin.iterdir()):
            if path.is_file() and assembly.is_companion(path) and not (folder / path.name).exists():
                shutil.copyfile(path, folder / path.name)
    elif loaded.tokenizer is not None:
        loaded.tokenizer.save_pretrained(folder)
    generation = getattr(loaded.model, "generation_config", None)
    if generation is not None and not (folder / "generation_config.json").exists():
        generation.save_pretrained(folder)


def _release(device: torch.device) -> None:
    """Give back what a model took, so that the next process has it."""
    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
