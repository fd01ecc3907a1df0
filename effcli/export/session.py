"""Run a graph through ONNX Runtime on torch tensors, without copies on either side.

::

    torch tensors ──their memory is bound──> graph ──> memory of ONNX Runtime ──dlpack──> torch tensors
          ▲                                                                                  │
          └────────────── the cache that a step returns is what the next one is given ───────┘

What a graph returns is allocated by ONNX Runtime's arena, which gives the same memory out again once torch lets it go:
so a cache that grows by a token is not written into pages that the system has to clear first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from effcli.errors import NoRoomError, SourceError

if TYPE_CHECKING:
    import onnxruntime

# ONNX Runtime's name of a type -> torch's, and its number in ONNX
_TYPES: dict[str, tuple[torch.dtype, int]] = {
    "tensor(float)": (torch.float32, 1),
    "tensor(uint8)": (torch.uint8, 2),
    "tensor(int8)": (torch.int8, 3),
    "tensor(int32)": (torch.int32, 6),
    "tensor(int64)": (torch.int64, 7),
    "tensor(bool)": (torch.bool, 9),
    "tensor(float16)": (torch.float16, 10),
    "tensor(double)": (torch.float64, 11),
    "tensor(bfloat16)": (torch.bfloat16, 16),
}


@dataclass(frozen=True)
class Input:
    """One input of a graph.

    Attributes
    ----------
    dtype : torch.dtype
    number : int
        ONNX's number of that type.
    shape : tuple of int or str
        A name where the size is dynamic.
    """

    dtype: torch.dtype
    number: int
    shape: tuple[int | str, ...]


class Graph:
    """One graph in a session of its own.

    Parameters
    ----------
    path : Path
    device : torch.device
        ``cpu`` or ``cuda``.
    threads : int
        CPU threads of one op.
    fold : bool
        Compute what depends on constants alone once, when the graph is opened.

    Attributes
    ----------
    provider : str
        What runs it: ``CUDAExecutionProvider`` or ``CPUExecutionProvider``.
    inputs : dict of str to Input
        That have to be given.
    optional : dict of str to Input
        That have a default.
    outputs : tuple of str

    Raises
    ------
    SourceError
        If ONNX Runtime cannot read the graph, or its CUDA libraries.
    """

    def __init__(self, path: Path, device: torch.device, threads: int, *, fold: bool = True) -> None:
        self._session = _session(path, device, threads, fold)
        self.device = device
        self.provider: str = self._session.get_providers()[0]
        self.inputs, self.optional = (
            {item.name: Input(*_TYPES[item.type], shape=tuple(item.shape)) for item in items}
            for items in (self._session.get_inputs(), self._session.get_overridable_initializers())
        )
        self.outputs = tuple(item.name for item in self._session.get_outputs())

    def run(self, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run the graph once.

        Parameters
        ----------
        feeds : mapping
            By name of input, optional ones where they are wanted, on any device and of any type; what is already on
            the graph's device, contiguous and of its type is read where it is.

        Returns
        -------
        dict of str to torch.Tensor
            By name of output, in ONNX Runtime's memory.

        Raises
        ------
        NoRoomError
            If memory ran out.
        """
        from onnxruntime.capi.onnxruntime_pybind11_state import RuntimeException

        binding = self._session.io_binding()
        kind, index = self.device.type, self.device.index or 0
        held = []  # until the run is over
        given = self.inputs | {name: item for name, item in self.optional.items() if name in feeds}
        for name, expected in given.items():
            tensor = feeds[name].to(device=self.device, dtype=expected.dtype).contiguous()
            held.append(tensor)
            if tensor.numel() == 0:  # has no address
                binding.bind_ortvalue_input(name, _empty(tensor, kind, index))
            else:
                binding.bind_input(name, kind, index, expected.number, tuple(tensor.shape), tensor.data_ptr())
        for name in self.outputs:
            binding.bind_output(name, kind, index)
        if kind == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        try:
            self._session.run_with_iobinding(binding)
        except (RuntimeException, RuntimeError) as error:
            if "Failed to allocate memory" in str(error) or "bad allocation" in str(error):
                sizes = ", ".join(f"{name} {tuple(feeds[name].shape)}" for name in list(self.inputs)[:1])
                raise NoRoomError(
                    f"ONNX Runtime ran out of memory on {self.device} ({sizes}); give fewer tokens or sequences"
                ) from error
            raise
        return {
            name: torch.utils.dlpack.from_dlpack(value)
            for name, value in zip(self.outputs, binding.get_outputs(), strict=True)
        }


def _empty(tensor: torch.Tensor, kind: str, index: int) -> onnxruntime.OrtValue:
    import onnxruntime

    numpy_type = tensor.new_empty(0, dtype=torch.float16 if tensor.dtype == torch.bfloat16 else None, device="cpu")
    return onnxruntime.OrtValue.ortvalue_from_shape_and_type(
        list(tensor.shape), numpy_type.numpy().dtype.type, kind, index
    )


def _session(path: Path, device: torch.device, threads: int, fold: bool) -> onnxruntime.InferenceSession:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # errors are raised; they need not be printed, too
    # Threads that spin between two runs take the cores from torch, which chooses the next token.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    providers: list[Any] = ["CPUExecutionProvider"]
    if device.type == "cuda":
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.index or 0}))
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=providers, disabled_optimizers=None if fold else ["ConstantFolding"]
        )
    except Exception as error:  # noqa: BLE001 - a dozen types of one C++ error; its text is all there is
        text = " ".join(str(error).split())
        raise SourceError(
            f"ONNX Runtime {onnxruntime.__version__} cannot open '{path}': {text[:300]}; export the model again, or "
            "update onnxruntime if the graph is newer than it"
        ) from error
    if device.type == "cuda" and session.get_providers()[0] != "CUDAExecutionProvider":
        raise SourceError(
            f"ONNX Runtime {onnxruntime.__version__} cannot load its CUDA provider on {device}; install the CUDA and "
            "cuDNN that onnxruntime-gpu needs, or give --device cpu"
        )
    return session
