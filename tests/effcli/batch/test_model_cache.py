"""A model is kept for the next job of the same files, and for no other."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from effcli import sources
from effcli.batch import model_cache
from effcli.batch.model_cache import ModelCache
from profilers import peaks
from profilers.base import SilentProgress


def test_a_model_is_loaded_once(tiny_folder: Path) -> None:
    cache, source = ModelCache(), sources.resolve(str(tiny_folder))
    first = cache.load(source, device="cpu", dtype="auto", progress=SilentProgress())
    assert cache.load(sources.resolve(str(tiny_folder)), device="cpu", dtype="auto", progress=None) is first
    assert cache.loads == 1
    cache.keep_only(str(tiny_folder))
    assert cache.load(source, device="cpu", dtype="auto") is first
    cache.keep_only("another")
    assert cache.load(source, device="cpu", dtype="auto") is not first


def test_another_dtype_or_changed_files_are_loaded_again(tiny_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    cache, source = ModelCache(), sources.resolve(str(folder))
    first = cache.load(source, device="cpu", dtype="float32")
    assert cache.load(source, device="cpu", dtype="bfloat16").dtype == torch.bfloat16
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] += 1  # the same size
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    again = cache.load(source, device="cpu", dtype="float32")
    assert cache.loads == 3
    weights = [model.model.state_dict()["model.norm.weight"][0].item() for model in (first, again)]
    assert weights[1] == weights[0] + 1
    cache.clear()
    assert cache.load(source, device="cpu", dtype="float32") is not again


def test_ceilings_are_measured_once_and_again_when_they_are_old(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def measure(*arguments: object) -> peaks.Peaks:
        measured.append(arguments)
        rate = {1: 3e9, 2: 2e9}[len(measured)]
        levels = (peaks.WorkingSetBandwidth(1 << 20, rate),)
        return peaks.Peaks("cpu", rate, rate, rate, levels, {"float32": rate}, 1e-6, 1.0)

    monkeypatch.setattr(peaks, "measure_peaks", measure)
    cache, cpu = ModelCache(), torch.device("cpu")
    first = cache.peaks(cpu, (torch.float32,), SilentProgress())
    assert cache.peaks(cpu, (torch.float32,), SilentProgress()) is first
    monkeypatch.setattr(model_cache, "PEAKS_SECONDS", -1.0)
    assert cache.peaks(cpu, (torch.float32,), SilentProgress()).flops_per_second == {"float32": 3e9}
    assert len(measured) == 2
