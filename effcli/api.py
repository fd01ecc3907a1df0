"""The Python API that the commands are thin over."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from effcli.errors import BadInputError
from effcli.reports.model import PROFILE_SCHEMA, Environment, ModelInfo, ProfileReport, plain, read_report
from profilers.base import (
    NotApplicableError,
    ProfileContext,
    Profiler,
    ProfileRequest,
    Progress,
    SilentProgress,
    Task,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from effcli.diffusion.opening import OpenedPipeline
    from effcli.export.generating import OnnxModel
    from effcli.loading import LoadedModel
    from effcli.sources import Source
    from profilers.peaks import Peaks

# The order in which profilers run and are shown; others follow by name.
PROFILER_ORDER = ("latency", "intensity", "kv", "sinks", "energy", "outliers")

# What can be measured from outside, by the clock and the GPU's meter, on a model whose layers another runtime runs.
ONNX_PROFILERS = ("latency", "energy")
HIDDEN_IN_GRAPHS = "measured on ONNX Runtime, which shows nothing of what happens inside a graph"
VERSIONED_PACKAGES = ("effcli", "torch", "transformers", "accelerate", "safetensors", "tokenizers")


class Kept(Protocol):
    """What profiles in one process may share: the model that the last one loaded, the device's ceilings."""

    def load(self, source: Source, **options: Any) -> LoadedModel:
        """Do what :func:`effcli.loading.load` does, or return the model that was loaded so before."""
        ...

    def peaks(self, device: torch.device, dtypes: Sequence[torch.dtype], progress: Progress) -> Peaks:
        """Do what :func:`profilers.peaks.measure_peaks` does, or return what was measured before."""
        ...


class _NothingKept:
    def load(self, source: Source, **options: Any) -> LoadedModel:
        from effcli import loading

        return loading.load(source, **options)

    def peaks(self, device: torch.device, dtypes: Sequence[torch.dtype], progress: Progress) -> Peaks:
        from profilers.peaks import measure_peaks

        return measure_peaks(device, dtypes, progress)


def load_report(path: Path | str) -> dict[str, Any]:
    """Read a saved report as plain data; see :func:`effcli.reports.model.read_report`."""
    return read_report(path)


class Runnable(NamedTuple):
    """A model that is ready to run, and its tokenizer.

    Attributes
    ----------
    model : PreTrainedModel or OnnxModel
    tokenizer : PreTrainedTokenizerBase or None
        None where the checkpoint has none.
    """

    model: PreTrainedModel | OnnxModel
    tokenizer: PreTrainedTokenizerBase | None

    def generate(self, inputs: Any = None, **options: Any) -> Any:
        """Generate with the model; see ``generate`` of transformers.

        Parameters
        ----------
        inputs : str, torch.Tensor or mapping, optional
            A prompt, token ids of shape (batch, tokens), or what a tokenizer returned.
        **options
            As ``model.generate`` takes them: ``max_new_tokens``, ``do_sample``, ``streamer``, …

        Returns
        -------
        str or torch.Tensor
            What follows the prompt, as text, if that was text; else token ids, the given ones first.

        Raises
        ------
        effcli.errors.BadInputError
            For a prompt where the checkpoint has no tokenizer.
        """
        if isinstance(inputs, str):
            if self.tokenizer is None:
                raise BadInputError("this checkpoint has no tokenizer; give token ids instead of a text")
            given = self.tokenizer(inputs, return_tensors="pt", return_token_type_ids=False).to(self.model.device)
            ids = self.model.generate(**given, **options)
            return self.tokenizer.decode(ids[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
        if isinstance(inputs, Mapping):
            return self.model.generate(**inputs, **options)
        return self.model.generate(inputs, **options) if inputs is not None else self.model.generate(**options)


def load(
    model: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    kernels: Literal["auto", "plain"] = "auto",
    compile: bool = False,
    revision: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Runnable:
    """Load a checkpoint to run it: quantized weights repacked for the fastest kernels that the device has.

    >>> import effcli
    >>> effcli.load("out-onnx").generate("Once upon a time", max_new_tokens=20)  # doctest: +SKIP
    >>> model, tokenizer = effcli.load("out")  # doctest: +SKIP

    Parameters
    ----------
    model : str or Path
        A folder that ``effcli optimize`` or ``effcli export`` wrote, or any other source.
    device, dtype : str
        ``auto`` or a torch name.
    kernels : str
        ``auto``, or ``plain`` for plain tensors of ``dtype``.
    compile : bool
        Compile the decode step with ``torch.compile`` over a static cache; the first tokens take a minute.
    revision, allow_pickle, trust_remote_code
        As in :func:`profile`.

    Returns
    -------
    Runnable
        ``(model, tokenizer)``, with a ``generate`` of its own. An export gives an
        :class:`effcli.export.generating.OnnxModel`, which runs on ONNX Runtime.

    Raises
    ------
    effcli.errors.EffcliError
        If the source, device or dtype cannot be used.
    """
    from effcli import checkpoint, sources

    if sources.is_export(Path(model)):
        from effcli.export import opening

        for name, given in (("kernels", kernels != "auto"), ("compile", compile)):
            if given:
                raise BadInputError(f"'{model}' runs on ONNX Runtime, to which {name} means nothing; leave it out")
        exported = opening.load(sources.resolve(str(model), revision=revision), device=device, dtype=dtype)
        return Runnable(exported.model, exported.tokenizer)
    loaded = checkpoint.load(
        model,
        device=device,
        dtype=dtype,
        kernels=kernels,
        compile=compile,
        revision=revision,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
    )
    return Runnable(loaded.model, loaded.tokenizer)


def profile(
    model: str | Path | PreTrainedModel | LoadedModel,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    only: Sequence[str] | None = None,
    refuse_inapplicable: bool | None = None,
    batch: Sequence[int] = (1,),
    context: Sequence[int] | None = None,
    epsilon: Sequence[float] = (0.3,),
    sequences: int = 100,
    text: str | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    config_only: bool = False,
    revision: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    command: str | None = None,
    kept: Kept | None = None,
) -> ProfileReport:
    """Measure a model on this device.

    Parameters
    ----------
    model : str, Path, PreTrainedModel or LoadedModel
        A source as on the command line, or a live model, which is measured where it is and left as it was. Diffusion
        pipelines are for :func:`effcli.profile_pipeline`.
    tokenizer : PreTrainedTokenizerBase, optional
        For a live model; sources bring their own.
    only : sequence of str, optional
        Profilers to run; default all installed, but for those that run only when they are named.
    refuse_inapplicable : bool, optional
        Whether a profiler that has nothing to measure in this model is an error; else the report says why it was
        skipped. Default: an error if ``only`` names it.
    batch, context : sequence of int
        Batch sizes in sequences, context lengths in tokens; ``context=None`` lets each profiler choose.
    epsilon : sequence of float
        Sink thresholds.
    sequences : int
        Sequences that the sink rate averages over.
    text : str, optional
        Text to measure on; default: a text that every Python has.
    seed : int
        Seed of everything random.
    device, dtype : str
        ``auto`` or a torch name. A live model's own are used.
    config_only : bool
        Count on the meta device; no weights are needed or read.
    revision : str, optional
        Of a hub model.
    allow_pickle, trust_remote_code : bool
        Accept pickled weights, run the model's own code. Both can run arbitrary code.
    progress : Progress, optional
        Where to report how far it is.
    command : str, optional
        What the report records as the way to repeat it.
    kept : Kept, optional
        What profiles of this process share, where there are many of them.

    Returns
    -------
    ProfileReport

    Raises
    ------
    effcli.errors.EffcliError
        If the source, device or dtype cannot be used.
    profilers.base.ProfilerError
        If a measurement that was asked for cannot be made.
    """
    from profilers import registry

    started = time.perf_counter()
    progress, kept = progress or SilentProgress(), kept or _NothingKept()
    if refuse_inapplicable is None:
        refuse_inapplicable = only is not None
    names = tuple(only) if only is not None else _default_order(registry.names())
    with progress.task(f"profile {_name_of(model)}", total=len(names) + 1) as overall:
        from profilers.phases import check_context
        from profilers.timing import PhaseTimings

        selected = registry.in_order(names)
        if only is None:
            selected = tuple(item for item in selected if item.default)
            overall.advance(len(names) - len(selected))
        first: Peaks | None = None
        if isinstance(model, (str, Path)):
            from effcli import loading, sources
            from effcli.diffusion.opening import is_pipeline

            if is_pipeline(str(model)):
                raise BadInputError(f"'{model}' is a diffusers pipeline; profile it with effcli.profile_pipeline")
            loading.check_dtype_name(dtype)
            chosen, _ = loading.choose_device(device)  # a wrong name is said before anything is fetched
            trust: dict[str, Any] = {"allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code}
            source = sources.resolve(str(model), config_only=config_only, revision=revision, progress=progress, **trust)
            config_only = config_only or source.kind == "config"
            selected, skipped = _without_weights(selected, config_only, only is not None)
            if source.kind == "onnx":
                selected, skipped = _on_onnx(source.spec, selected, only is not None, config_only)
            # Once more after loading, where a roofline is drawn: on a shared machine a ceiling is the best of several.
            if not config_only and any(item.name == "intensity" for item in selected):
                first = kept.peaks(chosen, loading.native_dtypes(chosen), progress)
            if source.kind == "onnx":
                from effcli.export import opening

                loaded = opening.load(source, device=device, dtype=dtype)
            else:
                loaded = kept.load(
                    source, device=device, dtype=dtype, config_only=config_only, progress=progress, **trust
                )
        else:
            loaded = _live(model, tokenizer)
            config_only = loaded.model.device.type == "meta"
            selected, skipped = _without_weights(selected, config_only, only is not None)
        for length in context or ():
            check_context(loaded.config, length)
        peaks = kept.peaks(loaded.device, _dtypes(loaded), progress)
        overall.advance()
        run_context = ProfileContext(
            model=loaded.model,
            config=loaded.config,
            tokenizer=loaded.tokenizer,
            device=loaded.device,
            dtype=loaded.dtype,
            request=ProfileRequest(
                batches=tuple(batch),
                contexts=None if context is None else tuple(context),
                epsilons=tuple(epsilon),
                sequences=sequences,
                seed=seed,
                text=text,
            ),
            peaks=peaks if first is None else peaks.merged(first),
            timings=PhaseTimings(loaded.model, seed=seed),
            config_only=config_only,
            load_seconds=loaded.load_seconds,
            progress=progress,
        )
        _run(selected, run_context, skipped, overall, refuse_inapplicable=refuse_inapplicable)
    return ProfileReport(
        schema=PROFILE_SCHEMA,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command or f"effcli.profile({loaded.source.spec!r}, ...)",
        seconds_spent=time.perf_counter() - started,
        config_only=config_only,
        model=model_info(loaded),
        environment=environment_of(loaded, run_context.peaks),
        profiles={name: plain(result) for name, result in run_context.results.items()},
        skipped=skipped,
        warnings=_warnings(run_context.results),
    )


def _run(
    selected: Sequence[Profiler],
    context: ProfileContext,
    skipped: dict[str, str],
    overall: Task,
    *,
    refuse_inapplicable: bool,
) -> None:
    """Run the profilers in order; what does not apply to the model goes to ``skipped`` unless it was asked for."""
    from effcli.quiet import quiet_transformers

    with quiet_transformers():
        for profiler in selected:
            try:
                context.results[profiler.name] = profiler.run(context)
            except NotApplicableError as error:
                if refuse_inapplicable:
                    raise
                skipped[profiler.name] = str(error)
            overall.advance()


def _dtypes(loaded: LoadedModel) -> tuple[torch.dtype, ...]:
    import torch

    return tuple(dict.fromkeys((loaded.dtype, torch.float32)))


def _default_order(installed: Sequence[str]) -> tuple[str, ...]:
    known = [name for name in PROFILER_ORDER if name in installed]
    return (*known, *(name for name in installed if name not in known))


def _without_weights(
    selected: tuple[Profiler, ...], config_only: bool, asked_for: bool
) -> tuple[tuple[Profiler, ...], dict[str, str]]:
    """Without weights, leave out the profilers that need them; refuse if the user named one of them."""
    if not config_only:
        return selected, {}
    skipped = {item.name: "needs weights; profile without --config-only" for item in selected if item.needs_weights}
    if asked_for and skipped:
        raise BadInputError(f"profiler '{next(iter(skipped))}' needs weights; run it without --config-only")
    return tuple(item for item in selected if not item.needs_weights), skipped


def _on_onnx(
    spec: str, selected: tuple[Profiler, ...], asked_for: bool, config_only: bool
) -> tuple[tuple[Profiler, ...], dict[str, str]]:
    """Of an export, leave out the profilers that look into a model; refuse if the user named one of them."""
    if config_only:
        raise BadInputError(f"'{spec}' is an ONNX export; count without weights with the model it was made from")
    skipped = {item.name: HIDDEN_IN_GRAPHS for item in selected if item.name not in ONNX_PROFILERS}
    if asked_for and skipped:
        raise BadInputError(
            f"profiler '{next(iter(skipped))}' needs the layers of a torch model and '{spec}' is an ONNX export; give "
            f"the model it was made from, or --only {','.join(ONNX_PROFILERS)}"
        )
    return tuple(item for item in selected if item.name in ONNX_PROFILERS), skipped


def _name_of(model: str | Path | PreTrainedModel | LoadedModel) -> str:
    from effcli.loading import LoadedModel

    if isinstance(model, (str, Path)):
        return str(model)
    return model.source.spec if isinstance(model, LoadedModel) else type(model).__name__


def _live(model: PreTrainedModel | LoadedModel, tokenizer: PreTrainedTokenizerBase | None) -> LoadedModel:
    import torch

    from effcli.loading import LoadedModel
    from effcli.sources import Source

    if isinstance(model, LoadedModel):
        return model
    return LoadedModel(
        model=model,
        config=model.config,
        tokenizer=tokenizer,
        source=Source(spec=model.config._name_or_path or type(model).__name__, kind="live", path=None),
        device=torch.device("cpu") if model.device.type == "meta" else model.device,
        device_reason="where the live model is",
        dtype=model.dtype,
        dtype_reason="the live model's own",
        load_seconds=None,
        notes=(),
        fingerprint=None,
        revision=None,
    )


def model_info(loaded: LoadedModel) -> ModelInfo:
    """Return which model was loaded and what it is, as reports say it."""
    from profilers.weights import weight_bytes_and_parameters

    config, model = loaded.config.get_text_config(decoder=True), loaded.model
    exported = loaded.source.kind == "onnx"
    weights = model.weight_size if exported else weight_bytes_and_parameters(model)
    heads = getattr(config, "num_attention_heads", None)
    hidden = getattr(config, "hidden_size", None)
    head_dim = getattr(config, "head_dim", None) or (hidden // heads if heads and hidden else None)
    return ModelInfo(
        source=loaded.source.spec,
        kind=loaded.source.kind,
        architecture=model.architecture if exported else type(model).__name__,
        model_type=loaded.config.model_type,
        parameters=weights.parameters,
        weight_bytes=weights.bytes,
        dtype=str(loaded.dtype).removeprefix("torch."),
        dtype_reason=loaded.dtype_reason,
        layers=getattr(config, "num_hidden_layers", None),
        hidden_size=hidden,
        attention_heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None),
        head_dim=head_dim,
        context_limit=getattr(config, "max_position_embeddings", None),
        revision=loaded.revision,
        fingerprint=loaded.fingerprint,
        load_seconds=loaded.load_seconds,
        notes=loaded.notes,
    )


def environment_of(loaded: LoadedModel | OpenedPipeline, peaks: Peaks | None) -> Environment:
    """Return the device and software that a loaded model is measured on, as reports say it."""
    import torch

    from profilers import device as devices

    on = loaded.device
    return Environment(
        device=str(on),
        device_name=devices.device_name(on),
        device_reason=loaded.device_reason,
        threads=torch.get_num_threads() if on.type == "cpu" else None,
        memory_total_bytes=devices.memory_total_bytes(on),
        memory_available_bytes=devices.memory_available_bytes(on),
        peaks=peaks,
        peaks_reason=None,
        versions={"python": platform.python_version()}
        | {name: version(name) for name in VERSIONED_PACKAGES}
        | ({"onnxruntime": _onnxruntime()} if loaded.source.kind == "onnx" else {}),
        platform=platform.platform(),
    )


def _onnxruntime() -> str:
    from effcli.export.opening import version_of

    return version_of()


def _warnings(results: dict[str, Any]) -> tuple[str, ...]:
    latency = results.get("latency")
    return tuple(line for point in getattr(latency, "points", ()) for line in point.warnings)
