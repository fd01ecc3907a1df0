"""Parameters are typed, checked against each other, and refused in one line."""

from __future__ import annotations

from typing import Any

import pytest

from passes.base import PassError
from passes.quantize import QuantizeParameters, QuantizePass
from passes.quantize.schemes import SCHEMES


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"shceme": "w4a16"}, "no parameter 'shceme'; did you mean 'scheme'?"),
        ({"scheme": "w3a16"}, "parameter 'scheme'"),
        ({"scheme": "auto"}, "scheme=auto needs a budget; add bits=4.5"),
        ({"bits": 4.5}, "is a budget for scheme=auto, and scheme is w4a16"),
        ({"scheme": "auto", "bits": 1.0}, "greater than or equal to 2"),
        ({"scheme": "fp8", "method": "awq"}, "method=awq does not suit scheme=fp8; use rtn or gptq"),
        ({"method": ["smoothquant", "gptq"]}, "does not suit scheme=w4a16; use gptq or awq or rtn"),
        ({"scheme": "fp8", "group_size": 64}, "scheme=fp8 has one scale a row; leave group_size out"),
        ({"scheme": "nvfp4", "group_size": 32}, "scheme=nvfp4 has groups of 16; leave group_size out"),
        ({"scheme": "w8a8", "symmetric": False}, "scheme=w8a8 is symmetric; leave symmetric out"),
        ({"samples": 0}, "greater than or equal to 1"),
        ({"experts": "some"}, "parameter 'experts'"),
        ({"kv_cache": "int8"}, "parameter 'kv_cache'"),
        ({"dampening": 0}, "greater than 0"),
    ],
)
def test_bad_parameters_are_refused_in_one_line(given: dict[str, Any], message: str) -> None:
    with pytest.raises(PassError) as raised:
        QuantizePass.from_mapping(given)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_method_auto_is_the_first_of_the_table() -> None:
    assert QuantizeParameters().chosen_method == "gptq"
    assert QuantizeParameters(scheme="w8a8").chosen_method == "smoothquant+gptq"
    assert QuantizeParameters(scheme="fp8").chosen_method == "rtn"
    assert QuantizeParameters(scheme="w8a8", method=["smoothquant", "gptq"]).method == "smoothquant+gptq"


def test_calibration_is_needed_for_methods_that_look_at_activations_only() -> None:
    assert {name for name in SCHEMES if name != "auto" and QuantizeParameters(scheme=name).needs_calibration} == {
        "w4a16",
        "w8a8",
        "nvfp4",
        "mxfp4",
    }
    assert not QuantizeParameters(method="rtn").needs_calibration
    assert QuantizeParameters(method="rtn", kv_cache="fp8").needs_calibration
    assert QuantizeParameters(scheme="auto", bits=4.5, method="rtn").needs_calibration


def test_one_ignored_layer_may_be_given_without_a_list() -> None:
    assert QuantizeParameters(ignore="re:.*down_proj").ignore == ("re:.*down_proj",)
    assert QuantizeParameters(ignore=["a", "b"]).ignore == ("a", "b")


def test_every_parameter_says_what_it_is() -> None:
    assert all(field.description for field in QuantizeParameters.model_fields.values())
