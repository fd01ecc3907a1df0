import dataclasses
import importlib.metadata
import importlib.util
import json

import pytest
import torch
from packaging.requirements import Requirement

from effcli import builtin_models, doctor
from effcli.reports.model import plain


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFCLI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_facts(cache):
    found = doctor.examine(measure_peaks=False)
    assert [device.chosen for device in found.devices].count(True) == 1
    cpu = found.devices[-1]
    assert (cpu.device, cpu.threads) == ("cpu", torch.get_num_threads())
    assert 0 < cpu.memory_available_bytes <= cpu.memory_total_bytes
    assert (cpu.peaks, "float32" in cpu.native_dtypes) == (None, True)
    assert torch.__version__ in found.torch_build
    installed = importlib.util.find_spec("onnxruntime") is not None
    assert ("CPU" in (found.onnx_runtime or "")) == installed
    for name in ("torch", "transformers", "safetensors", "gguf"):
        assert found.versions[name] == importlib.metadata.version(name)
    assert found.cache_folder == str(cache)
    assert (found.cache_bytes, found.disk_free_bytes > 0) == (0, True)
    assert {item.name: item.cached for item in found.builtin_models} == {
        name: isinstance(model, builtin_models.ShippedModel) for name, model in builtin_models.CATALOGUE.items()
    }
    json.dumps(plain(found))


def test_peaks_are_measured_on_the_chosen_device(monkeypatch):
    from profilers import peaks

    asked = []
    measured = peaks.Peaks("here", 1.0, 2.0, 2.0, (), {"float32": 3.0}, 1e-6, 0.1)

    def measure(device, dtypes, progress):
        asked.append((device, dtypes))
        return measured

    monkeypatch.setattr(peaks, "measure_peaks", measure)
    found = doctor.examine()
    chosen = next(device for device in found.devices if device.chosen)
    assert chosen.peaks == measured
    assert [str(device) for device, _ in asked] == [chosen.device]
    assert asked[0][1][0] == torch.float32


def test_extras_are_those_of_the_package():
    found = {extra.name: extra for extra in doctor.examine(measure_peaks=False).extras}
    declared = set(importlib.metadata.metadata("effcli").get_all("Provides-Extra"))
    assert set(found) == declared - {"all"}
    assert set(found) == set(doctor.PURPOSES)
    assert found["ray"].install == "pip install 'effcli[ray]'"
    assert set(found["quantize"].versions) >= {"llmcompressor", "compressed-tensors"}
    for extra in found.values():
        assert not extra.present or None not in extra.versions.values()


def requirements(monkeypatch, *lines):
    core = tuple(Requirement(line) for line in lines)
    monkeypatch.setattr(doctor, "_requirements", lambda: (core, {"ray": (Requirement("ray>=2"),)}))


def problems():
    return [dataclasses.astuple(item) for item in doctor.examine(measure_peaks=False).problems]


def test_no_problem_here():
    assert [item for item in problems() if "disk" not in item[0]] == []


def test_missing_and_old_packages(monkeypatch):
    requirements(monkeypatch, "torch>=99", "no-such-distribution>=1", "rich")
    assert problems() == [
        (f"torch {importlib.metadata.version('torch')} is not in >=99", "pip install 'torch>=99'"),
        ("no no-such-distribution", "pip install 'no-such-distribution>=1'"),
    ]


def test_gpu_that_torch_cannot_use(monkeypatch):
    monkeypatch.setattr(doctor, "_nvml", lambda: ("570.1", 2))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    found = doctor.examine(measure_peaks=False)
    assert found.cuda_driver == "570.1"
    assert "2 NVIDIA GPU(s)" in found.problems[0].problem


def test_disk_and_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "free_bytes", lambda folder: 1000)
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    shown = problems()
    assert any("cannot be written" in problem for problem, _ in shown)
    assert any("disk" in problem for problem, _ in shown)
    assert all("EFFCLI_CACHE" in remedy for _, remedy in shown)
