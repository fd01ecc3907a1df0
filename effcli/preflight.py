"""Everything about ``effcli optimize`` that can be checked before weights are loaded, in one object.

::

    recipe ──> passes, gates        source ──> meta model, sha256 of its files      texts ──> windows, calibration
                       └──────────────────────────> Job <──────────────────────────────┘
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from effcli import built_source, builtin_models, gates, onnx_stage, provenance, staging
from effcli.checkpoint_files import CONFIG, combined_sha256, find_weights, sha256_each, sha256_of
from effcli.errors import BadInputError
from effcli.recipes import Recipe
from effcli.reports.model import plain
from effcli.stage_times import Times
from passes.base import Pass

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from effcli.evaluation import EvaluationText
    from effcli.loading import LoadedModel
    from effcli.sources import Source
    from profilers.base import Progress

DEFAULT_CONTEXT = 512
VERSIONED = ("effcli", "torch", "transformers", "llmcompressor", "compressed-tensors")
CARD = "README.md"
LEGAL = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY", "COPYING")
_WEIGHT_SUFFIXES = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".onnx", ".pkl")


@dataclass(frozen=True)
class Options:
    """What the user asked for besides model, recipe and output.

    Attributes
    ----------
    device, dtype, kernels : str
        As given; the job has what they mean here.
    export : str or None
        Format that the result is written in too.
    """

    device: str = "auto"
    dtype: str = "auto"
    revision: str | None = None
    allow_pickle: bool = False
    trust_remote_code: bool = False
    resume: bool = False
    force: bool = False
    kernels: Literal["auto", "plain"] = "auto"
    compile: bool = False
    context: int | None = None
    batch: int = 1
    command: str | None = None
    export: str | None = None

    @property
    def trust(self) -> dict[str, Any]:
        """Keyword arguments of everything that opens a checkpoint."""
        return {"allow_pickle": self.allow_pickle, "trust_remote_code": self.trust_remote_code}


@dataclass(frozen=True)
class Job:
    """A checked run of ``effcli optimize``.

    Attributes
    ----------
    output : str
        The folder as the user named it; ``target`` is its absolute path.
    bare : LoadedModel
        The source's model on the meta device.
    gates : tuple of Gate
    texts : EvaluationText
    context : int
        Tokens of the point that is measured.
    source_files : dict of str to str
        sha256 by name.
    source_fingerprint : str
        Of the weight files, as profiles record it.
    """

    spec: str
    recipe: Recipe
    output: str
    target: Path
    options: Options
    chain: tuple[Pass, ...]
    gates: tuple[gates.Gate, ...]
    source: Source
    bare: LoadedModel
    texts: EvaluationText
    context: int
    source_files: dict[str, str]
    source_fingerprint: str

    @property
    def device(self) -> torch.device:
        """Where everything runs."""
        return self.bare.device

    @property
    def command(self) -> str:
        """The way to repeat the run."""
        return self.options.command or f"effcli.optimize({self.spec!r}, recipe, {str(self.target)!r})"

    @property
    def parameters(self) -> int:
        """Of the original, each shared tensor once."""
        return sum(item.numel() for item in self.bare.model.parameters())

    def fingerprint(self) -> dict[str, dict[str, Any]]:
        """Return what the staged work depends on; gates do not enter it, nor does an export, which only adds to it."""
        recipe = self.recipe.model_dump(mode="json", exclude={"gates"})
        texts = {
            str(path): sha256_of(path)
            for path in (self.recipe.calibration.text, self.recipe.evaluation.text, self.recipe.evaluation.tasks)
            if path is not None
        }
        chosen = {
            "device": str(self.device),
            "dtype": self.options.dtype,
            "batch": self.options.batch,
            "context": self.context,
            "kernels": self.options.kernels,
            "compile": self.options.compile,
        }
        return {
            "source": dict(self.source_files),
            "recipe": recipe,
            "texts": texts,
            "options": chosen,
            "versions": installed_versions(),
        }

    def provenance_source(self) -> dict[str, Any]:
        """Return the part of ``effcli.json`` that says where the model came from."""
        card = original_card(self.source)
        return {
            "spec": self.spec,
            "kind": self.source.kind,
            "revision": self.source.revision,
            "fingerprint": self.source_fingerprint,
            "files": dict(self.source_files),
            "licence": licence_of(self.source, card),
            "base_model": self.spec if self.source.kind == "hub" else _named_in(card, "base_model"),
            "quantized": quantized_before(self.source)[0],
            "passes": _passes_of(self.source),
        }


def prepare(
    model: str,
    recipe: Recipe,
    output: Path,
    options: Options,
    progress: Progress,
    times: Times | None = None,
    *,
    make_source: bool = True,
) -> Job:
    """Check everything that can be checked without loading weights; add its time to ``times``.

    Where a pass makes its own source from a config, that is done here, after all that can be checked before;
    with ``make_source=False`` the job's source stays the config.

    Raises
    ------
    effcli.errors.EffcliError
        For a source, output, option, gate or text that cannot be used.
    passes.base.PassError
        For a pass or parameter that is not known, an order that is forbidden, or a model that a pass cannot change.
    profilers.base.ProfilerError
        For a text that is too short, or a context past the model's limit.
    """
    from effcli import loading, sources
    from effcli.evaluation import evaluation_windows
    from profilers.phases import check_context, context_limit
    from profilers.tasks import read_task

    clock = times or Times()
    with clock.stage("check", own=True):
        chain = recipe.chain()
        for item in chain:
            item.check_complete()
        if options.export is not None:
            onnx_stage.check(options.export, model, options.device, options.dtype, chain)
        parsed = tuple(gates.parse(text) for text in recipe.gates)
        loading.check_dtype_name(options.dtype)
        device, _ = loading.choose_device(options.device)
        for item in chain:
            if item.needs_gpu and device.type != "cuda":
                raise BadInputError(
                    f"pass '{item.name}' with these parameters needs a CUDA GPU and the device is '{device}'; "
                    "run it where there is one, or choose other parameters"
                )
        target = Path(output).expanduser().absolute()
        local = Path(model).expanduser()
        # A run that was stopped after its last rename has only to clean up; doing the rename again is that, too.
        force = options.force or (options.resume and staging.published_earlier(target))
        staging.check_target(target, local if local.exists() else None, force=force)
        made_by = built_source.maker(chain)
        if made_by is None:
            if local.is_dir() and sources.is_export(local):
                raise sources.export_refused(model, local)
            if local.is_dir() and (local / CONFIG).is_file() and find_weights(local, allow_pickle=True) is None:
                raise built_source.no_weights(model, chain)
            source = sources.resolve(model, revision=options.revision, progress=progress, **options.trust)
            if source.kind == "config" or source.path is None:
                raise built_source.no_weights(model, chain)
        else:
            source = built_source.resolve(model, made_by[0])
        assert source.path is not None
        staging.check_target(target, source.path, force=force)
        _check_nothing_is_lost(model, source.path)
        bare = loading.load(
            source, device=options.device, dtype=options.dtype, config_only=True, progress=progress, **options.trust
        )
        limit = context_limit(bare.config)
        context = options.context or min(DEFAULT_CONTEXT, limit or DEFAULT_CONTEXT)
        check_context(bare.config, context)
        check_context(bare.config, recipe.evaluation.context)
    with clock.stage("passes: check", own=False):
        check_chain(chain, bare.model)
    evaluation, calibration = recipe.evaluation, recipe.calibration
    if made_by is not None and make_source:
        maker, depends_on = made_by
        with clock.stage(f"pass: {maker.name}: making the source", own=False):
            source = built_source.build(
                maker, depends_on, bare, target, recipe, options, progress, installed_versions()
            )
        assert source.path is not None
        with clock.stage("check", own=True):
            bare = loading.load(
                source, device=options.device, dtype=options.dtype, config_only=True, progress=progress, **options.trust
            )
            evaluation, calibration = built_source.texts(maker, chain, source.path, recipe)
    with clock.stage("quality: texts", own=False):
        vocabulary = bare.config.get_text_config(decoder=True).vocab_size
        texts = evaluation_windows(bare.tokenizer, vocabulary, evaluation, calibration, recipe.seed)
        if recipe.evaluation.tasks is not None:
            read_task(recipe.evaluation.tasks, seed=recipe.seed)
    with clock.stage("check", own=True):
        digests = sha256_each(source_files(source))
    return Job(
        spec=model,
        recipe=recipe,
        output=str(output),
        target=target,
        options=replace(options, force=force),
        chain=chain,
        gates=parsed,
        source=source,
        bare=bare,
        texts=texts,
        context=context,
        source_files={path.name: digest for path, digest in digests.items()},
        source_fingerprint=combined_sha256(
            {path: digest for path, digest in digests.items() if path.suffix in _WEIGHT_SUFFIXES}
        ),
    )


def _passes_of(source: Source) -> list[str]:
    """Return the passes that made a source, in order; empty where none did."""
    assert source.path is not None
    made = provenance.read(source.path) if source.path.is_dir() else None
    return [*made.source.get("passes", ()), *(record.name for record in made.passes)] if made else []


def check_chain(chain: Sequence[Pass], model: PreTrainedModel) -> None:
    """Hold each pass against the model as the ones before it leave it, on the meta device.

    Raises
    ------
    passes.base.PassError
    """
    for number, item in enumerate(chain, start=1):
        item.check(model)
        if number < len(chain):
            model = item.shapes_after(model)


def _check_nothing_is_lost(spec: str, folder: Path) -> None:
    """Refuse a checkpoint with files that a pass put beside its weights: a new one would not have them."""
    from passes import registry

    made = provenance.read(folder) if folder.is_dir() else None
    for record in made.passes if made else ():
        if registry.load(record.name).files:
            raise BadInputError(
                f"'{spec}' was made by {record.name}, and what that put beside the weights would be lost; give its "
                f"original, and all passes: --pass … --pass {record.name}"
            )


def source_files(source: Source) -> list[Path]:
    """Return the files of a source that its model is read from: weights, configuration and tokenizer."""
    assert source.path is not None
    if source.path.is_file():
        return [source.path]
    weights = find_weights(source.path, allow_pickle=True)
    used = set(weights.files) if weights else set()
    others = {
        path
        for path in source.path.iterdir()
        if path.is_file() and path.suffix not in _WEIGHT_SUFFIXES and not path.name.startswith(".")
    }
    return sorted(used | others)


def quantized_before(source: Source) -> tuple[str | None, float | None, int | None]:
    """Return how a source was quantized already, at how many bits a parameter, and the bytes of its weight files.

    A GGUF source is dequantized when it is read; so is a built-in model, which comes as one.
    """
    from effcli import gguf_files

    assert source.path is not None
    if source.kind == "gguf":
        facts = gguf_files.read_facts(source.path.absolute())
        size = source.path.stat().st_size
        if not facts.quantized:
            return None, None, size
        return f"{facts.quantized} GGUF types", 8 * size / sum(facts.elements.values()), size
    if source.kind == "builtin":
        known, record = builtin_models.CATALOGUE[source.spec], builtin_models.read_record(source.path)
        assert isinstance(known, builtin_models.BuiltinModel)  # what is shipped is no kind "builtin"
        return f"{record.quantized} GGUF types", 8 * known.file_bytes / known.parameters, known.file_bytes
    weights = find_weights(source.path, allow_pickle=True)
    return None, None, sum(path.stat().st_size for path in weights.files) if weights else None


def original_card(source: Source) -> str | None:
    """Return the text of the source's model card, None where it has none."""
    path = source.path / CARD if source.path is not None and source.path.is_dir() else None
    return path.read_text(encoding="utf-8", errors="replace") if path is not None and path.is_file() else None


def licence_of(source: Source, card: str | None) -> str | None:
    """Return the licence that the catalogue or the source's model card names."""
    if source.kind == "builtin":
        return builtin_models.CATALOGUE[source.spec].licence
    return _named_in(card, "license")


def _named_in(card: str | None, key: str) -> str | None:
    """Return a text of a model card's front matter; of a list, the first."""
    from effcli.reports.model_card import split_card

    value = split_card(card)[0].get(key) if card else None
    if isinstance(value, list):
        value = value[0] if value else None
    return value if isinstance(value, str) and value.strip() else None


def installed_versions() -> dict[str, str]:
    """Return the versions of the packages that the result depends on."""
    found = {}
    for name in VERSIONED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def source_as_json(source: Source) -> dict[str, Any]:
    """Return a source as the measuring processes take it."""
    data: dict[str, Any] = plain({**asdict(source), "path": str(source.path)})
    return data


def check_saved_profile(job: Job, profile: Mapping[str, Any], dtype: str) -> None:
    """Refuse a saved profile that is not of this source, as it is measured here.

    Raises
    ------
    BadInputError
        Naming what differs.
    """
    from effcli.planning import check_profile, model_profile

    check_profile(profile, architecture=type(job.bare.model).__name__, device=job.device)
    found = profile["model"]["fingerprint"]
    if found != job.source_fingerprint:
        raise BadInputError(
            f"the profile is of other weights (sha256 {str(found)[:12]}…, the source has "
            f"{job.source_fingerprint[:12]}…); profile '{job.spec}' again"
        )
    if profile["model"]["dtype"] != dtype:
        raise BadInputError(
            f"the profile was measured in {profile['model']['dtype']}, this run uses {dtype}; give --dtype "
            f"{profile['model']['dtype']}, or profile again"
        )
    known = model_profile(profile, job.bare.model, job.device, batch=job.options.batch, context=job.context)
    if known.figures.tpot_seconds is None:
        raise BadInputError("the profile holds no timings; profile again without leaving out latency")
