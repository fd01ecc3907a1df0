from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from effcli import devices
from effcli.errors import BadInputError

CPU = torch.device("cpu")


def test_device_auto_says_why():
    device, reason = devices.choose_device("auto")
    assert device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert torch.cuda.is_available() or torch.__version__ in reason
    assert devices.choose_device("cpu") == (CPU, "asked for")


@pytest.mark.parametrize(
    ("name", "said"), [("gpu", "auto, cpu"), ("cup", "did you mean 'cpu'"), ("cuda:99", "cuda:99")]
)
def test_unknown_device(name, said):
    with pytest.raises(BadInputError, match=said):
        devices.choose_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA GPU is here")
def test_cuda_without_a_gpu_says_what_torch_is():
    with pytest.raises(BadInputError, match=torch.__version__.replace("+", r"\+")):
        devices.choose_device("cuda")


@pytest.mark.parametrize("native", [True, False])
def test_dtype_auto(monkeypatch, native):
    types = (torch.float32, torch.bfloat16) if native else (torch.float32,)
    monkeypatch.setattr(devices, "native_dtypes", lambda device: types)
    best = torch.bfloat16 if native else torch.float32
    config = AutoConfig.for_model("llama", dtype="bfloat16")
    assert devices.choose_dtype("auto", config, CPU)[0] == best
    config.dtype = torch.float32
    assert devices.choose_dtype("auto", config, CPU)[0] == torch.float32
    config.dtype = torch.float16
    assert devices.choose_dtype("auto", config, CPU)[0] == torch.float32
    config.dtype = None
    assert devices.choose_dtype("auto", config, CPU, stored="bfloat16")[0] == best
    assert devices.choose_dtype("auto", config, CPU)[0] == torch.float32
    dtype, reason = devices.choose_dtype("auto", config, CPU, dequantized_from="Q4_K")
    assert dtype == best
    assert "Q4_K" in reason


@pytest.mark.parametrize(("capability", "native"), [((9, 0), True), ((8, 0), True), ((7, 5), False)])
def test_native_dtypes_of_a_gpu(monkeypatch, capability, native):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = devices.native_dtypes(torch.device("cuda", 0))
    assert torch.float16 in found
    assert (torch.bfloat16 in found) == native


def test_native_dtypes_of_this_cpu_agree_with_its_flags():
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file() or "flags" not in (text := cpuinfo.read_text()):
        pytest.skip("no x86 Linux: nothing to compare with")
    flags = set(next(line for line in text.splitlines() if line.startswith("flags")).split())
    native = torch.bfloat16 in devices.native_dtypes(CPU)
    assert native == bool(flags & {"avx512_bf16", "amx_bf16"})
