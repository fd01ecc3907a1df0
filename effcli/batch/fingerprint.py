"""What a job's result depends on: when none of it changed, what an earlier run finished is still good.

Where a job runs, what it may take and what it waits for do not change its result, and are no part of it; nor are
environment variables, which may hold secrets.
"""

from __future__ import annotations

import contextlib
import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any

from effcli import built_source, builtin_models, recipes, sources, staging
from effcli.batch import machine
from effcli.batch.jobs_file import path_parameters
from effcli.batch.model import Job
from effcli.checkpoint_files import CONFIG, PIPELINE, sha256_each
from effcli.errors import SourceError
from effcli.preflight import installed_versions, source_files
from effcli.reports.model import plain
from effcli.sources import Source
from passes import registry

_RUNTIME = ("onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "optimum")
_PIPELINES = ("diffusers",)
_WHOLE_FOLDERS = ("diffusers", "onnx")
"""Kinds of sources whose files lie in folders of their own, or are not named as weights are."""
_NEVER = ((-1, -1), "")
_SETTLED_NANOSECONDS = 2_000_000_000


class Fingerprints:
    """Takes fingerprints, and hashes each file once for as long as its path, size and time stay the same.

    Parameters
    ----------
    cache : Path, optional
        JSON file that keeps the hashes from one run to the next; default: only in memory.
    device_class : callable, optional
        Returns what the device of a job is: ``type`` and ``name``, or ``any_of`` several of these, where the job may
        run on either; default: as this machine has it. See :meth:`effcli.batch.engine.Engine.device_class`.
    """

    def __init__(
        self, cache: Path | None = None, device_class: Callable[[Job], Mapping[str, Any]] | None = None
    ) -> None:
        self._cache = cache
        here = functools.cache(machine.local_device)
        self._device_class = device_class or (lambda job: here(job.device))
        self._known = _read_cache(cache)

    def of(self, job: Job) -> dict[str, dict[str, Any]]:
        """Return what the job depends on, JSON-ready, by part: source, recipe, texts, options, versions, device.

        Nothing is loaded or fetched. Of a hub model, ``source`` holds the commit that is in the local cache, None where
        there is none yet; of another job's output, only that job's name.

        Raises
        ------
        effcli.errors.EffcliError
            If the model or a text is not there or cannot be read.
        passes.base.PassError
            For a recipe whose passes are not installed.
        """
        settings = dict(job.settings)
        options: dict[str, Any] = {
            "kind": job.kind,
            "dtype": job.dtype,
            "trust_remote_code": job.trust_remote_code,
            "allow_pickle": job.allow_pickle,
        }
        recipe: dict[str, Any] = {}
        texts: list[Any] = [settings.get("text")]
        from_config = bool(settings.get("config_only"))
        if "recipe" in settings:
            whole = recipes.from_mapping(settings.pop("recipe"))
            recipe = whole.model_dump(mode="json", exclude={"gates"})
            options["gates"] = list(whole.gates)
            chain = whole.chain()
            texts += [whole.calibration.text, whole.evaluation.text, whole.evaluation.tasks]
            texts += [path for item in chain for _, path in path_parameters(item)]
            if made_by := built_source.maker(chain):
                recipe["source"] = plain(dict(made_by[1]))
                from_config = True
        files, kind = self._source(job, from_config)
        return {
            "source": files,
            "recipe": recipe,
            "texts": self._sha256({str(text): Path(text) for text in texts if text is not None}),
            "options": options | settings,
            "versions": dict(_versions(job.kind, kind, tuple(step["name"] for step in recipe.get("passes", ())))),
            "device": dict(self._device_class(job)),
        }

    def difference(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
        """Say in words what differs; see :func:`difference`."""
        return difference(old, new)

    def _source(self, job: Job, from_config: bool) -> tuple[dict[str, Any], str]:
        """Return what the model is read from, and of which kind that is."""
        if job.kind == "call":
            return {}, "none"
        if job.model_from is not None:
            return {f"output of {job.model_from}": "as that job made it"}, "output"
        known = builtin_models.CATALOGUE.get(job.model)
        if isinstance(known, builtin_models.BuiltinModel) and not Path(job.model).exists():
            return {job.model: known.file_sha256}, "builtin"  # pinned: what is fetched later has this sha256
        source = sources.resolve_local(
            job.model, config_only=from_config, allow_pickle=job.allow_pickle, revision=job.revision
        )
        if source is None:
            return {f"{job.model}@{job.revision or 'main'}": local_revision(job.model, job.revision)}, "hub"
        return self._sha256(_files(source, from_config)), source.kind

    def _sha256(self, files: Mapping[str, Path]) -> dict[str, str]:
        """Return the sha256 of files by name; those that are not known are hashed side by side."""
        try:
            found = {name: (str(path.absolute()), _state(path)) for name, path in files.items()}
            todo = {Path(path): state for path, state in found.values() if self._known.get(path, _NEVER)[0] != state}
            digests = sha256_each(todo)
        except OSError as error:
            raise SourceError(
                f"cannot read '{error.filename}' ({error.strerror}); check the path and who may read it"
            ) from None
        made = {name: digests.get(Path(path)) or self._known[path][1] for name, (path, _) in found.items()}
        # What changed a moment ago can change again without its time telling: it is hashed anew the next time.
        settled = {
            path for path, (_, nanoseconds) in todo.items() if time.time_ns() - nanoseconds > _SETTLED_NANOSECONDS
        }
        self._known.update({str(path): (todo[path], digests[path]) for path in settled})
        if settled:
            _write_cache(self._cache, self._known)
        return made


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Say in words what differs between two fingerprints; an empty string where nothing does.

    The commit of a hub model that one of them does not know is no difference: a job's first run is what fetches it. Nor
    is a device that is one of those where the job may run now.
    """
    old, new = dict(old), dict(new)
    before, now = old.get("source", {}), new.get("source", {})
    unknown = {key for key in before.keys() & now.keys() if before[key] is None or now[key] is None}
    for item in (old, new):
        item["source"] = {key: value for key, value in item.get("source", {}).items() if key not in unknown}
    there = _devices(new)
    if all(device in there for device in _devices(old)):
        new["device"] = old.get("device")
    return staging.changed(old, new)


def _devices(fingerprint: Mapping[str, Any]) -> Sequence[Mapping[str, str]]:
    found = fingerprint.get("device", {})
    several: Sequence[Mapping[str, str]] = found.get("any_of", (found,))
    return several


def local_revision(spec: str, revision: str | None = None) -> str | None:
    """Return the commit of a hub model that the local cache holds, None where it holds none."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    for name in (CONFIG, PIPELINE):
        with contextlib.suppress(HFValidationError):
            found = try_to_load_from_cache(spec, name, revision=revision)
            if isinstance(found, str):
                return Path(found).parent.name
    return None


def _files(source: Source, from_config: bool) -> dict[str, Path]:
    """Return the files that a job reads of a source, by name."""
    assert source.path is not None
    if source.kind in _WHOLE_FOLDERS:
        inside = sorted(path for path in source.path.rglob("*") if path.is_file() and not path.name.startswith("."))
        return {path.relative_to(source.path).as_posix(): path for path in inside}
    config = source.path / CONFIG if source.path.is_dir() else source.path
    if source.kind == "config" or from_config and source.path.is_dir():
        return {path.name: path for path in (config, *built_source.files_beside(config))}
    return {path.name: path for path in source_files(source)}


@functools.cache
def _versions(kind: str, source_kind: str, passes: tuple[str, ...]) -> dict[str, str]:
    """Return the versions of the packages that a job runs on; where a pass comes from another package, of that, too."""
    found = installed_versions()
    more = {entry.dist.name for entry in entry_points(group=registry.GROUP) if entry.name in passes and entry.dist}
    if kind == "export" or source_kind == "onnx":
        more.update(_RUNTIME)
    if source_kind == "diffusers":
        more.update(_PIPELINES)
    for name in sorted(more - {"effcli"}):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _state(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _read_cache(path: Path | None) -> dict[str, tuple[tuple[int, int], str]]:
    """Return what a cache file knows, nothing where there is none or it is not whole: hashing again costs only time."""
    if path is None:
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return {name: ((int(size), int(time_ns)), str(digest)) for name, (size, time_ns, digest) in data.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _write_cache(path: Path | None, known: Mapping[str, tuple[tuple[int, int], str]]) -> None:
    if path is None or not path.parent.is_dir():
        return
    data = {name: [*state, digest] for name, (state, digest) in known.items()}
    temporary = path.with_suffix(".new")
    with contextlib.suppress(OSError):  # without it the files are hashed again, and nothing else is lost
        temporary.write_text(json.dumps(data), encoding="utf-8")
        temporary.replace(path)
