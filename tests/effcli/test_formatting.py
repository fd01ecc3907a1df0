from __future__ import annotations

import math

import pytest

from effcli import formatting as fmt

DECIMAL = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "m": 1e-3, "µ": 1e-6, "n": 1e-9}


def read_back(text: str, unit: str) -> float:
    number, prefix = text.replace(",", "").removesuffix(unit).split(" ")
    return float(number) * DECIMAL[prefix]


@pytest.mark.parametrize("exponent", range(0, 16))
@pytest.mark.parametrize("mantissa", [1.0, 1.2345, 5.0, 9.994, 9.996, 9.9999])
def test_sizes_read_back_within_rounding(exponent: int, mantissa: float) -> None:
    value = mantissa * 10**exponent
    text = fmt.data_size(value)
    assert read_back(text, "B") == pytest.approx(value, rel=0.006)
    assert len(text.split(" ")[0].replace(",", "")) <= 5


@pytest.mark.parametrize("exponent", range(-9, 3))
@pytest.mark.parametrize("mantissa", [1.0, 3.456, 9.9996])
def test_times_read_back_within_rounding(exponent: int, mantissa: float) -> None:
    value = mantissa * 10.0**exponent
    assert read_back(fmt.seconds(value), "s") == pytest.approx(value, rel=0.006)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.28, "28 %"),
        (0.031, "3.1 %"),
        (0.05, "5 %"),
        (0.0999, "10 %"),
        (1.0, "100 %"),
        (0.0, "0 %"),
        (0.0004, "<0.1 %"),
        (0.0005, "0.1 %"),
        (12.5, "1,250 %"),
    ],
)
def test_percent(value: float, text: str) -> None:
    assert fmt.percent(value) == text


@pytest.mark.parametrize(
    ("value", "table", "prose"),
    [(0.99, "0.990", "0.99"), (1214.7, "1,215", "1,210"), (11_676, "11,676", "11,700"), (26.7, "26.7", "26.7")],
)
def test_tables_keep_zeros_and_whole_numbers_and_prose_rounds(value: float, table: str, prose: str) -> None:
    assert fmt.significant(value) == table
    assert fmt.short(value) == prose


@pytest.mark.parametrize(
    "function",
    [
        fmt.data_size,
        fmt.seconds,
        fmt.percent,
        fmt.significant,
        fmt.short,
        fmt.integer,
        fmt.flop_rate,
        fmt.parameters,
        fmt.duration,
    ],
)
def test_none_is_a_dash(function: object) -> None:
    assert callable(function)
    assert function(None) == fmt.MISSING


def test_parameters_say_billions() -> None:
    assert fmt.parameters(671e9) == "671 B"
    assert fmt.parameters(134_515_008) == "135 M"


def test_control_characters_do_not_pass() -> None:
    assert fmt.printable("a\x1b[31mb\nc\u202e") == "a [31mb c"
    assert all(character.isprintable() for character in fmt.printable("".join(map(chr, range(300)))))


def test_extremes_do_not_fail() -> None:
    for value in (5e-324, 1e308, -1.5, math.pi):
        assert fmt.significant(value) and fmt.short(value) and fmt.data_size(value) and fmt.seconds(value)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (8.4, "8.40 s"),
        (99.4, "99.4 s"),
        (99.6, "1 min 40 s"),
        (200, "3 min 20 s"),
        (7500, "2 h 05 min"),
        (1e5, "1 d 3 h"),
    ],
)
def test_long_times_are_said_in_minutes_and_hours(seconds: float, text: str) -> None:
    assert fmt.duration(seconds) == text
    assert fmt.duration(1e5) == "1 d 3 h"
