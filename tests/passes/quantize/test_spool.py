"""What goes to disk between layers comes back as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from passes.base import PassError
from passes.quantize.spool import Spool

CPU = torch.device("cpu")


def test_values_come_back_equal_and_of_the_same_kind(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    value = {
        "hidden": torch.randn(2, 3, generator=generator).bfloat16(),
        "transposed": torch.randn(3, 4, generator=generator).T,
        "angles": (torch.ones(2), torch.zeros(2)),
        "size": torch.Size([1, 2]),
        "dtype": torch.bfloat16,
        "plain": [1, 2.5, "a", None, True],
    }
    spool = Spool(tmp_path)
    spool.write(0, {"value": value})
    back = Spool(tmp_path).read(0, ["value"], CPU)["value"]
    assert torch.equal(back["hidden"], value["hidden"]) and back["hidden"].dtype == torch.bfloat16
    assert torch.equal(back["transposed"], value["transposed"])
    assert isinstance(back["angles"], tuple) and torch.equal(back["angles"][1], torch.zeros(2))
    assert back["size"] == torch.Size([1, 2]) and isinstance(back["size"], torch.Size)
    assert back["dtype"] is torch.bfloat16
    assert back["plain"] == value["plain"]


def test_what_equals_the_first_sample_is_stored_once(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    for sample in range(3):
        spool.write(sample, {"mask": torch.ones(4), "hidden": torch.full((4,), float(sample))})
    assert [path.name for path in sorted((tmp_path / "mask").iterdir())] == ["00000.safetensors"]
    assert len(list((tmp_path / "hidden").iterdir())) == 3
    for sample in range(3):
        back = spool.read(sample, ["mask", "hidden"], CPU)
        assert torch.equal(back["mask"], torch.ones(4)) and torch.equal(back["hidden"], torch.full((4,), float(sample)))


def test_a_rewritten_value_replaces_one_left_by_an_interrupted_run(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.write(0, {"hidden": torch.zeros(4)})
    spool.write(1, {"hidden": torch.ones(4)})
    spool.write(1, {"hidden": torch.zeros(4)})
    assert torch.equal(spool.read(1, ["hidden"], CPU)["hidden"], torch.zeros(4))


def test_deleted_values_leave_no_file(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.write(0, {"a": torch.ones(1), "b": torch.ones(1)})
    spool.delete(["a"])
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_value_that_cannot_be_stored_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PassError, match="a object passes between the layers .* use method=rtn"):
        Spool(tmp_path).write(0, {"cache": object()})
