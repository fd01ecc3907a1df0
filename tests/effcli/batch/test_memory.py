"""What a job is estimated to take, from headers alone, and what it is seen to hold."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from effcli.batch import memory
from effcli.batch.memory import PEAKS_BYTES, PROCESS_BYTES, TIMES_WEIGHTS, Estimate, MemoryWatch, estimate
from effcli.batch.model import Job, Limits

BASE = PROCESS_BYTES + PEAKS_BYTES[False]


def job(model: object, kind: Any = "profile", **fields: Any) -> Job:
    return Job("job", kind, str(model), "m", "p", **fields)


def known(found: Estimate | None) -> Estimate:
    assert found is not None
    return found


def weights(folder: Path) -> int:
    return sum(tensor.numel() * 4 for tensor in load_file(folder / "model.safetensors").values())


def test_weights_count_in_the_dtype_that_they_are_loaded_in(tiny_folder: Path) -> None:
    full = known(estimate(job(tiny_folder, dtype="float32"), None, on_gpu=False))
    half = known(estimate(job(tiny_folder, dtype="bfloat16"), None, on_gpu=False))
    assert full.ram_bytes - half.ram_bytes == weights(tiny_folder) // 2
    assert BASE + weights(tiny_folder) < full.ram_bytes < BASE + weights(tiny_folder) + 20e6
    assert full.how.startswith(f"weights {weights(tiny_folder) / 1e3:.1f} kB from the headers of its files + cache and")


def test_longer_contexts_and_larger_batches_take_more(tiny_folder: Path) -> None:
    def working(**settings: Any) -> int:
        return known(estimate(job(tiny_folder, settings=settings), None, on_gpu=False)).ram_bytes

    assert working(context=[64]) < working(context=[64, 1024]) < working(context=[1024], batch=[1, 8])


def test_an_optimize_takes_two_processes_and_the_weights_twice(tiny_folder: Path) -> None:
    one = known(estimate(job(tiny_folder, "optimize", settings={"context": 512}), None, on_gpu=False))
    assert one.ram_bytes > 2 * PROCESS_BYTES + PEAKS_BYTES[False] + TIMES_WEIGHTS["optimize"] * weights(tiny_folder)


def test_on_a_gpu_the_weights_are_the_gpus(tiny_folder: Path) -> None:
    found = known(estimate(job(tiny_folder), None, on_gpu=True))
    assert found.ram_bytes == PROCESS_BYTES
    assert found.gpu_bytes > PEAKS_BYTES[True] + weights(tiny_folder)


def test_limits_win(tiny_folder: Path) -> None:
    limited = job(tiny_folder, limits=Limits(memory_bytes=5 * 10**9))
    assert estimate(limited, None, on_gpu=False) == Estimate(5 * 10**9, 0, "limits.memory")
    assert str(estimate(limited, None, on_gpu=True)) == "800 MB + 5.00 GB of the GPU's"


def test_a_model_that_is_not_here_is_not_guessed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFFCLI_CACHE", str(tmp_path / "empty"))
    assert estimate(job("org/not-here"), None, on_gpu=False) is None
    assert estimate(job("smollm2-135m"), None, on_gpu=False) is None
    assert estimate(job("not a hub id"), None, on_gpu=False) is None


def test_the_output_of_another_job_is_known_once_it_is_there(tiny_folder: Path, tmp_path: Path) -> None:
    after = job("", model_from="first")
    assert estimate(after, None, on_gpu=False) is None
    assert estimate(after, tmp_path, on_gpu=False) is None
    shutil.copytree(tiny_folder, tmp_path / "first")
    assert known(estimate(after, tmp_path, on_gpu=False)).ram_bytes > BASE


def test_a_config_has_no_weights(tiny_folder: Path) -> None:
    found = known(estimate(job(tiny_folder / "config.json"), None, on_gpu=False))
    assert BASE < found.ram_bytes < BASE + 20e6


def test_files_that_cannot_be_read_are_left_to_the_job_to_complain_about(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    assert known(estimate(job(tmp_path), None, on_gpu=False)).ram_bytes == BASE


def test_stored_types_of_a_quantized_checkpoint_are_kept(tiny_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "q")
    tensors = {name: tensor.half() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "x"}}
    plain = known(estimate(job(folder, dtype="float32"), None, on_gpu=False))
    (folder / "config.json").write_text(json.dumps(config))
    stored = known(estimate(job(folder, dtype="float32"), None, on_gpu=False))
    assert plain.ram_bytes - stored.ram_bytes == weights(tiny_folder) // 2


def test_the_watch_sees_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "SAMPLE_SECONDS", 0.01)
    samples = []
    with MemoryWatch(lambda: samples.append(1)) as watch:
        watch.restart(children=False)
        before = watch.held_bytes()
        held = bytearray(b"x") * (200 << 20)
        time.sleep(0.2)
        del held
        assert watch.held_bytes() < before + (100 << 20)
        assert watch.peak_bytes() > before + (190 << 20)
        watch.restart(children=True)
        assert watch.peak_bytes() < before + (100 << 20)
    assert samples
