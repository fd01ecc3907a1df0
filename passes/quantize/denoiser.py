"""Round the weights of a diffusion pipeline's denoisers to the nearest, and write them over the pipeline's own.

::

    pipeline ── transformer (and transformer_2) ── lists of blocks ── nn.Linear
                                                                        │ find: which ones, and why not the others
                                                                        v
    folder/transformer/ <──write── compressed-tensors <──compress── scales (llm-compressor)
      config.json with a quantization_config: plain diffusers refuses it, effcli reads it

No calibration: a denoiser's inputs are the states of a run, not text, so only rounding to the nearest is offered.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from passes.base import LayerRecord, PassError, Skipped
from passes.lemica.targets import BLOCK_LISTS
from passes.quantize.parameters import QuantizeParameters
from passes.quantize.schemes import BLOCK, KERNEL_GROUP_SIZES
from passes.quantize.targets import ROUTERS, TargetLayer, Targets, choose_group_size, ignored_by, shared_weights

if TYPE_CHECKING:
    import torch

    from profilers.base import Progress

SCHEMES = ("w8a16", "w4a16", "w8a8", "fp8")
"""Those that a denoiser is offered in."""
CONFIG = "config.json"
QUANTIZATION = "quantization_config"
_DENOISERS = ("transformer", "transformer_2")
_WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|ckpt|msgpack|h5)(\.index\.json)?$|.*\.index\.json$")
_SENSITIVE = re.compile(r"norm|emb|ada_?ln|modulat|(^|[._])mod([._]|$)", re.IGNORECASE)
"""Layers that turn the step and the condition into shifts, scales and gates of whole channels."""
_IGNORED = "_effcli_not_quantized"


@dataclass(frozen=True)
class Rounded:
    """What was rounded, with the names of the pipeline: ``transformer.transformer_blocks.0.attn1.to_q``.

    Attributes
    ----------
    layers : tuple of LayerRecord
    skipped : tuple of Skipped
    group_sizes : dict
        Columns that share a scale by denoiser; None for whole rows.
    """

    layers: tuple[LayerRecord, ...]
    skipped: tuple[Skipped, ...]
    group_sizes: dict[str, int | None]


def check(pipeline: Any, parameters: QuantizeParameters) -> dict[str, tuple[Targets, int | None]]:
    """Return the layers to round and their group size, for each denoiser of a pipeline.

    Parameters
    ----------
    pipeline : diffusers.DiffusionPipeline
    parameters : QuantizeParameters

    Raises
    ------
    PassError
        If the parameters need calibration or are not offered for pipelines, or there is nothing to quantize.
    """
    if parameters.scheme not in SCHEMES:
        raise PassError(
            f"scheme={parameters.scheme} is not offered for pipelines; "
            f"give scheme={' or '.join(SCHEMES)}, and method=rtn"
        )
    if parameters.chosen_method != "rtn":
        how = " (what method=auto means there)" if parameters.method == "auto" else ""
        raise PassError(
            f"method={parameters.chosen_method}{how} calibrates on text, which a pipeline's denoiser does not read; "
            "give method=rtn"
        )
    if parameters.kv_cache != "none":
        raise PassError(f"kv_cache={parameters.kv_cache}: a denoiser has no KV cache; leave it out")
    found = _find(pipeline, parameters)
    return {name: (targets, choose_group_size(targets.layers, parameters)) for name, targets in found.items()}


def _find(pipeline: Any, parameters: QuantizeParameters) -> dict[str, Targets]:
    modules = _denoisers(pipeline)
    unused = set(parameters.ignore)
    found = {}
    for name, module in modules.items():
        if module.config.get(QUANTIZATION) is not None or any(
            hasattr(layer, "quantization_scheme") for layer in module.modules()
        ):
            raise PassError(f"the pipeline's {name} is quantized already; give the original pipeline")
        layers: list[TargetLayer] = []
        skipped: list[Skipped] = []
        for layer, entry, reason in _judged(module, parameters):
            unused.discard(entry or "")
            if reason is None:
                layers.append(layer)
            else:
                skipped.append(Skipped(layer.name, reason))
        if not layers:
            why = f": {skipped[0].name} {skipped[0].reason}" if skipped else ""
            raise PassError(
                f"{type(module).__name__} has no layer that scheme={parameters.scheme} could quantize "
                f"({len(skipped)} linear layers are skipped{why}); choose other parameters"
            )
        found[name] = Targets(tuple(layers), tuple(skipped))
    if unused:
        raise PassError(
            f"ignore={sorted(unused)[0]} matches no linear layer of the denoiser; correct it or leave it out"
        )
    return found


def _denoisers(pipeline: Any) -> dict[str, Any]:
    """Return the denoisers that have a stack of blocks, by their names; of a compiled one the module inside."""
    from diffusers.utils.torch_utils import unwrap_module

    modules = {name: unwrap_module(getattr(pipeline, name, None)) for name in _DENOISERS}
    modules = {name: module for name, module in modules.items() if module is not None}
    if not modules:
        held = ", ".join(sorted(getattr(pipeline, "components", {}))) or "not known"
        raise PassError(f"{type(pipeline).__name__} has no transformer to quantize; its components are {held}")
    for module in modules.values():
        if not _stacks(module):
            raise PassError(
                f"{type(module).__name__} has no list of transformer blocks that is known ({', '.join(BLOCK_LISTS)}), "
                "so its layers are left as they are; drop quantize from the recipe"
            )
    return modules


def _stacks(module: torch.nn.Module) -> tuple[str, ...]:
    from torch import nn

    return tuple(
        f"{name}."
        for name, child in module.named_children()
        if name in BLOCK_LISTS and isinstance(child, nn.ModuleList)
    )


def _judged(
    module: torch.nn.Module, parameters: QuantizeParameters
) -> Iterator[tuple[TargetLayer, str | None, str | None]]:
    """Yield every linear layer, the entry of ``ignore`` that names it, and why it stays (None: it is rounded)."""
    from torch import nn

    from passes.quantize.kernels import layer_class

    stacks = _stacks(module)
    shared = shared_weights(module)
    wide = getattr(module, "_keep_in_fp32_modules", None) or ()
    unit, why = _unit(parameters)
    for name, layer in module.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        target = TargetLayer(name, layer_class(name), layer.out_features, layer.in_features, name, False)
        entry = ignored_by(parameters.ignore, name, layer)
        reason = None
        if entry is not None:
            reason = f"ignore={entry} was asked for"
        elif not name.startswith(stacks):
            reason = "outside the stack of blocks: embedders and heads are small, and every block depends on them"
        elif _SENSITIVE.search(name):
            reason = "turns the step or the condition into shifts, scales and gates of whole channels"
        elif set(name.split(".")) & set(wide):
            reason = f"{type(module).__name__} keeps it in float32"
        elif target.kind in ROUTERS:
            reason = "router: small, and an error changes which expert runs"
        elif id(layer.weight) in shared:
            reason = f"shares its weight with {shared[id(layer.weight)]}"
        elif type(layer) is not nn.Linear:
            reason = f"a {type(layer).__name__}: the format holds plain nn.Linear only"
        elif layer.in_features % unit:
            reason = f"its {layer.in_features} input features are no multiple of {unit}, {why}"
        yield target, entry, reason


def _unit(parameters: QuantizeParameters) -> tuple[int, str]:
    """Return what must divide a layer's input features, and why."""
    kind = parameters.kind
    if parameters.group_size is not None:
        return parameters.group_size, "the group size asked for"
    if kind.fixed_group is not None:
        return kind.fixed_group, "the scheme's group size"
    if kind.scales == "block":
        return BLOCK, "the scheme's block"
    if kind.scales == "group":
        return KERNEL_GROUP_SIZES[0], "the smallest group that fast kernels take"
    return 1, ""


def round_weights(pipeline: Any, parameters: QuantizeParameters, progress: Progress) -> Rounded:
    """Give every layer that :func:`check` returns its scales; a forward pass behaves as the stored one will.

    Parameters
    ----------
    pipeline : diffusers.DiffusionPipeline
    parameters : QuantizeParameters
    progress : Progress

    Raises
    ------
    PassError
        As :func:`check`, and if a weight is NaN or infinite.
    """
    from passes.quantize import calibration, modifiers

    checked = check(pipeline, parameters)
    modules = _denoisers(pipeline)
    layers: list[LayerRecord] = []
    skipped: list[Skipped] = []
    for name, (targets, group_size) in checked.items():
        module = modules[name]
        for _ in calibration.scanned(module):
            pass
        layouts: Mapping[str, modifiers.Layout] = {layer.name: (None, group_size) for layer in targets.layers}
        recipe = modifiers.build(parameters, targets.layers, targets.skipped, layouts)
        result = calibration.without_text(module, recipe, progress)
        setattr(module, _IGNORED, tuple(item.name for item in targets.skipped))
        bits = parameters.kind.weight_bits
        assert bits is not None, "scheme=auto was refused"
        layers += [
            LayerRecord(f"{name}.{layer.name}", layer.kind, float(bits), group_size, result.errors[layer.name])
            for layer in targets.layers
        ]
        skipped += [Skipped(f"{name}.{item.name}", item.reason) for item in targets.skipped]
    return Rounded(tuple(layers), tuple(skipped), {name: size for name, (_, size) in checked.items()})


def save(pipeline: Any, folder: Path) -> None:
    """Compress the denoisers in place and write them over those in a pipeline's folder. They cannot run afterwards.

    What is not quantized is stored in the dtype that it had in the folder, where that loses nothing.

    Parameters
    ----------
    pipeline : diffusers.DiffusionPipeline
        After :func:`round_weights`.
    folder : Path
        Files in it may be hard links: they are removed, never written into.
    """
    from passes.quantize import saving

    for name, module in _denoisers(pipeline).items():
        place = folder / name
        config = json.loads((place / CONFIG).read_text(encoding="utf-8"))
        saving.compress(module)
        _narrow(module, _stored_dtypes(place))
        config[QUANTIZATION] = saving.quantization_config(module, getattr(module, _IGNORED))
        for path in place.iterdir():
            if path.name == CONFIG or _WEIGHTS.fullmatch(path.name):
                path.unlink()
        module.save_pretrained(place, safe_serialization=True, max_shard_size=saving.SHARD_BYTES)
        # diffusers writes the folder that it came from and its own version into the configuration: keep the source's.
        (place / CONFIG).unlink()
        (place / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _stored_dtypes(folder: Path) -> dict[str, torch.dtype]:
    """Return the floating-point dtype of each stored tensor by name, from the headers of a component's files."""
    import torch
    from safetensors import safe_open

    names = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dict
                dtype = names.get(opened.get_slice(name).get_dtype())
                if dtype is not None:
                    found[name] = dtype
    return found


def _narrow(module: torch.nn.Module, stored: Mapping[str, torch.dtype]) -> None:
    """Turn what was widened for computing back into the dtype that it was stored in."""
    import torch

    for name, tensor in module.state_dict(keep_vars=True).items():
        dtype = stored.get(name)
        if dtype is None or not tensor.is_floating_point() or dtype.itemsize >= tensor.dtype.itemsize:
            continue
        narrow = tensor.data.to(dtype)
        if torch.equal(narrow.to(tensor.dtype), tensor.data):
            tensor.data = narrow
