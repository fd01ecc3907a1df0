import dataclasses

import pytest
import torch

from profilers.base import (
    DoesNotFitError,
    NotApplicableError,
    ProfileContext,
    Profiler,
    ProfileRequest,
    ProfilerError,
    SilentProgress,
)


def test_errors_share_one_root():
    assert issubclass(DoesNotFitError, ProfilerError) and issubclass(NotApplicableError, ProfilerError)


def test_silent_progress_takes_steps_and_passes_errors_on():
    with SilentProgress().task("anything", 3) as task:
        task.advance()
        task.advance(2)
    with pytest.raises(KeyError), SilentProgress().task("anything"):
        raise KeyError


def test_requests_and_profilers_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ProfileRequest().seed = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        Profiler("a", "A", run=lambda context: None, result_type=dict).name = "b"


def test_contexts_do_not_share_results():
    def make():
        return ProfileContext(None, None, None, torch.device("cpu"), torch.float32, ProfileRequest(), None, None)

    one, two = make(), make()
    one.results["a"] = 1
    assert two.results == {}
