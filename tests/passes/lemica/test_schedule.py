"""``lemica.json``: schedules and graphs on disk and back, and what is no schedule."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from passes.base import PassError
from passes.lemica import schedule as files
from passes.lemica.schedule import Calibration, ErrorGraph, LemicaFile, Schedule

GRAPH = ErrorGraph(
    steps=4, max_gap=3, edges=((0, 2), (0, 3), (1, 3)), errors=((0.1, 0.3), (0.5, 0.7), (0.2, 0.2)), forwards=9
)
CONTENT = LemicaFile(
    schedules=(Schedule(name="slow", steps=4, full=(0, 1, 3)), Schedule(name="fast", steps=4, full=(0, 3))),
    default="slow",
    calibration=Calibration(
        pipeline="P", denoiser="D", scheduler="S", inference_steps=4, scheduler_config={"shift": 3.0}
    ),
    graph=GRAPH,
)


def test_file_on_disk_and_back(tmp_path):
    files.write(tmp_path, CONTENT)
    assert files.read(tmp_path) == CONTENT
    assert json.loads((tmp_path / files.FILE).read_text())["format"] == files.FORMAT


def test_weights_are_means_over_the_first_samples_and_skipping_nothing_costs_nothing():
    assert GRAPH.weights() == pytest.approx({(0, 1): 0, (1, 2): 0, (2, 3): 0, (0, 2): 0.2, (0, 3): 0.6, (1, 3): 0.2})
    assert GRAPH.weights(1)[0, 3] == 0.5
    assert GRAPH.equivalent_runs == 9 / 4


def test_schedules_by_name_and_by_default():
    assert CONTENT.schedule().name == "slow"
    assert CONTENT.schedule("fast").flags == (True, False, False, True)
    assert CONTENT.schedule("fast").budget == 2
    assert CONTENT.schedule("3").name == "slow"
    with pytest.raises(PassError, match=r"no schedule 'quick'; known: slow \(3 of 4 steps\), fast \(2 of 4 steps\)"):
        CONTENT.schedule("quick")


@pytest.mark.parametrize("full", [(), (1, 2), (0, 2, 1), (0, 0, 1), (0, 4)])
def test_what_is_no_schedule_is_refused(full):
    with pytest.raises(ValidationError):
        Schedule(name="x", steps=4, full=full)


def test_missing_damaged_and_foreign_files_say_so(tmp_path):
    with pytest.raises(PassError, match="no lemica.json"):
        files.read(tmp_path)
    place = tmp_path / files.FILE
    place.write_text("{")
    with pytest.raises(PassError, match="cannot be read"):
        files.read(tmp_path)
    place.write_text(CONTENT.model_dump_json().replace("effcli.lemica/1", "effcli.lemica/2"))
    with pytest.raises(PassError, match="format"):
        files.read(tmp_path)
