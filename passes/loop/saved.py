"""What must hold of a looped checkpoint, from its bytes on disk: each shared tensor once, no byte more than planned."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from passes.base import PassError
from passes.loop.layout import LoopPlan
from passes.loop.modeling_looped import BLOCKS, FILE, architecture, modelling_source

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_NOT_THE_ORIGINALS = ("loop", "model_type", "auto_map", "quantization_config")


def check(folder: Path, model: PreTrainedModel) -> tuple[str, ...]:
    """Hold a checkpoint against its plan.

    Parameters
    ----------
    folder : Path
    model : PreTrainedModel
        The checkpoint's, on the meta device.

    Returns
    -------
    tuple of str
        What was found, one line each.

    Raises
    ------
    PassError
        Naming what differs.
    """
    from passes.loop import targets
    from profilers.meta import meta_model

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    plan = LoopPlan.from_json(config.get("loop"))
    config_class, _ = architecture(type(model))
    raw = {key: value for key, value in model.config.to_dict().items() if key not in _NOT_THE_ORIGINALS}
    original = meta_model(config_class.from_dict(raw), model.dtype)  # type: ignore[attr-defined]
    structure = targets.find(original)
    plan.check(structure)
    sizes = plan.sizes(structure)
    if (folder / FILE).read_text(encoding="utf-8") != modelling_source(type(model)):
        raise PassError(f"'{FILE}' is not the modelling file that this release writes; run the pass again")
    headers = {name: entry for path in sorted(folder.glob("*.safetensors")) for name, entry in _header(path).items()}
    for block in plan.blocks:
        for name in block.ranks:
            for index in block.layers:
                left = f"{plan.stack}.{index}.{name}.weight"
                if left in headers:
                    raise PassError(f"'{left}' is on disk, and layer {index} runs with a shared block's weight")
    shared = sum(f".{BLOCKS}." in f".{name}" for name in headers)
    if config.get("quantization_config") is not None:
        return (f"{shared} tensors of shared blocks, each stored once",)
    planned = config["loop"].get("stored") or {}
    held = sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in headers.values())
    if planned.get("bytes") != held:
        raise PassError(f"the weights take {held:,} bytes on disk, and the plan says {planned.get('bytes', 0):,}")
    if planned.get("parameters") != sizes.parameters_after:
        raise PassError(
            f"the plan says {planned.get('parameters', 0):,} parameters, and its blocks make {sizes.parameters_after:,}"
        )
    return (
        f"{shared} tensors of shared blocks, each stored once; {held:,} bytes of tensors, as the plan says to the byte",
    )


def _header(path: Path) -> dict[str, Any]:
    with path.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        header: dict[str, Any] = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    return header
