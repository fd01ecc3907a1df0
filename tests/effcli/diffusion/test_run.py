"""``effcli optimize`` on pipelines, from the command to what ``load_pipeline`` runs: figures, faults, resuming."""

from __future__ import annotations

import html
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

import effcli  # noqa: E402
from effcli.diffusion.run import optimize_pipeline  # noqa: E402
from effcli.errors import BadInputError, GateFailedError  # noqa: E402
from effcli.preflight import Options  # noqa: E402
from effcli.recipes import from_options  # noqa: E402
from passes.base import PassError  # noqa: E402
from passes.lemica import schedule as files  # noqa: E402
from tests.passes.lemica import tiny_pipelines  # noqa: E402

STEPS = "steps=8,max_gap=4,samples=2,eval_samples=2"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "pipeline"
    tiny_pipelines.dit().save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# tiny\n")
    return folder


@pytest.fixture(scope="module")
def made(source, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("made") / "out"
    effcli.optimize(str(source), from_options([f"lemica:budgets=5+3,{STEPS}"]), out)
    return out


def _run(pipeline, seeds=(3, 4), labels=(1, 2), steps=8):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipeline(list(labels), generator=generators, num_inference_steps=steps, output_type="pt").images


def test_report_holds_what_was_asked_for(made):
    report = json.loads((made / "report.json").read_text())
    assert report["schema"] == "effcli.pipeline-optimize/1"
    assert [(item["name"], len(item["full"])) for item in report["schedules"]] == [("slow", 5), ("fast", 3)]
    for item in report["schedules"]:
        assert item["full_calls"] == len(item["full"]) and item["calls"] == 8
        assert item["likeness"]["samples"] == 2
    methods = {(row["method"], row["budget"]) for row in report["comparison"]}
    assert methods == {
        (method, budget)
        for budget in (5, 3)
        for method in (
            *("fitted", "fitted-output", "linear", "lemica", "uniform", "greedy", "shortest-sum"),
            *("mag-cache", "first-block-cache"),
        )
    }
    chosen = [row for row in report["comparison"] if row["chosen"]]
    assert {(row["method"], row["budget"]) for row in chosen} == {("fitted", 5), ("fitted", 3)}
    # MagCache skips the same steps of every sample, FirstBlockCache those that it sees fit.
    full = {row["method"]: row["full"] for row in report["comparison"] if row["likeness"]}
    assert full["mag-cache"][0] == 0 and full.get("first-block-cache") is None
    page = (made / "report.html").read_text()
    assert "data:image/png;base64," in page and "First Block Cache" in page


def test_the_path_that_ends_nearest_to_all_steps_is_taken(made, source):
    from passes.lemica import LemicaParameters, LemicaPass, hook, inputs
    from passes.lemica.following import chosen
    from passes.lemica.schedule import read

    report = json.loads((made / "report.json").read_text())
    (record,) = report["passes"]
    pipeline = tiny_pipelines.quiet(type(tiny_pipelines.dit()).from_pretrained(source, local_files_only=True))
    given = LemicaParameters(**{key: value for key, value in record["parameters"].items() if value is not None})
    samples = LemicaPass(given).calibration_samples(pipeline, record["seed"], given.fit_samples)
    reference = inputs.generate(pipeline, samples, steps=8, arguments={})
    content = read(made)
    several = 0
    for schedule in content.schedules:
        errors = {item["path"]: item["error"] for item in record["details"]["tried"][schedule.name]}
        assert schedule.path in errors
        if len(errors) == 1:  # all rules agree
            continue
        several += 1
        assert min(errors, key=errors.get) == schedule.path
        with hook.attach(pipeline, chosen(content, made, schedule.name), mode=schedule.mode):
            followed = inputs.generate(pipeline, samples, steps=8, arguments={})
        assert float((followed - reference).abs().mean()) == pytest.approx(errors[schedule.path], rel=1e-4)
    assert several


def test_what_is_reused_is_what_ends_nearer_to_all_steps(made, source):
    from passes.lemica import LemicaParameters, LemicaPass, hook, inputs, path, reuse
    from passes.lemica.schedule import Schedule

    report = json.loads((made / "report.json").read_text())
    (record,) = report["passes"]
    pipeline = tiny_pipelines.quiet(type(tiny_pipelines.dit()).from_pretrained(source, local_files_only=True))
    samples = LemicaPass(LemicaParameters()).calibration_samples(
        pipeline, record["seed"], LemicaParameters().fit_samples
    )
    reference = inputs.generate(pipeline, samples, steps=8, arguments={})
    errors = {}
    for mode in ("residual", "output"):
        schedule = Schedule(name=mode, steps=8, full=path.uniform(8, {}, 3), reuse="fitted", mode=mode)
        with hook.attach(pipeline, reuse.Fitting(schedule), mode=mode):
            followed = inputs.generate(pipeline, samples, steps=8, arguments={})
        errors[mode] = float((followed - reference).abs().mean())
    found = record["details"]
    assert found["modes_tried"] == pytest.approx(errors, rel=1e-4)
    assert found["mode"] == min(errors, key=errors.get) == report["lemica"]["calibration"]["mode"]
    assert {item["mode"] for item in report["schedules"]} == {found["mode"]}


@pytest.mark.parametrize(
    ("step", "kept", "mode"),
    [
        ("budget=4", {"output": 0.1, "residual": 0.2}, "output"),  # as an interrupted run has found it
        ("budget=4,reuse=linear", {"output": 0.2, "residual": 0.1}, "residual"),
        ("budget=4,mode=output", None, "output"),
        ("budget=4,reuse=last", None, "residual"),
    ],
)
def test_what_is_reused_is_kept_for_a_resumed_run_and_can_be_asked_for(source, tmp_path, step, kept, mode):
    from passes.base import PipelineContext
    from passes.lemica import LemicaPass

    if kept is not None:
        (tmp_path / "modes.json").write_text(json.dumps(kept))
    given = dict(item.split("=") for item in f"{step},steps=8,max_gap=4,samples=1,fit_samples=2".split(","))
    item = LemicaPass.from_mapping(given)
    pipeline = tiny_pipelines.quiet(type(tiny_pipelines.dit()).from_pretrained(source, local_files_only=True))
    record = item.apply_pipeline(pipeline, PipelineContext(torch.device("cpu"), tmp_path))
    assert record.details["mode"] == item.content.calibration.mode == item.content.schedule().mode == mode
    assert record.details["modes_tried"] == (kept or {})
    for coefficients in item.coefficients.values():
        assert {weights.shape[1] for weights in coefficients.weights.values()} == {1 if mode == "output" else 32}


@pytest.mark.parametrize(
    ("step", "paths"),
    [
        ("path=greedy,budget=4", {"greedy"}),
        ("max_error=1000", {"minimax"}),  # what others choose might not hold it
        ("reuse=last,budget=4", {"minimax", "shortest-sum", "uniform", "greedy"}),
    ],
)
def test_paths_that_are_tried(source, tmp_path, step, paths):
    out = tmp_path / "out"
    effcli.optimize(str(source), from_options([f"lemica:{step},{STEPS}"]), out)
    report = json.loads((out / "report.json").read_text())
    (trials,) = report["passes"][0]["details"]["tried"].values()
    tried = {trial["path"] for trial in trials}
    assert tried <= paths and (len(paths) == 1 or len(tried) > 1)
    (schedule,) = report["lemica"]["schedules"]
    assert schedule["path"] in tried
    rows = [row for row in report["comparison"] if row["chosen"]]
    assert [row["full"] for row in rows] == [schedule["full"]]
    minimax = next(row for row in report["comparison"] if row["method"] == "lemica")
    if schedule["path"] == "minimax":
        assert minimax["full"] == schedule["full"]


def test_checkpoint_is_the_pipeline_with_a_schedule_beside_it(made, source):
    for path in source.rglob("*"):
        if path.is_file():
            assert (made / path.relative_to(source)).read_bytes() == path.read_bytes()
    weights = next(source.glob("transformer/*.safetensors"))
    assert os.path.samefile(weights, made / weights.relative_to(source))  # linked, not copied
    record = json.loads((made / "effcli.json").read_text())
    assert record["source"]["licence"] == "mit"
    assert {"lemica.json", "lemica.safetensors", "model_index.json"} <= set(record["files"])
    assert not list(made.parent.glob(".*")), "staged work was left behind"


def test_loaded_pipeline_follows_its_schedule_and_is_the_original_without_it(made, source):
    from diffusers import DiTPipeline

    original = tiny_pipelines.quiet(DiTPipeline.from_pretrained(source, local_files_only=True))
    expected = _run(original)
    pipeline = effcli.load_pipeline(made, schedule="fast")
    followed = _run(pipeline)
    assert pipeline.effcli_schedule.follower.full_calls == 3
    assert not torch.equal(followed, expected)
    torch.testing.assert_close(_run(effcli.load_pipeline(made, "fast")), followed, rtol=0, atol=0)
    pipeline.effcli_schedule.attached.remove()
    assert torch.equal(_run(pipeline), expected)
    slow = effcli.load_pipeline(made)
    _run(slow)
    assert slow.effcli_schedule.schedule.name == "slow"
    assert slow.effcli_schedule.follower.full_calls == 5


def test_what_the_schedule_was_not_calibrated_for_is_refused(made):
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    with pytest.raises(PassError, match="no schedule 'quick'; known: slow .5 of 8 steps., fast .3 of 8 steps."):
        effcli.load_pipeline(made, "quick")
    with pytest.raises(PassError, match="calibrated with DDIMScheduler, the pipeline has DPMSolver"):
        effcli.load_pipeline(made, scheduler=DPMSolverMultistepScheduler())
    with pytest.raises(PassError, match="scheduler's .* in the calibration"):
        effcli.load_pipeline(made, scheduler=DDIMScheduler(beta_end=0.03, clip_sample=False))
    with pytest.raises(PassError, match="for 8 steps, not 12"):
        effcli.load_pipeline(made, steps=12)
    with pytest.raises(PassError, match="12 time steps"):
        _run(effcli.load_pipeline(made), steps=12)


def test_a_scheduler_with_infinite_settings_is_known_again(tmp_path):
    from diffusers import DPMSolverMultistepScheduler

    pipeline = tiny_pipelines.dit()
    pipeline.scheduler = DPMSolverMultistepScheduler()
    assert pipeline.scheduler.config.lambda_min_clipped == -float("inf")
    pipeline.save_pretrained(tmp_path / "source")
    out = tmp_path / "out"
    effcli.optimize(str(tmp_path / "source"), from_options([f"lemica:budget=4,compare=false,{STEPS}"]), out)
    loaded = effcli.load_pipeline(out)
    _run(loaded)
    assert loaded.effcli_schedule.follower.full_calls == 4
    with pytest.raises(PassError, match="scheduler's lambda_min_clipped is -5.1, and '-inf' in the calibration"):
        effcli.load_pipeline(out, scheduler=DPMSolverMultistepScheduler(lambda_min_clipped=-5.1))


def test_stretching_is_done_on_request_and_says_so(made):
    pipeline = effcli.load_pipeline(made, "fast", steps=15, interpolate=True)
    schedule = pipeline.effcli_schedule.schedule
    assert schedule.steps == 15 and schedule.full[0] == 0 and schedule.full[-1] == 14
    assert schedule.reuse == "last" and "not measured" in schedule.origin
    _run(pipeline, steps=15)
    assert pipeline.effcli_schedule.follower.full_calls == len(schedule.full)


def test_whole_output_is_followed_stretched_and_compared_with_the_residual(source, tmp_path):
    out = tmp_path / "out"
    report = effcli.optimize(str(source), from_options([f"lemica:budget=4,mode=output,{STEPS}"]), out)
    assert {row.method for row in report.comparison} >= {"fitted", "fitted-residual"}
    pipeline = effcli.load_pipeline(out)
    entered = []
    pipeline.transformer.pos_embed.register_forward_pre_hook(lambda *_: entered.append(1))
    _run(pipeline)
    assert len(entered) == pipeline.effcli_schedule.follower.full_calls == 4  # embedders rest as well
    stretched = effcli.load_pipeline(out, steps=15, interpolate=True)
    assert stretched.effcli_schedule.schedule.mode == "output"
    _run(stretched, steps=15)
    page = html.unescape((out / "report.html").read_text())
    assert "fitted reuse of the blocks' residual" in page and "full steps' outputs stands for the denoiser" in page


def test_reference_leaves_weights_where_they_are(source, tmp_path):
    effcli.optimize(
        str(source), from_options([f"lemica:budget=3,compare=false,weights=reference,{STEPS}"]), tmp_path / "out"
    )
    assert not list((tmp_path / "out").rglob("*model*.safetensors"))
    pipeline = effcli.load_pipeline(tmp_path / "out")
    _run(pipeline)
    assert pipeline.effcli_schedule.follower.full_calls == 3


def test_reference_to_what_has_gone_says_so(source, tmp_path):
    import shutil

    copied = tmp_path / "copied"
    shutil.copytree(source, copied)
    out = tmp_path / "out"
    effcli.optimize(str(copied), from_options([f"lemica:budget=3,compare=false,weights=reference,{STEPS}"]), out)
    shutil.rmtree(copied)
    with pytest.raises(BadInputError, match="no pipeline is there; put it back"):
        effcli.load_pipeline(out)


def test_failed_gate_publishes_nothing_and_other_gates_resume(source, tmp_path):
    out, step = tmp_path / "out", f"lemica:budget=3,compare=false,{STEPS}"
    with pytest.raises(GateFailedError, match="psnr>=900"):
        effcli.optimize(str(source), from_options([step], gates=["psnr>=900"]), out)
    assert not out.exists() and (tmp_path / "out.failed.json").is_file()
    report = effcli.optimize(str(source), from_options([step], gates=["psnr>=1", "latent_l1<=100"]), out, resume=True)
    assert report.status == "passed" and (out / "lemica.json").is_file()


@pytest.mark.parametrize(
    ("step", "settings", "message"),
    [
        ("lemica:budget=9,steps=8", {}, "budget 9 is not between 2 and 8"),
        ("lemica:budget=3,speedup=2", {}, "exclude each other"),
        ("lemica:budget=3,steps=20,max_gap=4", {}, "max_gap=4 is too small.*smallest that works is 10"),
        ("lemica:steps=4", {}, "nothing to skip"),
        ("lemica:guidance=2,height=64", {}, "height"),
        ("lemica:published=wan2.1-t2v-1.3b:17", {}, "published for WanPipeline"),
        ("lemica:published=nothing", {}, "no published schedule 'nothing'"),
        ("kv-pq", {}, "works on language models"),
        ("lemica", {"gates": ["ppl<=+3%"]}, "unknown metric 'ppl'"),
        ("lemica", {"evaluation": {"tokens": 512}}, "for language models"),
    ],
)
def test_bad_input_is_refused_before_anything_is_measured(source, tmp_path, step, settings, message):
    with pytest.raises((BadInputError, PassError), match=message):
        effcli.optimize(str(source), from_options([step], **settings), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_empty_prompts_file_is_refused(source, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n \n")
    with pytest.raises(PassError, match="is empty"):
        effcli.optimize(str(source), from_options([f"lemica:prompts={prompts},{STEPS}"]), tmp_path / "out")


def test_pipeline_without_a_denoiser_is_refused(tmp_path):
    from diffusers import DiTPipeline

    pipeline = tiny_pipelines.dit()
    folder = tmp_path / "pipeline"
    pipeline.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    assert DiTPipeline is not None and index.pop("transformer")
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises((BadInputError, PassError), match="transformer"):
        effcli.optimize(str(folder), from_options(["lemica"]), tmp_path / "out")


def test_lemica_is_refused_for_a_language_model():
    from passes.lemica import LemicaPass
    from tests import tiny_models

    with pytest.raises(PassError, match="works on diffusers pipelines"):
        LemicaPass.from_mapping({}).check(tiny_models.build("llama"))


def test_published_schedule_needs_no_calibration(tmp_path, source, monkeypatch):
    from passes.lemica import published
    from passes.lemica.schedule import Schedule

    known = published.Published("DiTPipeline", "tiny", Schedule(name="tiny:3", steps=8, full=(0, 3, 7)))
    monkeypatch.setitem(published.PUBLISHED, "tiny:3", known)
    out = tmp_path / "out"
    for mode, taken in (("auto", "residual"), ("output", "output")):
        step = f"lemica:published=tiny:3,steps=8,eval_samples=2,compare=false,mode={mode}"
        effcli.optimize(str(source), from_options([step]), out, force=True)
        content = files.read(out)
        assert content.graph is None and content.schedule().full == (0, 3, 7)
        assert content.schedule().mode == content.calibration.mode == taken
        _run(effcli.load_pipeline(out))


def test_dry_run_measures_and_writes_nothing(source, tmp_path):
    found = optimize_pipeline(
        str(source), from_options([f"lemica:budget=3,{STEPS}"]), tmp_path / "out", Options(), dry_run=True
    )
    assert "would optimize" in "\n".join(found.lines())
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.thorough
def test_killed_calibration_goes_on_where_it_was(source, tmp_path):
    out = tmp_path / "out"
    command = [
        *(sys.executable, "-m", "effcli", "optimize", str(source), "-o", str(out), "--quiet"),
        *("--pass", "lemica:budget=4,steps=16,max_gap=8,samples=2,eval_samples=2,compare=false,batch=2"),
    ]
    process = subprocess.Popen(command)
    work = tmp_path / ".out.effcli" / "pass-1.work"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        lines = sum(len(path.read_bytes().splitlines()) for path in work.glob("*.jsonl")) if work.is_dir() else 0
        if lines > 20:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    assert not out.exists()
    subprocess.run([*command, "--resume"], check=True)
    undisturbed = tmp_path / "undisturbed"
    command[command.index(str(out))] = str(undisturbed)
    subprocess.run(command, check=True)
    one, other = files.read(out), files.read(undisturbed)
    assert one.schedules == other.schedules
    assert one.graph is not None and other.graph is not None
    assert one.graph.edges == other.graph.edges
    for mine, theirs in zip(one.graph.errors, other.graph.errors, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-7)


def test_quantize_and_lemica_in_one_recipe(tmp_path):
    pytest.importorskip("llmcompressor")
    from diffusers import DiTPipeline

    from tests.passes.quantize.test_denoiser import dit as wide_dit

    folder, out = tmp_path / "pipeline", tmp_path / "out"
    wide_dit().save_pretrained(folder)
    steps = ["quantize:scheme=w8a16,method=rtn", f"lemica:budget=4,compare=false,{STEPS}"]
    report = effcli.optimize(str(folder), from_options(steps), out)
    assert [record.name for record in report.passes] == ["quantize", "lemica"]
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert (out / weights).stat().st_size < (folder / weights).stat().st_size
    pipeline = effcli.load_pipeline(out)
    _run(pipeline)
    assert pipeline.effcli_schedule.follower.full_calls == 4
    with pytest.raises(ValueError, match="compressed-tensors"):
        DiTPipeline.from_pretrained(out, local_files_only=True)
