"""Packing against the integers that it started from, and against compressed-tensors' own decompression."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from passes.quantize.packing import (
    CPU_BLOCK,
    Integers,
    cpu_layout_known,
    int4_group_size,
    own_state,
    pack_int4,
    padded_rows,
    read_integers,
    unpack_int4,
)
from tests.passes.quantize.compressed import save_compressed, tiny_llama

CPU = torch.device("cpu")


def random_integers(rows: int, columns: int, group: int | None, *, bits: int = 4, symmetric: bool = True) -> Integers:
    generator = torch.Generator().manual_seed(rows + columns)
    limit = 1 << (bits - 1)
    values = torch.randint(-limit, limit, (rows, columns), generator=generator, dtype=torch.int8)
    shape = (rows, columns // (group or columns))
    scales = (0.01 + 0.1 * torch.rand(shape, generator=generator)).to(torch.bfloat16)
    zeros = None if symmetric else torch.randint(-limit, limit, shape, generator=generator, dtype=torch.int8)
    return Integers(values, scales, zeros, bits)


@pytest.mark.parametrize(
    ("group_size", "in_features", "expected"),
    [
        (32, 96, 32),
        (64, 576, 64),
        (128, 4096, 128),
        (256, 512, 256),
        (512, 1024, 256),  # two kernel groups share the file's scale
        (96, 192, 32),
        (16, 64, None),
        (48, 96, None),
        (None, 96, 32),
        (None, 576, 64),
        (None, 40, None),
        (64, 96, None),
    ],
)
def test_the_kernels_group_divides_the_files(group_size: int | None, in_features: int, expected: int | None) -> None:
    assert int4_group_size(group_size, in_features) == expected


@pytest.mark.skipif(not cpu_layout_known(), reason="this CPU packs in another layout, which is not unpacked")
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("rows", "columns", "group"), [(64, 32, 32), (97, 96, 32), (192, 576, 64), (1, 256, 256)])
def test_unpacking_gives_back_what_was_packed(rows: int, columns: int, group: int, symmetric: bool) -> None:
    weight = random_integers(rows, columns, group, symmetric=symmetric)
    packed, scales_and_zeros = pack_int4(weight, group, torch.float32)
    assert packed.dtype == torch.uint8 and packed.nbytes == padded_rows(rows, CPU) * columns // 2
    back = unpack_int4(packed, scales_and_zeros, group, symmetric=symmetric)
    expected = weight.values.double().view(rows, -1, group)
    if weight.zero_points is not None:
        expected = expected - weight.zero_points.double().unsqueeze(-1)
    expected = (expected * weight.scales.double().unsqueeze(-1)).view(rows, columns)
    torch.testing.assert_close(back[:, :rows].t().double(), expected, rtol=1e-6, atol=1e-6)
    assert (back[:, rows:] == 0).all()


def test_rows_are_filled_up_to_whole_blocks() -> None:
    assert [padded_rows(rows, CPU) for rows in (1, 64, 65, 97)] == [64, 64, 128, 128]
    assert padded_rows(97, torch.device("cuda")) == 104
    assert CPU_BLOCK == 64


@pytest.mark.parametrize("group", [32, None])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_integers_are_those_of_the_file(tmp_path: Path, bits: int, symmetric: bool, group: int | None) -> None:
    from compressed_tensors.compressors.base import decompress_module
    from transformers import AutoModelForCausalLM

    from passes.quantize.quiet import quiet_libraries

    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric}
    weights |= {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    with quiet_libraries():
        save_compressed(tiny_llama(), tmp_path, weights, dtype=torch.float32)
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    layer = model.model.layers[1].mlp.down_proj
    weight = read_integers(own_state(layer), layer.quantization_scheme)
    assert weight.bits == bits and (weight.zero_points is None) == symmetric
    assert weight.values.dtype == torch.int8 and weight.values.int().abs().amax() <= 1 << (bits - 1)
    decompress_module(layer)
    torch.testing.assert_close(weight.dequantize(torch.float32), layer.weight.data, rtol=0, atol=0)
