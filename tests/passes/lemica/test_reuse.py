"""Fitted reuse: the weights that least squares gives, on disk and back, and what the fit leaves."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from passes.base import PassError  # noqa: E402
from passes.lemica import reuse  # noqa: E402
from passes.lemica.driving import Residual  # noqa: E402
from passes.lemica.schedule import COEFFICIENTS_FILE, Schedule  # noqa: E402


def _residuals(count: int, *shape: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator) for _ in range(count)]


def test_weights_of_a_combination_are_found_again(monkeypatch):
    monkeypatch.setattr(reuse, "RIDGE", 0.0)
    tensors = _residuals(3, 4, 50, 6)
    wanted = torch.randn(3, 6, generator=torch.Generator().manual_seed(9))
    target = sum(wanted[k] * tensors[k] for k in range(3))
    weights, left, power = reuse.fit(tensors, target, by_channel=True)
    torch.testing.assert_close(weights, wanted, atol=1e-4, rtol=1e-4)
    assert left < 1e-8 * power


def test_ridge_is_the_closed_form_of_each_channel():
    tensors = _residuals(2, 3, 20, 4)
    (target,) = _residuals(1, 3, 20, 4, seed=5)
    weights, left, _ = reuse.fit(tensors, target, by_channel=True)
    total = 0.0
    for channel in range(4):
        columns = torch.stack([item[..., channel].reshape(-1).double() for item in tensors], 1)
        gram = columns.T @ columns
        pull = reuse.RIDGE * gram.diagonal().mean()
        wanted = target[..., channel].reshape(-1).double()
        prior = torch.tensor([1.0, 0.0], dtype=torch.float64)
        found = torch.linalg.solve(gram + pull * torch.eye(2), columns.T @ wanted + pull * prior)
        torch.testing.assert_close(weights[:, channel].double(), found, atol=1e-5, rtol=1e-5)
        total += float((wanted - columns @ found).square().sum())
    assert left == pytest.approx(total, rel=1e-6)


def test_one_weight_for_all_where_channels_are_not_last():
    tensors = _residuals(2, 2, 4, 8, 8)
    target = 0.75 * tensors[0] + 0.5 * tensors[1]
    weights, _, _ = reuse.fit(tensors, target, by_channel=False)
    assert weights.shape == (2, 1)
    torch.testing.assert_close(weights[:, 0], torch.tensor([0.75, 0.5]), atol=5e-3, rtol=5e-3)


def test_what_was_all_zeros_keeps_the_last_residual():
    zeros = [torch.zeros(2, 5, 3)] * 2
    weights, left, power = reuse.fit(zeros, zeros[0], by_channel=True)
    torch.testing.assert_close(weights, torch.tensor([[1.0] * 3, [0.0] * 3]))
    assert left == power == 0.0


class _Call:
    """A denoiser whose residual at each step is given; its output is the residual that was used."""

    def __init__(self, residual: Residual) -> None:
        self.residual = residual
        self.reused = False

    def full(self, *, keep):
        return self.residual.hidden, self.residual

    def reuse(self, residual):
        self.reused = True
        return residual.hidden

    def fits(self, residual):
        return True


def test_fitting_follows_the_schedule_and_answers_skipped_steps_with_the_fit():
    first, second = _residuals(2, 2, 30, 4)
    steps = [first, second, 2 * second - first, 3 * second - 2 * first, second]
    schedule = Schedule(name="fast", steps=5, full=(0, 1, 4), reuse="fitted")
    fitting = reuse.Fitting(schedule)
    fitting.begin(5)
    calls = [_Call(Residual(item, item + 1)) for item in steps]
    outputs = [fitting.denoise(step, 0, call) for step, call in enumerate(calls)]
    assert [call.reused for call in calls] == [False, False, True, True, False]
    assert set(fitting.weights) == {(2, 0, "hidden"), (2, 0, "context"), (3, 0, "hidden"), (3, 0, "context")}
    torch.testing.assert_close(outputs[2], steps[2], atol=0.05, rtol=0.05)  # the ridge pulls a little
    assert max(fitting.errors.values()) < 1e-3
    combined = reuse.Coefficients(fitting.weights).combine(
        3, 0, (Residual(second, second + 1), Residual(first, first + 1))
    )
    torch.testing.assert_close(combined.hidden, outputs[3])


def test_branches_are_fitted_apart():
    schedule = Schedule(name="fast", steps=3, full=(0, 2), reuse="fitted")
    fitting = reuse.Fitting(schedule)
    fitting.begin(3)
    (base,) = _residuals(1, 1, 40, 2)
    for step, factors in enumerate(((1, 1), (2, 3), (1, 1))):
        for branch, factor in enumerate(factors):
            fitting.denoise(step, branch, _Call(Residual(factor * base)))
    torch.testing.assert_close(fitting.weights[1, 0, "hidden"], torch.full((1, 2), 2.0), atol=2e-2, rtol=0)
    torch.testing.assert_close(fitting.weights[1, 1, "hidden"], torch.full((1, 2), 3.0), atol=2e-2, rtol=0)


def test_coefficients_on_disk_and_back(tmp_path):
    weights = {(3, 0, "hidden"): torch.randn(2, 4), (3, 1, "context"): torch.randn(1, 1)}
    reuse.write(
        tmp_path,
        {"fast": reuse.Coefficients(weights), "b.20": reuse.Coefficients({(1, 0, "hidden"): torch.ones(1, 4)})},
    )
    back = reuse.read(tmp_path, "fast").weights
    assert set(back) == set(weights)
    for key, tensor in weights.items():
        assert torch.equal(back[key], tensor)
    assert set(reuse.read(tmp_path, "b.20").weights) == {(1, 0, "hidden")}
    with pytest.raises(PassError, match="nothing for schedule 'slow'"):
        reuse.read(tmp_path, "slow")


def test_missing_and_damaged_files_are_refused_in_one_line(tmp_path):
    with pytest.raises(PassError, match="cannot be read"):
        reuse.read(tmp_path, "fast")
    (tmp_path / COEFFICIENTS_FILE).write_bytes(b"no tensors")
    with pytest.raises(PassError, match="fetch the checkpoint again"):
        reuse.read(tmp_path, "fast")
    reuse.write(tmp_path, {})
    with pytest.raises(PassError, match="nothing was fitted for step 7"):
        reuse.Coefficients({}).combine(7, 0, (Residual(torch.ones(1, 2)),))


def test_other_number_of_steps_is_refused():
    fitting = reuse.Fitting(Schedule(name="fast", steps=3, full=(0, 2), reuse="fitted"))
    with pytest.raises(PassError, match="3 steps and the pipeline runs 5"):
        fitting.begin(5)
