"""Checks before weights are loaded: the fingerprint, saved profiles, and what a source says of itself."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest

from effcli import api, sources
from effcli.checkpoint_files import sha256_of
from effcli.errors import BadInputError
from effcli.preflight import Job, Options, check_saved_profile, licence_of, original_card, prepare, quantized_before
from effcli.recipes import from_mapping
from profilers.base import SilentProgress
from tests.effcli.tiny_files import write_gguf

RECIPE: dict[str, Any] = {
    "version": 1,
    "passes": [{"quantize": {"scheme": "fp8"}}],
    "evaluation": {"tokens": 512, "context": 64},
}


def job_of(model: Path, tmp_path: Path, options: Options | None = None, **more: Any) -> Job:
    recipe = from_mapping(RECIPE | more)
    return prepare(str(model), recipe, tmp_path / "out", options or Options(context=32), SilentProgress())


def test_the_fingerprint_follows_source_recipe_texts_and_options_but_not_gates(
    tiny_folder: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some words to evaluate on, again and again. " * 200)
    asked = {"evaluation": {"tokens": 512, "context": 64, "text": str(text)}}
    job = job_of(tiny_folder, tmp_path, **asked)
    known = job.fingerprint()
    assert known["source"]["model.safetensors"] == sha256_of(tiny_folder / "model.safetensors")
    assert known["texts"] == {str(text): sha256_of(text)}
    assert job_of(tiny_folder, tmp_path, **asked, gates=["kl<=1"]).fingerprint() == known
    assert job_of(tiny_folder, tmp_path, **asked, seed=1).fingerprint()["recipe"] != known["recipe"]
    other = job_of(tiny_folder, tmp_path, Options(context=33), **asked).fingerprint()
    assert other["options"] != known["options"]
    text.write_text(text.read_text() + "more")
    assert job.fingerprint()["texts"] != known["texts"]


def test_a_saved_profile_must_be_of_this_model_here(tiny_folder: Path, tmp_path: Path) -> None:
    job = job_of(tiny_folder, tmp_path)
    saved = api.profile(str(tiny_folder), only=("latency",), context=(32,)).to_dict()
    check_saved_profile(job, saved, "float32")

    def changed(part: str, key: str, value: Any) -> dict[str, Any]:
        other = copy.deepcopy(saved)
        other[part][key] = value
        return other

    for profile, message in (
        (changed("model", "architecture", "GPT2LMHeadModel"), "is of a GPT2LMHeadModel"),
        (changed("environment", "device_name", "another machine"), "was measured on 'another machine'"),
        (changed("model", "fingerprint", "0" * 64), "is of other weights"),
        (changed("model", "dtype", "bfloat16"), "measured in bfloat16, this run uses float32"),
        (saved | {"schema": "effcli.plan/1"}, "has schema 'effcli.plan/1'"),
        (saved | {"profiles": {}}, "holds no timings"),
    ):
        with pytest.raises(BadInputError, match=message):
            check_saved_profile(job, profile, "float32")
    with pytest.raises(BadInputError, match="no timing at batch 1, context 64"):
        check_saved_profile(job_of(tiny_folder, tmp_path, Options(context=64)), saved, "float32")


def test_a_card_gives_licence_and_base_model(tiny_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    source = sources.resolve(str(folder))
    assert original_card(source) is None
    assert licence_of(source, None) is None
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: [a/b, c/d]\n---\n")
    about = job_of(folder, tmp_path).provenance_source()
    assert (about["licence"], about["base_model"], about["kind"]) == ("apache-2.0", "a/b", "folder")
    assert about["quantized"] is None
    (folder / "README.md").write_text("no front matter")
    assert licence_of(source, original_card(source)) is None


def test_a_gguf_source_says_how_it_was_quantized(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    model = write_gguf(path)
    types, bits, size = quantized_before(sources.resolve(str(path)))
    assert types is not None
    assert types.startswith("Q8_0")
    assert size == path.stat().st_size
    assert bits == pytest.approx(8 * size / model.num_parameters(), rel=0.01)
    assert job_of(path, tmp_path).provenance_source()["quantized"] == types
