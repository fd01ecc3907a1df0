"""Load a checkpoint to run it, quantized or not: fast kernels, and on request a compiled decode step.

Any source that ``effcli`` knows can be loaded. Quantized weights are repacked for the device
(``docs/passes/kernels.md``); what was done is in the record that comes with the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from effcli import loading, provenance, sources
from effcli.checkpoint_files import verify_files
from effcli.errors import SourceError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from effcli.loading import LoadedModel
    from effcli.provenance import Provenance
    from effcli.reports.optimize_model import CompiledDecode
    from passes.base import LoadRecord
    from profilers.base import Progress


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to run.

    Attributes
    ----------
    source : LoadedModel
        With everything that a report says about where the model came from.
    provenance : Provenance or None
        Content of ``effcli.json``; None where there is none.
    """

    source: LoadedModel
    provenance: Provenance | None

    @property
    def model(self) -> PreTrainedModel:
        """The model, in evaluation mode."""
        return self.source.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """Its tokenizer; None where the checkpoint has none."""
        return self.source.tokenizer

    @property
    def record(self) -> LoadRecord:
        """Which kernel runs each class of quantized layers."""
        return self.source.record


def load(
    source: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    kernels: Literal["auto", "plain"] = "auto",
    compile: bool = False,
    verify: bool = False,
    revision: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Loaded:
    """Load a model to run it.

    Parameters
    ----------
    source : str or Path
        A folder that ``effcli optimize`` wrote, a transformers folder, a ``.gguf`` file, a built-in name or a hub id.
    device : str
        ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
    dtype : str
        Of activations and of weights that are not quantized: ``auto`` or a torch name.
    kernels : str
        ``auto``: the fastest that the device has; ``plain``: weights decompressed to ``dtype``.
    compile : bool
        Have ``model.generate`` compile the decode step over a static cache (:func:`profilers.compiled.compile_decode`).
    verify : bool
        Compare every file with its sha256 in ``effcli.json`` first.
    revision : str or None
        Of a hub id.
    allow_pickle, trust_remote_code : bool
        Accept pickled weights, run the model's own code. Both can run arbitrary code.
    progress : Progress or None

    Raises
    ------
    SourceError
        If the source is damaged, incomplete or not trusted, or has no ``effcli.json`` to verify it with.
    BadInputError
        For an unknown device or dtype.
    NoRoomError
        If the weights do not fit the memory there is.
    """
    loading.check_dtype_name(dtype)
    loading.choose_device(device)  # a wrong name is said before anything is fetched
    trust = {"allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code}
    resolved = sources.resolve(str(source), revision=revision, progress=progress, **trust)
    made = provenance.read(resolved.path) if resolved.path is not None and resolved.path.is_dir() else None
    if verify:
        if made is None or resolved.path is None:
            raise SourceError(f"'{source}' has no {provenance.FILE}, so there is nothing to verify it with")
        verify_files(resolved.path, made.files, provenance.FILE)
    loaded = loading.load(resolved, device=device, dtype=dtype, kernels=kernels, progress=progress, **trust)
    if compile:
        from profilers.compiled import compile_decode

        compile_decode(loaded.model)
    return Loaded(loaded, made)


def measure_compiled_decode(model: PreTrainedModel, context: int) -> CompiledDecode:
    """Time one decode step of batch 1 with ``torch.compile`` beside without; see :mod:`profilers.compiled`.

    Parameters
    ----------
    model : PreTrainedModel
    context : int
        Tokens in the cache.
    """
    from effcli.reports.optimize_model import CompiledDecode
    from profilers.compiled import time_compiled_decode

    timing = time_compiled_decode(model, context)
    return CompiledDecode(
        context=context,
        eager_tpot_seconds=timing.eager_seconds,
        compiled_tpot_seconds=timing.compiled_seconds,
        compile_seconds=timing.compile_seconds,
        reason=timing.reason,
    )
