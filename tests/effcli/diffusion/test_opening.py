"""Open pipelines: what is read, what is refused, and that nothing is written to the terminal."""

from __future__ import annotations

import builtins
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from effcli.diffusion.opening import is_pipeline, open_pipeline
from effcli.errors import BadInputError, EffcliError, NoRoomError, SourceError
from passes.base import MissingExtraError, PassError
from tests.passes.lemica import tiny_pipelines

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipelines") / "dit"
    tiny_pipelines.dit().save_pretrained(folder)
    return folder


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "copied")


def change_index(folder: Path, **entries: Any) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def test_a_folder_is_opened_whole(saved: Path) -> None:
    opened = open_pipeline(saved, device="cpu")

    original = tiny_pipelines.dit()
    for name in ("transformer", "vae"):
        expected = getattr(original, name).state_dict()
        found = getattr(opened.pipeline, name).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        assert not getattr(opened.pipeline, name).training
    info = opened.info
    assert (info.source, info.kind, info.architecture) == (str(saved), "folder", "DiTPipeline")
    assert (info.denoiser, info.denoiser_architecture) == ("transformer", "DiTTransformer2DModel")
    assert (info.mode, info.blocks, info.scheduler, info.dtype) == ("residual", 3, "DDIMScheduler", "float32")
    sizes = {item.name: (item.architecture, item.parameters, item.weight_bytes) for item in info.components}
    assert set(sizes) == {"transformer", "vae"}
    parameters = sum(item.numel() for item in original.transformer.parameters())
    assert sizes["transformer"] == ("DiTTransformer2DModel", parameters, 4 * parameters)
    assert opened.folder == saved and opened.load_seconds > 0


def test_the_fingerprint_is_of_every_component(saved: Path, copied: Path) -> None:
    before = open_pipeline(saved, device="cpu").info.fingerprint
    assert open_pipeline(copied, device="cpu").info.fingerprint == before
    for part in ("transformer", "vae"):
        weights = load_file(copied / part / WEIGHTS)
        next(iter(weights.values())).add_(1)
        save_file(weights, copied / part / WEIGHTS, {"format": "pt"})
        after = open_pipeline(copied, device="cpu").info.fingerprint
        assert after != before
        before = after


def test_the_index_itself_can_be_named(saved: Path) -> None:
    assert open_pipeline(saved / "model_index.json", device="cpu").info.architecture == "DiTPipeline"


def test_the_whole_output_can_be_asked_for(saved: Path) -> None:
    info = open_pipeline(saved, device="cpu", mode="output").info
    assert (info.mode, info.blocks) == ("output", None)


@pytest.mark.parametrize(("asked", "expected"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_dtype_on_a_cpu(copied: Path, asked: str, expected: torch.dtype) -> None:
    pipeline = tiny_pipelines.dit().to(torch.float16)
    pipeline.save_pretrained(copied)
    opened = open_pipeline(copied, device="cpu", dtype=asked)
    assert opened.dtype == expected
    assert {item.dtype for item in opened.pipeline.transformer.parameters()} == {expected}


def test_nothing_is_written_to_the_terminal(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from diffusers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    opened = open_pipeline(saved, device="cpu")
    opened.pipeline(class_labels=[1], num_inference_steps=2, output_type="pt")
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (level, bars)


def drop(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def lose_a_tensor(folder: Path) -> None:
    weights = load_file(folder / "transformer" / WEIGHTS)
    weights.pop("pos_embed.proj.bias")
    save_file(weights, folder / "transformer" / WEIGHTS, {"format": "pt"})


def truncate(folder: Path) -> None:
    path = folder / "vae" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def pickle_only(folder: Path) -> None:
    (folder / "vae" / WEIGHTS).rename(folder / "vae" / "diffusion_pytorch_model.bin")


def variant_only(folder: Path) -> None:
    (folder / "vae" / WEIGHTS).rename(folder / "vae" / "diffusion_pytorch_model.fp16.safetensors")


def lose_a_shard(folder: Path) -> None:
    (folder / "vae" / WEIGHTS).unlink()
    index = {"metadata": {}, "weight_map": {"a": "diffusion_pytorch_model-00001-of-00002.safetensors"}}
    (folder / "vae" / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose_a_tensor, "lack 1 tensors, first 'pos_embed.proj.bias'"),
        (truncate, "truncated or damaged"),
        (pickle_only, "is pickled"),
        (variant_only, "only a variant"),
        (lose_a_shard, "00001-of-00002.safetensors', which is not there"),
        (drop(f"vae/{WEIGHTS}"), "diffusers cannot load"),
        (drop("transformer/config.json"), "diffusers cannot load"),
        (lambda folder: (folder / "model_index.json").write_text("{"), "not valid JSON"),
        (lambda folder: change_index(folder, _class_name="DitPipeline"), "did you mean 'DiTPipeline'"),
        (lambda folder: change_index(folder, _class_name=None), "names no pipeline class"),
        (lambda folder: change_index(folder, _class_name=["mine", "MyPipeline"]), "--trust-remote-code"),
        (lambda folder: change_index(folder, transformer=["mine", "MyTransformer"]), "MyTransformer of mine"),
    ],
)
def test_what_is_damaged_or_not_trusted_is_refused_in_one_line(
    copied: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(copied)
    with pytest.raises(SourceError, match=message) as caught:
        open_pipeline(copied, device="cpu")
    assert "\n" not in str(caught.value)


def test_own_code_runs_only_when_it_is_trusted(copied: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (copied / "mine.py").write_text(
        f"import pathlib\nfrom diffusers import DiTPipeline\npathlib.Path({str(ran)!r}).touch()\n"
        "class MyPipeline(DiTPipeline):\n    pass\n"
    )
    change_index(copied, _class_name=["mine", "MyPipeline"])
    with pytest.raises(SourceError):
        open_pipeline(copied, device="cpu")
    assert not ran.exists()
    opened = open_pipeline(copied, device="cpu", trust_remote_code=True)
    assert ran.exists()
    assert opened.info.architecture == "MyPipeline"
    assert "runs the code" in opened.info.notes[0]


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"dtype": "float8"}, BadInputError, "unknown dtype"),
        ({"device": "tpu"}, BadInputError, "no device 'tpu'"),
        ({"revision": "main"}, SourceError, "has no revision"),
    ],
)
def test_wrong_arguments(saved: Path, arguments: dict[str, str], kind: type[EffcliError], message: str) -> None:
    with pytest.raises(kind, match=message):
        open_pipeline(saved, **arguments)  # type: ignore[arg-type]


def test_a_language_model_is_no_pipeline(tiny_folder: Path) -> None:
    assert not is_pipeline(str(tiny_folder))
    with pytest.raises(SourceError, match="no diffusers pipeline"):
        open_pipeline(tiny_folder)


def test_what_is_a_pipeline(saved: Path, tmp_path: Path) -> None:
    assert is_pipeline(str(saved)) and is_pipeline(str(saved / "model_index.json")) and is_pipeline("dit-tiny")
    assert not is_pipeline(str(tmp_path)) and not is_pipeline("org/name") and not is_pipeline("")


def test_a_pipeline_without_a_denoiser_is_refused_by_name(copied: Path) -> None:
    change_index(copied, transformer=[None, None])
    with pytest.raises((PassError, SourceError), match="transformer"):
        open_pipeline(copied, device="cpu")


def test_weights_that_do_not_fit_are_refused_before_they_are_read(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("profilers.device.memory_available_bytes", lambda device: 1000)
    with pytest.raises(NoRoomError, match="smaller --dtype"):
        open_pipeline(saved, device="cpu")


def test_without_diffusers_the_extra_is_named(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = builtins.__import__

    def without(name: str, *rest: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "diffusers":
            raise ImportError("No module named 'diffusers'")
        return genuine(name, *rest, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r"pip install 'effcli\[diffusion\]'"):
        open_pipeline(saved, device="cpu")
