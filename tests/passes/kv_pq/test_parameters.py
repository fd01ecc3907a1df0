"""What ``--pass kv-pq:…`` takes and refuses; importing it loads nothing heavy."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from passes.base import PassError
from passes.kv_pq import KVPQPass
from passes.kv_pq.parameters import KVPQParameters
from profilers.meta import meta_model
from tests.tiny_models import CONFIGS


def test_importing_the_pass_loads_no_torch() -> None:
    code = "import sys, passes.kv_pq; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_cache_is_reached_from_the_package() -> None:
    import passes.kv_pq
    from passes.kv_pq.cache import PQCache

    assert passes.kv_pq.PQCache is PQCache
    with pytest.raises(AttributeError, match="no attribute 'PQCash'"):
        passes.kv_pq.PQCash  # noqa: B018


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bits": 9}, r"parameter 'bits': .*less than or equal to 8 \(given: 9\)"),
        ({"bits": 0.5}, "parameter 'bits'"),
        ({"kept": -1}, "parameter 'kept'"),
        ({"recent": 0}, "parameter 'recent'"),
        ({"keys": "rope"}, "parameter 'keys': .*'before-rope' or 'after-rope'"),
        ({"bit": 4}, "no parameter 'bit'; did you mean 'bits'?"),
    ],
)
def test_bad_values_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(PassError, match=message):
        KVPQPass.from_mapping(values)


def test_gains_or_uneven_codes_come_on_top_of_the_bits() -> None:
    assert KVPQParameters(bits=4).budget_bits == 4.25
    assert KVPQParameters(bits=2.5, gains=False, allocation="even").budget_bits == 2.5


def test_codes_are_whole() -> None:
    assert KVPQParameters(bits=4).codes(64) == 34
    assert KVPQParameters(bits=3).codes(128) == 52
    assert KVPQParameters(bits=4).codes(8) == 4  # 4.25 of them
    assert KVPQParameters(bits=2.4, gains=False, allocation="even").codes(80) == 24  # 2.4 x 80 / 8, not 23.999


def test_bits_that_are_less_than_one_code_are_refused() -> None:
    model = meta_model(CONFIGS["llama"](), torch.float32)  # heads of 8 channels
    KVPQPass.from_mapping({"bits": 2}).check(model)
    with pytest.raises(PassError, match="bits=1 is 1 codes a vector of head_dim 8, .* at least 2; give bits=2 or"):
        KVPQPass.from_mapping({"bits": 1}).check(model)
