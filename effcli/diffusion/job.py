"""A checked run of ``effcli optimize`` on a diffusion pipeline: everything that can be refused before measuring."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effcli import gates, sources, staging
from effcli.checkpoint_files import sha256_each
from effcli.diffusion import writing
from effcli.diffusion.loading import REFERENCE
from effcli.errors import BadInputError
from effcli.preflight import Options, installed_versions, licence_of, original_card
from effcli.recipes import Evaluation, Recipe
from passes.base import ActsOnPipelines, Pass, PassError
from passes.lemica import LemicaPass

if TYPE_CHECKING:
    from effcli.diffusion.opening import OpenedPipeline
    from profilers.base import Progress


@dataclass(frozen=True)
class PipelineJob:
    """A checked run.

    Attributes
    ----------
    chain : tuple of Pass
        In order; each acts on pipelines.
    item : LemicaPass
        The last of them.
    opened : OpenedPipeline
        The source's pipeline, on its device; its weights are let go of before what was written is loaded.
    files : dict of str to str
        sha256 of the source's files, by relative name.
    """

    spec: str
    recipe: Recipe
    output: str
    target: Path
    options: Options
    chain: tuple[Pass, ...]
    item: LemicaPass
    gates: tuple[gates.Gate, ...]
    source: sources.Source
    opened: OpenedPipeline
    files: dict[str, str]

    @property
    def folder(self) -> Path:
        """Of the source."""
        assert self.source.path is not None
        return self.source.path

    @property
    def changes_weights(self) -> bool:
        """Whether a pass before the schedule changes what the denoiser computes."""
        return any("weights" in entry.changes for entry in self.chain)

    @property
    def command(self) -> str:
        """The way to repeat the run."""
        return self.options.command or f"effcli.optimize({self.spec!r}, recipe, {str(self.target)!r})"

    def take(self) -> Any:
        """Return the source's pipeline and let go of it, so that it is in memory only as long as its user needs it."""
        pipeline, self.opened.pipeline = self.opened.pipeline, None
        return pipeline

    def fingerprint(self) -> dict[str, dict[str, Any]]:
        """Return what the staged work depends on; gates do not enter it."""
        return {
            "source": dict(self.files),
            "recipe": self.recipe.model_dump(mode="json", exclude={"gates"}),
            "texts": {},
            "options": {"device": str(self.opened.device), "dtype": self.options.dtype},
            "versions": installed_versions(),
        }

    def provenance_source(self) -> dict[str, Any]:
        """Return the part of ``effcli.json`` that says where the pipeline came from."""
        how = self.item.parameters.weights
        found: dict[str, Any] = {
            "spec": self.spec,
            "kind": self.source.kind,
            "revision": self.source.revision,
            "fingerprint": self.opened.info.fingerprint,
            "files": dict(self.files),
            "licence": licence_of(self.source, original_card(self.source)),
            "base_model": None,
            "quantized": None,
            "passes": [],
            "weights": how,
        }
        if how == REFERENCE:
            sizes = {name: (self.folder / name).stat().st_size for name in self.files}
            found |= {"path": str(self.folder.resolve()), "sizes": sizes}
        return found


def prepare(model: str, recipe: Recipe, output: Path, options: Options, progress: Progress) -> PipelineJob:
    """Check everything that can be checked before anything is measured.

    Raises
    ------
    effcli.errors.EffcliError, passes.base.PassError
    """
    from effcli.diffusion.opening import open_pipeline

    chain = recipe.chain()
    for entry in chain:
        if not isinstance(entry, ActsOnPipelines):
            raise PassError(f"pass '{entry.name}' works on language models and '{model}' is a diffusers pipeline")
    item = chain[-1]
    if not isinstance(item, LemicaPass):
        raise PassError(f"the last pass for a pipeline is lemica; add --pass lemica after '{item.name}'")
    _check_nothing_ignored(recipe, options)
    parsed = tuple(gates.parse(text, gates.PIPELINE_METRICS) for text in recipe.gates)
    target = Path(output).expanduser().absolute()
    force = options.force or (options.resume and staging.published_earlier(target))
    source = sources.resolve(model, revision=options.revision, progress=progress, **options.trust)
    if source.kind != "diffusers" or source.path is None:
        raise BadInputError(f"'{model}' is no diffusers pipeline")
    staging.check_target(target, source.path, force=force)
    names = writing.pipeline_files(source.path)
    opened = open_pipeline(source, device=options.device, dtype=options.dtype, progress=progress)
    for entry in chain:
        assert isinstance(entry, ActsOnPipelines)
        entry.check_pipeline(opened.pipeline)
    digests = sha256_each([source.path / name for name in names])
    return PipelineJob(
        spec=model,
        recipe=recipe,
        output=str(output),
        target=target,
        options=replace(options, force=force),
        chain=chain,
        item=item,
        gates=parsed,
        source=source,
        opened=opened,
        files={path.relative_to(source.path).as_posix(): digest for path, digest in digests.items()},
    )


def _check_nothing_ignored(recipe: Recipe, options: Options) -> None:
    """Refuse what only language models have, rather than leave it out silently."""
    given = {
        "--calibration-text": recipe.calibration.text is not None,
        "--eval-text, --eval-dataset, --eval-tokens and --tasks": recipe.evaluation != Evaluation(),
        "--context": options.context is not None,
        "--batch": options.batch != 1,
        "--compile": options.compile,
        "--kernels": options.kernels != "auto",
        "--allow-pickle": options.allow_pickle,
        "--trust-remote-code": options.trust_remote_code,
    }
    for name, there in given.items():
        if there:
            raise BadInputError(f"{name}: is for language models, and a pipeline is given; leave it out")
