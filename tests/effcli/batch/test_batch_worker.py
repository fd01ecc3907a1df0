"""How far a job is, as the worker tells it."""

from __future__ import annotations

from effcli.batch.worker import Stages


def test_the_innermost_line_is_the_stage_and_the_share_is_of_the_whole() -> None:
    stages = Stages()
    assert stages.now() == (None, None)
    with stages.task("optimize", 4) as whole:
        whole.advance()
        with stages.task("pass: quantize", 10) as part:
            part.advance(5)
            assert stages.now() == ("pass: quantize", (1 + 0.5) / 4)
            with stages.task("layer") as layer:
                layer.describe("layer 3")
                assert stages.now() == ("layer 3", (1 + 0.5) / 4)
        with stages.task("again", 10):
            assert stages.now() == ("again", (1 + 0.5) / 4)  # it never falls
        whole.advance()
        assert stages.now() == ("optimize", 0.5)
