"""One export, from what was asked for to what lies in the staged folder."""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effcli import signature
from effcli.assembly import is_companion
from effcli.checkpoint_files import CONFIG, ONNX_EXPORT, sha256_of
from effcli.disk import free_bytes
from effcli.errors import BadInputError, GateFailedError, NoRoomError
from effcli.export import checking, graphs, tasks
from effcli.export.opening import FORMAT
from effcli.export.report import Agreement, ExportReport, GraphInfo, QuantizedLayers, Speed
from effcli.export.weights import WeightFile, save
from effcli.formatting import data_size
from effcli.reports.model import EXPORT_SCHEMA, REPORT_FILE

if TYPE_CHECKING:
    import onnx_ir
    import torch

    from effcli.export.quantized import QuantizedWeights
    from effcli.loading import LoadedModel
    from effcli.sources import Source
    from profilers.base import Progress

WEIGHTS = "weights.bin"
TOLERANCES = {"float32": 1e-3, "float16": 0.25, "bfloat16": 1.0}
"""Largest difference of a logit that is let pass, by dtype; rounding to the dtype alone moves logits of 20 by this."""
CHECK_TOKENS = 1024
CHECK_CONTEXT = 256
PACKAGES = ("onnx", "onnxruntime", "onnxscript", "optimum")


@dataclass(frozen=True)
class DryRun:
    """What an export would write, without reading a weight."""

    task: str
    task_reason: str
    opset: int
    opset_reason: str
    dtype: str
    quantization: str | None
    weight_bytes: int
    output: str

    def lines(self) -> list[str]:
        """Return it in words."""
        names = "prefill.onnx, decode.onnx" if self.task == tasks.TEXT_GENERATION else "model.onnx"
        return [
            f"would write {names} and {WEIGHTS} to {self.output}",
            f"task {self.task} ({self.task_reason}); opset {self.opset} ({self.opset_reason})",
            f"at most {data_size(self.weight_bytes)} of weights in {self.dtype}"
            + (f", quantized layers as {self.quantization}" if self.quantization else ""),
        ]


@dataclass
class Job:
    """One export, from the checks to what lies in the staged folder."""

    spec: str
    source: Source
    output: Path
    target: Path
    device: str
    dtype: str
    task: str
    opset: int | None
    tolerance: float | None
    force: bool
    trust: dict[str, Any]
    seed: int
    progress: Progress
    command: str | None
    remedy: str = "give another --dtype, or a higher --tolerance"

    def dry_run(self) -> DryRun:
        """Check what can be checked without weights."""
        loaded, task, reason, dtype, _ = self._load(config_only=True)
        opset, opset_reason = self._opset(loaded.model)
        quantized = self._quantized()
        weights = sum(parameter.numel() for parameter in loaded.model.parameters()) * loaded.dtype.itemsize
        return DryRun(
            task, reason, opset, opset_reason, dtype, quantized.name if quantized else None, weights, str(self.output)
        )

    def write(self, out: Path, started: float) -> ExportReport:
        """Write graphs and weights to a staged folder, check them, and add report and hashes."""
        import torch

        from effcli.loading import describe

        with self.progress.task(f"export {self.spec}", total=4) as overall:
            quantized = self._quantized()
            loaded, task, task_reason, dtype, dtype_reason = self._load()
            _check_room(loaded, self.target)
            opset, opset_reason = self._opset(loaded.model)
            overall.advance()
            # Not which of torch's kernels ran: the graphs have others.
            notes = [note for note in loaded.notes if note not in describe(loaded.record)]
            if quantized is not None and quantized.plain:
                notes.append(
                    f"{len(quantized.plain)} quantized tensors that are no linear layers are written dequantized, "
                    f"first '{quantized.plain[0]}'"
                )
            made, layers, size = self._graphs(loaded, task, opset, quantized, out, notes)
            overall.advance()
            self._companions(loaded, out)
            device, provider_reason = checking.choose_device(loaded.device)
            text, agreement, speed, provider = self._check(loaded, task, out, device, notes)
            overall.advance()
        worst = max(agreement, key=lambda item: item.max_absolute_error)
        largest = worst.max_absolute_error
        tolerance = self.tolerance or TOLERANCES[dtype]
        if not largest <= tolerance:
            raise GateFailedError(
                f"the ONNX graphs of '{self.spec}' differ from torch by {largest:.2g} in {worst.output} of real text "
                f"({worst.phase}), at most {tolerance:g} is let pass; nothing was published: {self.remedy}"
            )
        weight_bytes = _weight_bytes(loaded.model) if quantized is None else size
        file_bytes = sum(item.file_bytes for item in made) + (out / WEIGHTS).stat().st_size
        positions = sum(item.positions for item in agreement)
        from effcli.api import environment_of, model_info

        environment = replace(environment_of(loaded, None), peaks_reason="an export needs no peaks")
        versions = environment.versions | {name: installed_version(name) for name in PACKAGES}
        report = ExportReport(
            schema=EXPORT_SCHEMA,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            command=self.command or f"effcli.export.exporting.export({self.spec!r}, ...)",
            seconds_spent=time.perf_counter() - started,
            format=FORMAT,
            model=model_info(loaded),
            environment=replace(environment, versions=versions),
            task=task,
            task_reason=task_reason,
            opset=opset,
            opset_reason=opset_reason,
            dtype=dtype,
            dtype_reason=dtype_reason,
            quantization=quantized.name if quantized else None,
            quantized_layers=layers,
            graphs=made,
            weight_bytes=weight_bytes,
            file_bytes=file_bytes,
            size_overhead=file_bytes / weight_bytes - 1,
            provider=provider,
            provider_reason=provider_reason,
            text=text,
            tolerance=tolerance,
            tolerance_reason="asked for" if self.tolerance else f"default of {dtype}",
            max_absolute_error=largest,
            mean_absolute_error=sum(item.mean_absolute_error * item.positions for item in agreement) / positions,
            agreement=agreement,
            speed=speed,
            speed_reason=None,
            notes=tuple(notes),
            warnings=(),
            output=str(self.output),
        )
        self._finish(out, report)
        del loaded
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return report

    def _quantized(self) -> QuantizedWeights | None:
        from effcli import provenance
        from effcli.export.quantized import read_quantized

        path = self.source.path
        assert path is not None
        if not path.is_dir():
            return None
        made = provenance.read(path)
        refuse_passes(self.spec, (record.name for record in made.passes) if made is not None else ())
        return read_quantized(path)

    def _load(self, *, config_only: bool = False) -> tuple[LoadedModel, str, str, str, str]:
        """Load with plain weights; return also task and dtype, each with its reason."""
        from effcli import loading, pass_models
        from effcli.checkpoint_files import check_trust, read_json

        chosen, _ = loading.choose_device(self.device)
        dtype, dtype_reason = choose_dtype(self.dtype, chosen.type)
        auto = None
        task, reason = self.task, "asked for"
        path = self.source.path
        assert path is not None
        if path.is_dir():
            from transformers import AutoConfig

            pass_models.register(path)
            check_trust(
                read_json(path / CONFIG), f"'{path / CONFIG}'", trust_remote_code=self.trust["trust_remote_code"]
            )
            config = AutoConfig.from_pretrained(
                path, trust_remote_code=self.trust["trust_remote_code"], local_files_only=True
            )
            if task == "auto":
                task, reason = tasks.task_of(config)
            if task != tasks.TEXT_GENERATION:
                auto = tasks.auto_class(task, config, asked=self.task != "auto")
        elif task == "auto":
            task, reason = tasks.TEXT_GENERATION, "a GGUF file holds a language model"
        loaded = loading.load(
            self.source, device=self.device, dtype=dtype, kernels="plain", config_only=config_only, auto_class=auto,
            progress=self.progress, **self.trust,
        )  # fmt: skip
        return loaded, task, reason, dtype, dtype_reason

    def _opset(self, model: Any) -> tuple[int, str]:
        if self.opset is not None:
            if self.opset > graphs.PLAIN_ATTENTION_OPSET and graphs.traced_attention(model) is None:
                raise BadInputError(
                    f"--opset {self.opset} has attention as one op, which {type(model).__name__}'s own attention is "
                    f"not; give {graphs.PLAIN_ATTENTION_OPSET} or lower, or leave --opset out"
                )
            return self.opset, "asked for"
        if graphs.traced_attention(model) is None:
            return graphs.PLAIN_ATTENTION_OPSET, f"{type(model).__name__} has an attention of its own"
        return graphs.HIGHEST_OPSET, "the highest that the exporter writes and onnxruntime runs"

    def _graphs(
        self,
        loaded: LoadedModel,
        task: str,
        opset: int,
        quantized: QuantizedWeights | None,
        out: Path,
        notes: list[str],
    ) -> tuple[tuple[GraphInfo, ...], tuple[QuantizedLayers, ...], int]:
        """Write every graph; return what was written, the quantized layers and the bytes of all tensors."""
        from effcli.export.quantized import Replacer

        file = WeightFile(out / WEIGHTS)
        replacer = None if quantized is None else Replacer(quantized)
        layers: tuple[QuantizedLayers, ...] = ()
        made: list[GraphInfo] = []
        started = time.perf_counter()
        for name, graph in self._lowered(loaded, task, opset, notes):
            if replacer is not None:
                layers = replacer.replace(graph)
            file.move(graph)
            path = out / f"{name}.onnx"
            save(graph, path)
            operators = Counter(
                f"{node.domain}.{node.op_type}" if node.domain else node.op_type for node in graph.graph
            )
            seconds = time.perf_counter() - started
            made.append(
                GraphInfo(
                    name,
                    path.name,
                    path.stat().st_size,
                    sum(operators.values()),
                    dict(operators.most_common()),
                    seconds,
                )
            )
            started = time.perf_counter()
        return tuple(made), layers, file.tensor_bytes

    def _lowered(
        self, loaded: LoadedModel, task: str, opset: int, notes: list[str]
    ) -> Iterator[tuple[str, onnx_ir.Model]]:
        if task == tasks.TEXT_GENERATION:
            shapes = graphs.cache_shapes(loaded.model)
            if any(kind == "sliding_attention" for kind in getattr(loaded.config, "layer_types", None) or ()):
                notes.append("layers with a sliding window keep their whole cache in ONNX; the mask cuts the window")
            yield from graphs.text_graphs(loaded.model, opset=opset, caches=shapes)
        else:
            inputs, note = tasks.dummy_inputs(loaded.model, task)
            notes.append(note)
            yield "model", graphs.encoder_graph(loaded.model, inputs, opset=opset)

    def _companions(self, loaded: LoadedModel, out: Path) -> None:
        """Put the config, without its quantization, and the tokenizer, generation config and licence beside."""
        origin = self.source.path
        assert origin is not None
        loaded.config.save_pretrained(out)
        config = json.loads((out / CONFIG).read_text(encoding="utf-8"))
        config.pop("quantization_config", None)
        (out / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if origin.is_dir():
            for path in sorted(origin.iterdir()):
                if path.is_file() and is_companion(path):
                    shutil.copyfile(path, out / path.name)
        elif loaded.tokenizer is not None:
            loaded.tokenizer.save_pretrained(out)
        generation = getattr(loaded.model, "generation_config", None)
        if generation is not None and not (out / "generation_config.json").exists():
            generation.save_pretrained(out)

    def _check(
        self, loaded: LoadedModel, task: str, out: Path, device: torch.device, notes: list[str]
    ) -> tuple[str, tuple[Agreement, ...], Speed, str]:
        """Run what was written; return the text's name, how far it is from torch, times, and what ran it."""
        from effcli.evaluation import evaluation_windows
        from effcli.quiet import quiet_transformers
        from effcli.recipes import Calibration, Evaluation
        from profilers.phases import context_limit

        limit = context_limit(loaded.config) or CHECK_CONTEXT
        # A few positions less than the limit: BERT-like models keep some for themselves.
        length = min(CHECK_CONTEXT, max(32, limit - 8))
        vocabulary = loaded.config.get_text_config(decoder=True).vocab_size
        wanted = Evaluation(tokens=max(256, CHECK_TOKENS), context=length)
        text = evaluation_windows(loaded.tokenizer, vocabulary, wanted, Calibration(), self.seed, calibrates=False)
        notes.extend(text.notes)
        windows = text.windows[: CHECK_TOKENS // length or 1]
        with quiet_transformers(), self.progress.task("check against torch", total=None):
            if task == tasks.TEXT_GENERATION:
                written = checking.TextGraphs(out, device)
                agreement = checking.check_text(loaded.model, written, windows)
                room = max(1, min(checking.TIMED_CONTEXT, limit - 32))
                speed = checking.time_text(loaded.model, written, windows[:1, :room])
                used = written.decode_graph.provider
            else:
                graph = checking.open_graph(out / "model.onnx", device)
                agreement = checking.check_encoder(loaded.model, graph, windows)
                speed = checking.time_encoder(loaded.model, graph, windows[:1])
                used = graph.provider
        return text.name, agreement, speed, used

    def _finish(self, out: Path, report: ExportReport) -> None:
        """Write the report and the record with the sha256 of every file."""
        from effcli.reports.render import render

        (out / REPORT_FILE).write_text(report.to_json(), encoding="utf-8")
        (out / "report.html").write_text(render(report.to_dict(), "html"), encoding="utf-8")
        files = {path.name: sha256_of(path) for path in sorted(out.iterdir()) if path.is_file()}
        record = {
            "format": FORMAT,
            "created": report.created,
            "task": report.task,
            "architecture": report.model.architecture,
            "graphs": {graph.name: graph.file for graph in report.graphs},
            "weights": WEIGHTS,
            "opset": report.opset,
            "dtype": report.dtype,
            "quantization": report.quantization,
            "source": {
                "spec": self.spec,
                "kind": self.source.kind,
                "revision": self.source.revision,
                "fingerprint": report.model.fingerprint,
            },
            "versions": report.environment.versions,
            "files": files,
        }
        (out / ONNX_EXPORT).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        signature.write(out, files)


def refuse_passes(spec: str, names: Iterable[str]) -> None:
    """Refuse what a pass made that ONNX graphs cannot hold.

    Raises
    ------
    BadInputError
        Naming the pass.
    """
    if "kv-pq" in names:
        raise BadInputError(
            f"'{spec}' was made by the pass kv-pq, whose cache of codes ONNX graphs cannot hold; export the checkpoint "
            "that it was applied to"
        )


def choose_dtype(asked: str, device: str) -> tuple[str, str]:
    """Return what an export computes in on a type of device, and why.

    Raises
    ------
    BadInputError
        For one that ONNX Runtime cannot run there.
    """
    if asked == "bfloat16" and device == "cpu":
        raise BadInputError(
            "--dtype bfloat16 cannot run on a CPU in onnxruntime, so it could not be checked; give float32 or float16"
        )
    if asked != "auto":
        return asked, "asked for"
    if device == "cuda":
        return "float16", "onnxruntime's kernels for GPUs are made for it"
    return "float32", "what onnxruntime computes in on a CPU"


def _check_room(loaded: LoadedModel, target: Path) -> None:
    needed, free = _weight_bytes(loaded.model) * 102 // 100, free_bytes(target)
    if needed > free:
        raise NoRoomError(
            f"the export needs {data_size(needed)} of disk beside '{target}' and {data_size(free)} are free; free "
            "some, or choose another --output"
        )


def _weight_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of a model's weights, each shared tensor once."""
    from profilers.weights import weight_bytes_and_parameters

    return int(weight_bytes_and_parameters(model).bytes)


def installed_version(package: str) -> str:
    """Return the version of a package, under the name that it is installed by."""
    names = {"onnxruntime": ("onnxruntime-gpu", "onnxruntime")}.get(package, (package,))
    for name in names:
        try:
            return version(name)
        except ImportError:  # PackageNotFoundError
            continue
    return "not installed"
