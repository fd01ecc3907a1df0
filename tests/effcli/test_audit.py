"""The audit against checkpoints laid out by hand, each corrupted in one way, and against real ones."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from effcli.audit import Audit, audit
from effcli.errors import EffcliError
from passes.base import Figures, Pass, PassError, PassParameters, PassRecord, Prediction, Skipped
from tests.tiny_models import CONFIGS, build

Tensors = dict[str, torch.Tensor]
GROUP = 16
SKIPPED_HEAD = PassRecord("quantize", {}, "", skipped=(Skipped("lm_head", "asked for"),))


def weights(bits: int, kind: str, strategy: str, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, **more}


SCHEMES: dict[str, dict[str, Any]] = {
    "int4": weights(4, "int", "group", group_size=GROUP),
    "int3": weights(3, "int", "group", group_size=GROUP),
    "int8": weights(8, "int", "channel"),
    "int8-plain": weights(8, "int", "channel"),
    "fp8": weights(8, "float", "channel"),
    "fp8-block": weights(8, "float", "block", block_structure=[16, 16]),
    "nvfp4": weights(4, "float", "tensor_group", group_size=16),
    "mxfp4": weights(4, "float", "group", group_size=16),
}
LABELS = {"int8-plain": "int8", "fp8": "fp8_e4m3", "fp8-block": "fp8_e4m3"}


def quantized(shape: torch.Size, scheme: str) -> Tensors:
    """Lay out one weight as the format's description says; values do not matter here."""
    rows, columns = shape
    groups = math.ceil(columns / GROUP)
    if scheme in ("int4", "int3", "int8"):
        bits = int(scheme[-1])
        per_row = 1 if scheme == "int8" else groups
        return {
            "weight_packed": torch.ones(rows, math.ceil(columns * bits / 32), dtype=torch.int32),
            "weight_scale": torch.ones(rows, per_row, dtype=torch.bfloat16),
            "weight_shape": torch.tensor([rows, columns]),
        }
    if scheme == "int8-plain":
        return {"weight": torch.ones(rows, columns, dtype=torch.int8), "weight_scale": torch.ones(rows, 1)}
    if scheme in ("fp8", "fp8-block"):
        scales = (rows, 1) if scheme == "fp8" else (math.ceil(rows / 16), math.ceil(columns / 16))
        return {"weight": torch.ones(rows, columns).to(torch.float8_e4m3fn), "weight_scale": torch.ones(scales)}
    packed = torch.ones(rows, columns // 2, dtype=torch.uint8)
    if scheme == "nvfp4":
        return {
            "weight_packed": packed,
            "weight_scale": torch.ones(rows, groups).to(torch.float8_e4m3fn),
            "weight_global_scale": torch.ones(1),
        }
    return {"weight_packed": packed, "weight_scale": torch.full((rows, groups), 127, dtype=torch.uint8)}


Change = Callable[[Tensors, dict[str, Any]], None]


def write(folder: Path, scheme: str | None = "int4", change: Change | None = None) -> Path:
    """Write a tiny llama with every projection in ``scheme``, changed by ``change`` before it is written."""
    model = build("llama", dtype=torch.bfloat16)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = json.loads(model.config.to_json_string())
    if scheme is not None:
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            parts = quantized(tensors.pop(name).shape, scheme)
            tensors |= {f"{name.removesuffix('.weight')}.{part}": value for part, value in parts.items()}
        groups = {"group_0": {"targets": ["Linear"], "weights": dict(SCHEMES[scheme])}}
        config["quantization_config"] = {
            "quant_method": "compressed-tensors",
            "config_groups": groups,
            "ignore": ["lm_head"],
        }
    if change is not None:
        change(tensors, config)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def meta(name: str = "llama") -> Any:
    return build(name, dtype=torch.bfloat16, device="meta")


def check(folder: Path, records: tuple[PassRecord, ...] = (SKIPPED_HEAD,), name: str = "llama") -> Audit:
    return audit(folder, meta(name), records)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_bits_are_those_of_the_bytes_on_disk(tmp_path: Path, scheme: str) -> None:
    folder = write(tmp_path, scheme)
    found = check(folder)
    rows = {row.tensor_class: row for row in found.rows}
    tensors = load_file(folder / "model.safetensors")
    by_hand = sum(t.numel() * t.element_size() for name, t in tensors.items() if ".down_proj." in name)
    down = rows["down_proj"]
    assert (down.dtype, down.quantized, down.modules) == (LABELS.get(scheme, scheme), True, 2)
    assert down.stored_bytes == by_hand
    assert down.bits == pytest.approx(8 * by_hand / (2 * 32 * 48))
    assert rows["lm_head"].reason == "asked for"
    assert (rows["embed_tokens"].dtype, rows["embed_tokens"].bits, rows["embed_tokens"].reason) == (
        "bfloat16",
        16,
        None,
    )
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert found.stored_bytes == total == sum(row.stored_bytes for row in found.rows)
    assert found.parameters == sum(row.parameters for row in found.rows) == meta().num_parameters()
    assert found.bits_per_parameter == pytest.approx(8 * total / found.parameters)
    assert found.file_bytes == (folder / "model.safetensors").stat().st_size


def test_a_plain_checkpoint_needs_no_reasons(tmp_path: Path) -> None:
    found = check(write(tmp_path, None), records=())
    assert all((row.dtype, row.bits, row.quantized, row.reason) == ("bfloat16", 16, False, None) for row in found.rows)


Q = "model.layers.1.self_attn.q_proj"


def set_to(name: str, value: torch.Tensor) -> Change:
    return lambda tensors, config: tensors.update({name: value})


def drop(name: str) -> Change:
    def change(tensors: Tensors, config: dict[str, Any]) -> None:
        del tensors[name]

    return change


def claim(**values: Any) -> Change:
    return lambda tensors, config: config["quantization_config"]["config_groups"]["group_0"]["weights"].update(values)


def poison(name: str, value: float) -> Change:
    def change(tensors: Tensors, config: dict[str, Any]) -> None:
        tensors[name].view(-1)[7] = value

    return change


def plain_again(tensors: Tensors, config: dict[str, Any]) -> None:
    for part in ("weight_packed", "weight_scale", "weight_shape"):
        del tensors[f"{Q}.{part}"]
    tensors[f"{Q}.weight"] = torch.ones(32, 32, dtype=torch.bfloat16)


def plain_and_ignored(tensors: Tensors, config: dict[str, Any]) -> None:
    plain_again(tensors, config)
    config["quantization_config"]["ignore"].append(Q)


def only_down(tensors: Tensors, config: dict[str, Any]) -> None:
    config["quantization_config"]["config_groups"]["group_0"]["targets"] = ["re:.*down_proj$"]


CORRUPTED: dict[str, tuple[str, Change, str]] = {
    "a tensor too many": ("int4", set_to("model.layers.9.extra", torch.ones(2)), "'model.layers.9.extra'"),
    "KV scales nobody claims": (
        "int4",
        set_to("model.layers.0.self_attn.k_scale", torch.ones(1)),
        "belong to no layer",
    ),
    "a tensor missing": ("int4", drop("model.norm.weight"), "are not on disk: 'model.norm.weight'"),
    "a packed weight missing": ("int4", drop(f"{Q}.weight_packed"), f"not on disk: '{Q}.weight'"),
    "no scales": ("int4", drop(f"{Q}.weight_scale"), "has no weight_scale"),
    "another shape": ("int4", set_to("model.norm.weight", torch.ones(31)), r"has shape \[31\] on disk"),
    "NaN in a plain tensor": ("int4", poison("model.norm.weight", math.nan), "'model.norm.weight' holds NaN"),
    "infinity in scales": ("int4", poison(f"{Q}.weight_scale", math.inf), f"'{Q}.weight_scale' holds NaN or inf"),
    "8-bit data, 4 bits claimed": ("int8", claim(num_bits=4), f"'{Q[:12]}.* stored at 8 bits .* claims 4"),
    "4-bit data, 8 bits claimed": ("int4", claim(num_bits=8), "stored at 4 bits .* claims 8"),
    "8-bit plain data, 4 bits claimed": ("int8-plain", claim(num_bits=4), "stored at 8 bits .*int8.* claims 4"),
    "int data, float claimed": ("int8-plain", claim(type="float"), "unknown number of bits"),
    "other groups than claimed": ("int4", claim(group_size=8), r"groups of 8 of \[.*\] need \[32, 4\]"),
    "zero points claimed": ("int4", claim(symmetric=False), "zero points as config.json claims"),
    "a wrong weight_shape": ("int4", set_to(f"{Q}.weight_shape", torch.tensor([32, 31])), r"says \[32, 31\]"),
    "plain where quantized is claimed": ("int4", plain_again, f"'{Q}.weight' is not quantized on disk"),
    "left out and not recorded": ("int4", plain_and_ignored, f"'{Q}' is neither quantized nor recorded as skipped"),
    "quantized and not claimed": ("int4", only_down, "does not name it"),
    "plain and packed": ("int4", set_to(f"{Q}.weight", torch.ones(32, 32)), "both a plain and a packed weight"),
}


@pytest.mark.parametrize("what", CORRUPTED)
def test_each_corruption_is_found_and_named(tmp_path: Path, what: str) -> None:
    scheme, change, message = CORRUPTED[what]
    check(write(tmp_path / "whole", scheme))
    with pytest.raises(EffcliError, match=message) as raised:
        check(write(tmp_path / "corrupted", scheme, change))
    assert raised.value.exit_code == 2
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("scheme", "part", "byte"),
    [("fp8", "weight", 0x7F), ("nvfp4", "weight_scale", 0xFF), ("mxfp4", "weight_scale", 0xFF)],
)
def test_the_nan_of_each_eight_bit_type_is_found(tmp_path: Path, scheme: str, part: str, byte: int) -> None:
    def change(tensors: Tensors, config: dict[str, Any]) -> None:
        tensors[f"{Q}.{part}"].view(torch.uint8).view(-1)[3] = byte

    with pytest.raises(EffcliError, match=f"'{Q}.{part}' holds NaN"):
        check(write(tmp_path, scheme, change))


def test_every_block_of_a_large_tensor_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("effcli.stored_tensors.BLOCK_ELEMENTS", 40)  # one row of the embedding at a time

    def change(tensors: Tensors, config: dict[str, Any]) -> None:
        tensors["model.embed_tokens.weight"][-1, -1] = math.nan

    with pytest.raises(EffcliError, match="embed_tokens"):
        check(write(tmp_path, None, change), records=())


def test_a_truncated_file_and_an_index_that_lies_are_found(tmp_path: Path) -> None:
    folder = write(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    first, second = (dict(list(tensors.items())[part::2]) for part in (0, 1))
    (folder / "model.safetensors").unlink()
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    save_file(first, folder / names[0])
    save_file(second, folder / names[1])
    where = {name: names[0] for name in first} | {name: names[1] for name in second}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    check(folder)
    index.write_text(json.dumps({"weight_map": where | {"model.norm.weight": "model-00001-of-00002.safetensors"}}))
    if where["model.norm.weight"] != names[0]:
        with pytest.raises(EffcliError, match="disagree on where 'model.norm.weight' is"):
            check(folder)
    index.write_text(json.dumps({"weight_map": where}))
    save_file({**second, "model.layers.0.mlp.down_proj.weight_scale": torch.ones(1)}, folder / names[1])
    save_file({**first, "model.layers.0.mlp.down_proj.weight_scale": torch.ones(1)}, folder / names[0])
    with pytest.raises(EffcliError, match="is stored twice"):
        check(folder)
    (folder / names[0]).write_bytes((folder / names[0]).read_bytes()[:-3])
    with pytest.raises(EffcliError, match="truncated or damaged"):
        check(folder)


@pytest.mark.parametrize("name", sorted(set(CONFIGS)))
def test_what_transformers_saves_is_complete_for_every_architecture(tmp_path: Path, name: str) -> None:
    """Names, renamed and split tensors, tied and optional ones: as save_pretrained writes them."""
    model = build(name, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    found = audit(tmp_path, meta(name), ())
    assert found.parameters == model.num_parameters()
    stored = sum(item.numel() * item.element_size() for item in load_file(tmp_path / "model.safetensors").values())
    assert found.stored_bytes == stored


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_of_a_real_pass_are_accounted_for(tmp_path: Path, name: str) -> None:
    """Names on disk differ from the live model's: fused experts became one linear layer each."""
    from passes.base import PassContext
    from passes.quantize import QuantizePass

    chosen = QuantizePass.from_mapping({"scheme": "w8a16", "method": "rtn"})
    model = build(name, dtype=torch.bfloat16)
    record = chosen.apply(model, PassContext(None, torch.device("cpu"), None, tmp_path / "work"))
    chosen.save(model, tmp_path / "out")
    rows = {row.tensor_class: row for row in audit(tmp_path / "out", meta(name), (record,)).rows}
    experts = [row for key, row in rows.items() if key.startswith("experts.")]
    assert [row.quantized for row in experts] == [True] * 3
    assert sum(row.modules for row in experts) == 2 * 4 * 3
    with pytest.raises(EffcliError, match="neither quantized nor recorded as skipped"):
        bare = PassRecord("quantize", {}, "")
        audit(tmp_path / "out", meta(name), (bare,))


class Beside(Pass):
    """Claims one file beside the weights, and refuses one content of it."""

    name = "beside"
    title = "Beside"
    parameters_type = PassParameters
    changes = frozenset({"kv-cache"})
    files = ("extra.safetensors",)

    def plan(self, profile: Any) -> Prediction:
        return Prediction(Figures())

    def apply(self, model: Any, context: Any) -> PassRecord:
        return PassRecord("beside", {}, "")

    def save(self, model: Any, folder: Path) -> None:
        save_file({"layers.0.table": torch.ones(3, 5)}, folder / self.files[0])

    def check_files(self, folder: Path, model: Any) -> tuple[str, ...]:
        table = load_file(folder / self.files[0])["layers.0.table"]
        if table.shape != (3, 5):
            raise PassError(f"'layers.0.table' has shape {list(table.shape)}")
        return ("a table is there",)


def test_files_beside_the_weights_are_accounted_for_by_the_pass_that_put_them_there(tmp_path: Path) -> None:
    folder, item = write(tmp_path, None), Beside(PassParameters())
    alone = audit(folder, meta(), ())
    with pytest.raises(EffcliError, match=r"'extra.safetensors' is missing, which a pass of this run was to write"):
        audit(folder, meta(), (), [item])
    item.save(None, folder)
    with pytest.raises(EffcliError, match=r"'extra.safetensors' lies beside the weights and no pass of this run puts"):
        audit(folder, meta(), ())
    found = audit(folder, meta(), (), [item])
    row = found.rows[-1]
    assert (row.tensor_class, row.dtype, row.bits, row.stored_bytes) == ("extra.safetensors", "float32", 32.0, 60)
    assert found.notes[-1] == "a table is there"
    assert (found.stored_bytes, found.parameters) == (alone.stored_bytes, alone.parameters)  # weights only
    assert found.file_bytes == sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (torch.full((3, 5), torch.nan), "'layers.0.table' holds NaN or infinity on disk"),
        (torch.ones(2), r"'layers.0.table' has shape \[2\]"),
    ],
)
def test_bad_content_beside_the_weights_is_named(tmp_path: Path, table: torch.Tensor, message: str) -> None:
    folder = write(tmp_path, None)
    save_file({"layers.0.table": table}, folder / "extra.safetensors")
    with pytest.raises(EffcliError, match=message):
        audit(folder, meta(), (), [Beside(PassParameters())])


def test_a_file_cut_short_beside_the_weights_is_named(tmp_path: Path) -> None:
    folder, item = write(tmp_path, None), Beside(PassParameters())
    item.save(None, folder)
    path = folder / "extra.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(EffcliError, match=r"extra.safetensors' is truncated or damaged"):
        audit(folder, meta(), (), [item])
