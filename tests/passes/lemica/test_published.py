"""Published schedules: as the tables give them, and found by name."""

from __future__ import annotations

import pytest

from passes.base import PassError
from passes.lemica import published


def test_names_budgets_and_ends() -> None:
    assert set(published.PUBLISHED) == {
        "wan2.1-t2v-1.3b:25",
        "wan2.1-t2v-1.3b:20",
        "wan2.1-t2v-1.3b:17",
        "wan2.1-t2v-1.3b:14",
        "qwen-image:10",
    }
    for name, entry in published.PUBLISHED.items():
        assert entry.schedule.name == name
        assert entry.schedule.budget == int(name.rpartition(":")[2])
        assert (entry.schedule.steps, entry.schedule.full[0], entry.schedule.full[-1]) == (50, 0, 49)
        assert entry.schedule.errors is None


@pytest.mark.parametrize(
    ("name", "skipped"),
    [
        ("wan2.1-t2v-1.3b:25", 13),
        ("wan2.1-t2v-1.3b:20", 10),
        ("wan2.1-t2v-1.3b:17", 9),
        ("wan2.1-t2v-1.3b:14", 6),
        ("qwen-image:10", 2),
    ],
)
def test_full_until_the_first_skipped_step(name: str, skipped: int) -> None:
    assert published.find(name).flags[: skipped + 1] == (True,) * skipped + (False,)


def test_the_table_of_seventeen() -> None:
    found = published.find("wan2.1-t2v-1.3b:17")
    assert found.full == (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 13, 18, 25, 32, 39, 46, 49)


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(PassError, match=r"no published schedule 'Wan2.1-T2V-1.3B:18', did you mean .*qwen-image:10"):
        published.find("Wan2.1-T2V-1.3B:18")
