"""Plans: figures taken from a saved profile, chains that build on each other, refusals."""

import dataclasses

import pytest
import torch

import effcli
from effcli import planning
from effcli.errors import BadInputError
from effcli.recipes import Step
from passes.base import Figures, Pass, PassError, PassParameters, Prediction
from profilers.meta import meta_model
from tests.tiny_models import CONFIGS, build


@pytest.fixture(scope="module")
def report():
    return effcli.profile(build("llama"), only=planning.PROFILERS, context=(16, 32)).to_dict()


@pytest.fixture(scope="module")
def bare():
    return meta_model(CONFIGS["llama"]() if callable(CONFIGS["llama"]) else CONFIGS["llama"], torch.float32)


class Halves(Pass):
    name = "halves"
    title = "halves"
    parameters_type = PassParameters
    changes = frozenset({"weights"})

    def plan(self, profile):
        figures = Figures(weight_bytes=profile.figures.weight_bytes // 2, tpot_seconds=profile.figures.tpot_seconds * 2)
        return Prediction(figures=figures, slower=True, fits=False)

    def apply(self, model, context):
        raise AssertionError

    def save(self, model, folder):
        raise AssertionError


def test_figures_come_from_the_point_asked_for(report, bare):
    points = report["profiles"]["latency"]["points"]
    first = planning.model_profile(report, bare, torch.device("cpu"))
    assert (first.batch, first.context) == (1, 16)
    second = planning.model_profile(report, bare, torch.device("cpu"), context=32)
    assert second.figures.tpot_seconds == points[1]["tpot_seconds"]["p50"]
    assert second.figures.weight_bytes == sum(item.numel() * 4 for item in bare.parameters())
    assert second.peaks.bandwidth(1 << 40) == report["environment"]["peaks"]["by_working_set"][-1]["bytes_per_second"]
    with pytest.raises(BadInputError, match="no timing at batch 1, context 99; it has: batch 1 context 16"):
        planning.model_profile(report, bare, torch.device("cpu"), batch=1, context=99)


def test_a_chain_builds_on_the_prediction_before(report, bare):
    profile = planning.model_profile(report, bare, torch.device("cpu"))
    chain = [Halves(PassParameters()), Halves(PassParameters())]
    planned = planning.plan_chain(chain, profile, [Step(name="halves", parameters={})] * 2)
    assert [item.prediction.figures.weight_bytes for item in planned] == [
        profile.figures.weight_bytes // 2,
        profile.figures.weight_bytes // 4,
    ]
    assert planned[1].prediction.figures.tpot_seconds == pytest.approx(profile.figures.tpot_seconds * 4)
    assert planning.slower_warnings(planned)[:2] == (
        "halves is predicted to make decode slower on this device",
        "halves is predicted to need more memory than this device has free",
    )


def test_alternatives_that_do_not_suit_say_why(report, bare, monkeypatch):
    class Picky(Halves):
        name = "picky"

        def check(self, model):
            raise PassError("no such layer")

    from passes import registry

    monkeypatch.setattr(registry, "names", lambda: ("halves", "picky"))
    monkeypatch.setattr(registry, "load", {"halves": Halves, "picky": Picky}.__getitem__)
    planned = planning.plan_alternatives(planning.model_profile(report, bare, torch.device("cpu")))
    assert [(item.label, item.reason) for item in planned] == [("halves", None), ("picky", "no such layer")]
    assert planned[1].prediction is None


def test_a_profile_of_something_else_is_refused(report):
    check = planning.check_profile
    check(report, architecture="LlamaForCausalLM", device=torch.device("cpu"))
    with pytest.raises(BadInputError, match="is of a LlamaForCausalLM, the model is a GPT2LMHeadModel"):
        check(report, architecture="GPT2LMHeadModel", device=torch.device("cpu"))
    elsewhere = report | {"environment": report["environment"] | {"device_name": "another machine"}}
    with pytest.raises(BadInputError, match="measured on 'another machine'"):
        check(elsewhere, architecture="LlamaForCausalLM", device=torch.device("cpu"))
    with pytest.raises(BadInputError, match="has schema 'effcli.optimize/1'"):
        check({"schema": "effcli.optimize/1"}, architecture="LlamaForCausalLM", device=torch.device("cpu"))


def test_a_plan_of_a_folder(tiny_folder, monkeypatch):
    from passes import registry

    monkeypatch.setattr(registry, "names", lambda: ("halves",))
    monkeypatch.setattr(registry, "load", {"halves": Halves}.__getitem__)
    report = planning.plan(tiny_folder, context=16)
    assert (report.schema, report.alternatives, report.context) == ("effcli.plan/1", True, 16)
    (planned,) = report.passes
    assert planned.prediction.figures.weight_bytes == report.measured.weight_bytes // 2
    data = report.to_dict()
    assert data["passes"][0]["prediction"]["figures"]["weight_bytes"] == planned.prediction.figures.weight_bytes
    saved = effcli.profile(tiny_folder, only=planning.PROFILERS, context=(16,)).to_dict()
    again = planning.plan(tiny_folder, profile=saved)
    assert again.measured.tpot_seconds == saved["profiles"]["latency"]["points"][0]["tpot_seconds"]["p50"]
    assert dataclasses.asdict(again.measured)["weight_bytes"] == report.measured.weight_bytes
