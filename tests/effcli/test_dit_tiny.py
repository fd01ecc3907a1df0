"""The shipped pipeline is what its card says; training learns and repeats itself."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import DiTPipeline  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from effcli import builtin_models, dit_tiny, sources  # noqa: E402
from effcli.dit_tiny import digits, train  # noqa: E402
from effcli.errors import BadInputError, SourceError  # noqa: E402

LIMIT_BYTES = 10_000_000
# Mean ink of each class of the data at 8 x 8, by numpy from scikit-learn's arrays.
MEANS = torch.tensor(json.loads((Path(__file__).parent / "digit_class_means.json").read_text()))


@pytest.fixture(scope="module")
def pipeline():
    loaded = DiTPipeline.from_pretrained(dit_tiny.FOLDER, local_files_only=True)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def draw(pipeline, labels, seed, steps=50, guidance_scale=train.GUIDANCE_SCALE):
    return pipeline(
        labels,
        guidance_scale=guidance_scale,
        generator=torch.Generator().manual_seed(seed),
        num_inference_steps=steps,
        output_type="pt",
    ).images


def made_up_digits(count=10):
    """Bars at one place a class, so that a few steps have something to learn without scikit-learn."""
    labels = torch.arange(count) % len(dit_tiny.LABELS)
    small = torch.zeros(count, 8, 8)
    for row, label in enumerate(labels.tolist()):
        small[row, :, label % 8] = 1.0
    return digits.Digits(small, labels, "made up")


def test_the_folder_is_small_and_holds_no_pickle():
    files = [path for path in dit_tiny.FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= LIMIT_BYTES
    assert {path.suffix for path in files} == {".safetensors", ".json", ".md"}
    for path in dit_tiny.FOLDER.rglob("*.safetensors"):
        for name, tensor in load_file(path).items():
            assert tensor.dtype == torch.float16, name
            assert tensor.isfinite().all(), name


def test_the_pipeline_loads_to_float32_with_its_labels(pipeline):
    assert {pipeline.transformer.dtype, pipeline.vae.dtype} == {torch.float32}
    assert pipeline.get_label_ids(list(dit_tiny.LABELS)) == list(range(10))
    assert len(pipeline.transformer.transformer_blocks) == 28
    assert pipeline.scheduler.config.prediction_type == "v_prediction"


def test_rows_of_labels_that_are_not_there_are_zero(pipeline):
    for block in pipeline.transformer.transformer_blocks:
        table = block.norm1.emb.class_embedder.embedding_table.weight
        used = (table != 0).any(dim=1).nonzero().flatten().tolist()
        assert used == [*range(10), train.NO_CLASS]


def test_pictures_show_the_digit_that_was_asked_for(pipeline):
    labels = list(range(10)) * 2
    shown = draw(pipeline, labels, seed=0)
    assert shown.shape == (20, 3, 32, 32)
    distances = torch.cdist(digits.ink_of(shown).flatten(1), MEANS)
    right = int((distances.argmin(dim=1) == torch.tensor(labels)).sum())
    assert right >= 18  # of the real digits, 90 % are nearest to the mean of their own class
    assert (shown[:10] - shown[10:]).abs().flatten(1).mean(dim=1).min() > 0.01  # another seed, another picture


def test_pictures_repeat_by_seed(pipeline):
    first, again, other = (draw(pipeline, [3, 8], seed, steps=5) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_record_says_what_was_trained(pipeline):
    record = json.loads((dit_tiny.FOLDER / dit_tiny.RECORD).read_text())
    assert record["recipe"] == asdict(train.Recipe())
    assert record["class_accuracy"]["value"] >= 0.9
    assert len(record["data"]["sha256"]) == 64
    counted = {
        part: sum(weight.numel() for weight in getattr(pipeline, part).parameters()) for part in ("transformer", "vae")
    }
    assert record["parameters"] == counted
    assert builtin_models.CATALOGUE[dit_tiny.NAME].parameters == sum(counted.values())
    losses = list(record["losses"].values())
    assert losses[-1] < 0.6 * losses[0]


def test_it_resolves_as_a_pipeline_without_any_fetching(monkeypatch, tmp_path):
    monkeypatch.setenv("EFFCLI_CACHE", str(tmp_path))
    source = sources.resolve(dit_tiny.NAME)
    assert (source.spec, source.kind, source.path) == ("dit-tiny", "diffusers", dit_tiny.FOLDER)
    assert source.revision.startswith("effcli==")
    assert builtin_models.fetch(dit_tiny.NAME) == builtin_models.model_folder(dit_tiny.NAME) == dit_tiny.FOLDER
    assert builtin_models.cached(dit_tiny.NAME)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(SourceError, match="no revision 'main'"):
        sources.resolve(dit_tiny.NAME, revision="main")


def test_training_learns_and_repeats_itself():
    data = made_up_digits()
    recipe = train.Recipe(
        seed=3, steps=8, batch=8, warmup_steps=1, average_decay=0.5, autoencoder_steps=8, autoencoder_batch=4
    )
    first, again = train.train(recipe, data), train.train(recipe, data)
    other = train.train(replace(recipe, seed=4, steps=1, autoencoder_steps=1), data)

    def weights(trained):
        return [*trained.pipeline.transformer.parameters(), *trained.pipeline.vae.parameters()]

    assert all(torch.equal(one, two) for one, two in zip(weights(first), weights(again), strict=True))
    assert not torch.equal(weights(first)[0], weights(other)[0])
    for losses in (first.losses, first.autoencoder_losses):
        assert list(losses) == list(range(1, 9))
        assert losses[8] < losses[1]
    latents = train._encode(first.pipeline.vae, digits.shifted(digits.pictures(data.small)))
    assert (latents * first.pipeline.vae.config.scaling_factor).std().item() == pytest.approx(1.0, abs=1e-4)
    assert first.pipeline.get_label_ids(["seven"]) == [7]


@pytest.mark.slow
def test_what_is_written_is_a_pipeline_with_card_and_record(tmp_path):
    pytest.importorskip("sklearn")
    recipe, data = train.Recipe(steps=2, autoencoder_steps=2), made_up_digits()
    train.write(train.train(recipe, data), recipe, data, tmp_path, each=1)
    record = json.loads((tmp_path / dit_tiny.RECORD).read_text())
    assert record["recipe"]["steps"] == 2 and record["data"]["sha256"] == "made up"
    card = (tmp_path / "README.md").read_text()
    assert "license: apache-2.0" in card and "CC BY 4.0" in card and "--steps 2 --seed 0" in card
    assert DiTPipeline.from_pretrained(tmp_path, local_files_only=True).get_label_ids(["nine"]) == [9]


def test_the_means_are_those_of_the_data():
    pytest.importorskip("sklearn")
    data = digits.load()
    assert len(data.small) == 1797
    assert data.sha256 == json.loads((dit_tiny.FOLDER / dit_tiny.RECORD).read_text())["data"]["sha256"]
    means = torch.stack([data.small[data.labels == label].mean(dim=0) for label in range(10)])
    assert torch.allclose(means.flatten(1), MEANS, atol=6e-4)


def test_pictures_are_ink_on_paper_and_back():
    small = torch.zeros(2, 8, 8)
    small[1, 2:6, 2:6] = 1.0
    images = digits.pictures(small)
    assert images.shape == (2, 3, 32, 32)
    assert images[0].eq(1).all() and images[1, :, 15, 15].eq(-1).all()
    back = digits.ink_of((images + 1) / 2)
    assert torch.allclose(back, small, atol=0.2)  # a corner keeps 0.82 of its ink, as cubic interpolation says


def test_shifts_move_ink_and_bring_in_paper():
    images = torch.ones(2, 3, 32, 32)
    images[:, :, 0, 0] = -1.0
    moved = digits.shifted(images).unflatten(0, (9, 2))
    assert torch.equal(moved[4], images)  # neither down nor right
    ink = [[tuple(place) for place in (shift[0, 0] < 0).nonzero().tolist()] for shift in moved]
    assert ink == [[(1, 1)], [(1, 0)], [], [(0, 1)], [(0, 0)], [], [], [], []]


def test_without_scikit_learn_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(BadInputError, match="pip install scikit-learn"):
        digits.load()


def test_a_folder_with_files_is_refused(tmp_path):
    import typer

    (tmp_path / "file").touch()
    app = typer.Typer()
    app.command()(train.main)
    done = CliRunner().invoke(app, [str(tmp_path)])
    assert done.exit_code == 2
    assert "is not an empty folder" in done.output
