"""A source that a pass makes from a config without weights, beside the output: the original that is then changed.

::

    CONFIG ── meta model, tokenizer files ──> Pass.build_source ──> .OUT-twin.effcli/ ──rename──> OUT-twin
                                                                                                   └─> the pipeline

It is staged like a checkpoint (:mod:`effcli.staging`): a run that was stopped goes on with ``--resume``, and one that
has finished its source takes it again where nothing that it depends on is another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effcli import provenance, staging
from effcli.checkpoint_files import CONFIG, combined_sha256, find_weights, sha256_of, verify_files
from effcli.errors import BadInputError, InterruptedRunError, SourceError
from effcli.sources import Source
from passes.base import Pass, SourceContext

if TYPE_CHECKING:
    from effcli.loading import LoadedModel
    from effcli.preflight import Options
    from effcli.recipes import Calibration, Evaluation, Recipe
    from profilers.base import Progress

SUFFIX = "-twin"
_STAGE = "source"
_DEPENDS_ON = "made_from"


def maker(chain: Sequence[Pass]) -> tuple[Pass, Mapping[str, Any]] | None:
    """Return the pass that makes the source, and what that depends on; None where the source has weights.

    Raises
    ------
    BadInputError
        If that is not the first pass.
    passes.base.PassError
    """
    for position, item in enumerate(chain):
        recipe = item.source_recipe
        if recipe is None:
            continue
        if position:
            raise BadInputError(
                f"pass '{item.name}' starts from a config alone, and '{chain[0].name}' would change the model before; "
                f"give --pass {item.name} first"
            )
        return item, recipe
    return None


def resolve(spec: str, item: Pass) -> Source:
    """Return the config that a source is made from.

    Raises
    ------
    SourceError
        If there is none, or weights lie beside it.
    """
    path = Path(spec).expanduser()
    config = path / CONFIG if path.is_dir() else path
    if not config.is_file() or config.suffix.lower() != ".json":
        raise SourceError(
            f"pass '{item.name}' with these parameters starts from a config alone, and '{spec}' is neither a "
            f"{CONFIG} nor a folder with one"
        )
    if find_weights(config.parent, allow_pickle=True) is not None:
        raise SourceError(
            f"'{config.parent}' has weights, and pass '{item.name}' with these parameters starts from a config alone; "
            f"leave the parameters out ({item.from_config}), or copy {CONFIG} to a folder without weights"
        )
    return Source(spec, "config", config)


def no_weights(spec: str, chain: Sequence[Pass]) -> SourceError:
    """Return the error for a model without weights, with the passes of the chain that could start from its config."""
    able = [f"--pass {item.name}:{item.from_config}" for item in chain if item.from_config is not None]
    hint = f"; or start from the config alone: {able[0]}" if able else ""
    return SourceError(f"'{spec}' has no weights to optimize; give a model folder, a .gguf file or a hub id{hint}")


def lies_at(target: Path) -> Path:
    """Return the folder of the source that is made for an output."""
    return target.with_name(target.name + SUFFIX)


def build(
    item: Pass,
    depends_on: Mapping[str, Any],
    bare: LoadedModel,
    target: Path,
    recipe: Recipe,
    options: Options,
    progress: Progress,
    versions: Mapping[str, str],
) -> Source:
    """Have a pass make its source, or take the one that an earlier run made.

    Parameters
    ----------
    item : Pass
    depends_on : mapping
        Its :attr:`passes.base.Pass.source_recipe`.
    bare : LoadedModel
        Of the config, on the meta device.
    target : Path
        Of the whole run, absolute.
    recipe, options, progress
        Of the run.
    versions : mapping
        Of the packages that the result depends on.

    Raises
    ------
    BadInputError
        If a text of the recipe cannot be read; the source's folder is there and neither ``--resume`` nor ``--force`` is
        given; or it is of another run.
    InterruptedRunError
        On Ctrl-C; what the pass has saved is kept.
    effcli.errors.EffcliError, passes.base.PassError
        If the source cannot be made or written.
    """
    folder = lies_at(target)
    config = bare.source.path
    assert config is not None
    fingerprint = _fingerprint(item, depends_on, bare, config, recipe, versions)
    if _is_finished(folder, fingerprint, item, options):
        return _source(folder, bare.source.spec, item)
    _check_texts(recipe)
    force = options.force or (options.resume and staging.published_earlier(folder))
    staging.check_target(folder, config, force=force)
    with staging.open_staging(folder, fingerprint, resume=options.resume, force=options.force) as staged:
        try:
            _make(staged, item, bare, config, recipe, fingerprint, progress)
            staged.publish(force=force)
        except KeyboardInterrupt:
            if staged.is_empty():
                raise InterruptedRunError("interrupted before anything was finished; nothing was written") from None
            raise InterruptedRunError(
                f"interrupted; what was finished is kept in '{staged.folder}': run again with --resume to go on, or "
                "with --force to start again"
            ) from None
    return _source(folder, bare.source.spec, item)


def texts(item: Pass, chain: Sequence[Pass], folder: Path, recipe: Recipe) -> tuple[Evaluation, Calibration]:
    """Return what is evaluated and calibrated on: texts of the source that was made, where the user names none."""
    known = item.source_texts(folder)
    evaluation, calibration = recipe.evaluation, recipe.calibration
    if evaluation.text is None and evaluation.dataset is None and known.evaluation is not None:
        evaluation = evaluation.model_copy(update={"text": known.evaluation})
    if calibration.text is None and any(other.needs_calibration for other in chain):
        calibration = calibration.model_copy(update={"text": known.calibration})
    return evaluation, calibration


def _make(
    staged: staging.Staging,
    item: Pass,
    bare: LoadedModel,
    config: Path,
    recipe: Recipe,
    fingerprint: staging.Fingerprint,
    progress: Progress,
) -> None:
    """Have the pass write its source, and put the folder together that is published."""
    from effcli.quiet import quiet_transformers
    from profilers.device import device_name

    result = staged.finished(_STAGE)
    if result is None:
        folder = staged.begin(_STAGE)
        with quiet_transformers(progress):
            notes = item.build_source(
                folder,
                SourceContext(
                    model=bare.model,
                    tokenizer=bare.tokenizer,
                    device=bare.device,
                    work=staged.work(_STAGE),
                    evaluation_window=0 if recipe.evaluation.dataset else recipe.evaluation.context,
                    seed=recipe.seed,
                    progress=progress,
                ),
            )
        for path in files_beside(config):
            if not (folder / path.name).exists():
                (folder / path.name).write_bytes(path.read_bytes())
        result = {"notes": list(notes)}
        staged.finish(_STAGE, result)
        staged.drop_work(_STAGE)
    out = staged.begin(staged.out.name)
    manifest = staged.manifest(_STAGE)
    for name in manifest:
        staging.link_or_copy(staged.path(_STAGE) / name, out / name)
    made = provenance.Provenance(
        format=provenance.FORMAT,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        source={
            "spec": bare.source.spec,
            "kind": "config",
            "revision": None,
            "fingerprint": combined_sha256({config: sha256_of(config)}),
            "files": dict(fingerprint["source"]),
            "licence": None,
            "base_model": None,
            "quantized": None,
            "passes": [],
            "made_by": item.name,
            "notes": result["notes"],
            _DEPENDS_ON: {part: dict(values) for part, values in fingerprint.items()},
        },
        recipe=recipe.model_dump(mode="json", exclude={"gates"}),
        passes=(),
        dtype=str(bare.dtype).removeprefix("torch."),
        device=device_name(bare.device),
        versions=dict(fingerprint["versions"]),
        files=manifest,
    )
    (out / provenance.FILE).write_text(made.to_json(), encoding="utf-8")


def _check_texts(recipe: Recipe) -> None:
    """Refuse texts that cannot be read before anything is trained."""
    from effcli.eval_text import read_text
    from profilers.tasks import read_task

    for path in (recipe.evaluation.text, recipe.calibration.text):
        if path is not None:
            read_text(path)
    if recipe.evaluation.tasks is not None:
        read_task(recipe.evaluation.tasks, seed=recipe.seed)


def files_beside(config: Path) -> list[Path]:
    """Return the files beside a config that go along with a model: tokenizer, generation config, licence."""
    from effcli.assembly import is_companion

    return [path for path in sorted(config.parent.iterdir()) if path.is_file() and is_companion(path)]


def _fingerprint(
    item: Pass,
    depends_on: Mapping[str, Any],
    bare: LoadedModel,
    config: Path,
    recipe: Recipe,
    versions: Mapping[str, str],
) -> staging.Fingerprint:
    """Return what the source depends on, by part."""
    return {
        "source": {path.name: sha256_of(path) for path in (config, *files_beside(config))},
        "recipe": {"seed": recipe.seed, "evaluation context": recipe.evaluation.context, "pass": item.name}
        | dict(depends_on),
        "options": {"device": str(bare.device), "dtype": str(bare.dtype).removeprefix("torch.")},
        "versions": dict(versions),
    }


def _is_finished(folder: Path, fingerprint: staging.Fingerprint, item: Pass, options: Options) -> bool:
    """Say whether an earlier run made this very source, and this one may take it.

    Raises
    ------
    BadInputError
        If one is there and it may not.
    """
    made = provenance.read(folder) if folder.is_dir() else None
    known = None if made is None else made.source.get(_DEPENDS_ON)
    if made is None or not isinstance(known, dict) or (options.force and not options.resume):
        return False
    differences = staging.changed(known, fingerprint)
    if not options.resume:
        take = "" if differences else "--resume to take it as it is, "
        raise BadInputError(
            f"'{folder}' is there, which pass '{item.name}' made; add {take}--force to make it again, or choose "
            "another --output"
        )
    if differences and not options.force:
        raise BadInputError(
            f"'{folder}' was made otherwise: {differences}; run again as before to take it, with --force to make it "
            "again, or choose another --output"
        )
    return not differences


def _source(folder: Path, spec: str, item: Pass) -> Source:
    made = provenance.read(folder)
    assert made is not None
    verify_files(folder, made.files, provenance.FILE)
    notes = (f"pass '{item.name}' made the original from '{spec}': '{folder}'", *made.source["notes"])
    return Source(str(folder), "folder", folder, notes=notes)
