"""Train ``dit-tiny`` and write it as a diffusers pipeline: ``python -m effcli.dit_tiny.train FOLDER``.

::

    digits ──> autoencoder (32 x 32 x 3 <-> 8 x 8 x 4) ──> latents of unit variance ──> diffusion transformer
                                                                                        (28 blocks, 16 tokens)

The same seed gives the same weights on the same machine with the same number of threads.
"""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from effcli.dit_tiny import LABELS, NAME, RECORD
from effcli.dit_tiny.digits import SIZE, Digits, ink_of, load, pictures, shifted
from effcli.errors import BadInputError, EffcliError

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

# DiTPipeline asks for this class where guidance needs "no class", so that the tables of labels must reach it.
NO_CLASS = 1000
GUIDANCE_SCALE = 3.0
_LATENT_CHANNELS = 4
_LATENT_SIZE = 8
_ENCODE_BATCH = 512
_LOSSES_KEPT = 20


@dataclass(frozen=True)
class Recipe:
    """How ``dit-tiny`` is trained.

    Attributes
    ----------
    seed : int
        Of the weights, the batches, the noise and the dropped labels.
    steps : int
        Optimizer steps of the transformer.
    batch : int
        Latents a step.
    learning_rate : float
        Highest; a warm-up leads to it and a cosine away from it.
    warmup_steps : int
    label_dropout : float
        Share of the labels replaced by ``NO_CLASS``, which is what guidance needs.
    average_decay : float
        Of the moving average of the weights, which is what is kept.
    autoencoder_steps : int
    autoencoder_batch : int
    autoencoder_learning_rate : float
    divergence_weight : float
        Of the Kullback-Leibler divergence (nats a latent value) beside the mean L1 error of the pictures.
    """

    seed: int = 0
    steps: int = 2800
    batch: int = 64
    learning_rate: float = 1e-3
    warmup_steps: int = 200
    label_dropout: float = 0.1
    average_decay: float = 0.999
    autoencoder_steps: int = 800
    autoencoder_batch: int = 16
    autoencoder_learning_rate: float = 2e-3
    divergence_weight: float = 1e-2


@dataclass(frozen=True)
class Trained:
    """What training gives.

    Attributes
    ----------
    pipeline : DiTPipeline
        In float32.
    autoencoder_losses, losses : dict of int to float
        Mean loss since the step before, by step.
    seconds : float
    """

    pipeline: DiTPipeline
    autoencoder_losses: dict[int, float]
    losses: dict[int, float]
    seconds: float


def new_autoencoder() -> AutoencoderKL:
    """Return the untrained autoencoder: 32 x 32 pixels to 8 x 8 latents of 4 channels."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        sample_size=SIZE,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=_LATENT_CHANNELS,
        mid_block_add_attention=False,
    )


def new_transformer() -> DiTTransformer2DModel:
    """Return the untrained transformer: 28 blocks of width 64 on 16 tokens, each block starting as the identity."""
    import torch
    from diffusers import DiTTransformer2DModel

    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=_LATENT_CHANNELS,
        out_channels=_LATENT_CHANNELS,
        num_layers=28,
        sample_size=_LATENT_SIZE,
        patch_size=2,
        num_embeds_ada_norm=NO_CLASS,
    )
    with torch.no_grad():
        for block in transformer.transformer_blocks:
            block.norm1.linear.weight.zero_()
            block.norm1.linear.bias.zero_()
            table = block.norm1.emb.class_embedder.embedding_table.weight
            table.normal_(std=0.02)
            table[len(LABELS) : NO_CLASS] = 0  # labels that there is nothing to learn about
        for layer in (transformer.proj_out_1, transformer.proj_out_2):
            layer.weight.zero_()
            layer.bias.zero_()
    return transformer


def new_scheduler() -> DDIMScheduler:
    """Return the scheduler that the transformer is trained for; without noise of its own, so pictures repeat."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        clip_sample=False,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )


def train(recipe: Recipe, digits: Digits) -> Trained:
    """Train both models on ``digits``."""
    import torch
    from diffusers import DiTPipeline

    started = time.perf_counter()
    torch.manual_seed(recipe.seed)
    images = shifted(pictures(digits.small))
    labels = digits.labels.repeat(len(images) // len(digits.labels))
    vae, transformer, scheduler = new_autoencoder(), new_transformer(), new_scheduler()
    autoencoder_losses = _train_autoencoder(vae, images, recipe)
    latents = _encode(vae, images)
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    losses = _train_transformer(transformer, scheduler, latents * vae.config.scaling_factor, labels, recipe)
    id2label = dict(enumerate(LABELS))
    pipeline = DiTPipeline(transformer.eval(), vae.eval(), scheduler, id2label)
    pipeline.register_to_config(id2label=id2label)  # DiTPipeline uses the labels and would not save them
    return Trained(pipeline, autoencoder_losses, losses, time.perf_counter() - started)


def _train_autoencoder(vae: AutoencoderKL, images: torch.Tensor, recipe: Recipe) -> dict[int, float]:
    import torch

    steps = recipe.autoencoder_steps
    optimizer = torch.optim.AdamW(vae.parameters(), lr=recipe.autoencoder_learning_rate, weight_decay=0.0)
    log = _Losses("autoencoder", steps)
    for step, rows in enumerate(_batches(len(images), recipe.autoencoder_batch, steps)):
        _set_learning_rate(optimizer, recipe.autoencoder_learning_rate, step, steps, recipe.warmup_steps)
        posterior = vae.encode(images[rows]).latent_dist
        error = (vae.decode(posterior.sample()).sample - images[rows]).abs().mean()
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        _descend(optimizer, vae, error + recipe.divergence_weight * divergence)
        log.add(error.item())
    return log.kept


def _encode(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    import torch

    with torch.no_grad():
        return torch.cat([vae.encode(part).latent_dist.mode() for part in torch.split(images, _ENCODE_BATCH)])


def _train_transformer(
    transformer: DiTTransformer2DModel,
    scheduler: DDIMScheduler,
    latents: torch.Tensor,
    labels: torch.Tensor,
    recipe: Recipe,
) -> dict[int, float]:
    """Train in place; the weights left are the moving average."""
    import torch
    from diffusers.training_utils import EMAModel

    # In train mode each block would drop labels by a draw of its own; here one draw counts for all of them.
    transformer.eval()
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=recipe.learning_rate, weight_decay=0.0, fused=True)
    average = EMAModel(transformer.parameters(), decay=recipe.average_decay, use_ema_warmup=True, power=0.75)
    log = _Losses("transformer", recipe.steps)
    for step, rows in enumerate(_batches(len(latents), recipe.batch, recipe.steps)):
        _set_learning_rate(optimizer, recipe.learning_rate, step, recipe.steps, recipe.warmup_steps)
        clean = latents[rows]
        noise = torch.randn_like(clean)
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(rows),))
        dropped = torch.rand(len(rows)) < recipe.label_dropout
        predicted = transformer(
            scheduler.add_noise(clean, noise, timesteps),
            timestep=timesteps,
            class_labels=labels[rows].masked_fill(dropped, NO_CLASS),
        ).sample
        loss = torch.nn.functional.mse_loss(predicted, scheduler.get_velocity(clean, noise, timesteps))
        _descend(optimizer, transformer, loss)
        average.step(transformer.parameters())
        log.add(loss.item())
    average.copy_to(transformer.parameters())
    return log.kept


def _descend(optimizer: torch.optim.Optimizer, model: torch.nn.Module, loss: torch.Tensor) -> None:
    import torch

    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def _set_learning_rate(
    optimizer: torch.optim.Optimizer, highest: float, step: int, steps: int, warmup_steps: int
) -> None:
    warmup = min(1.0, (step + 1) / warmup_steps)
    for group in optimizer.param_groups:
        group["lr"] = highest * warmup * (0.5 + 0.5 * math.cos(math.pi * step / steps))


def _batches(count: int, batch: int, steps: int) -> Iterator[torch.Tensor]:
    """Yield ``steps`` batches of row numbers, every row once before any comes again."""
    import torch

    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < batch:
            order = torch.cat([order, torch.randperm(count)])
        yield order[:batch]
        order = order[batch:]


class _Losses:
    """Means of the loss at evenly spaced steps, told on stderr as they come."""

    def __init__(self, what: str, steps: int) -> None:
        self.what, self.steps = what, steps
        self.kept: dict[int, float] = {}
        self._every = max(1, steps // _LOSSES_KEPT)
        self._seen: list[float] = []
        self._count = 0
        self._started = time.perf_counter()

    def add(self, loss: float) -> None:
        self._count += 1
        self._seen.append(loss)
        if self._count % self._every == 0 or self._count == self.steps:
            mean = self.kept[self._count] = sum(self._seen) / len(self._seen)
            self._seen.clear()
            each = (time.perf_counter() - self._started) / self._count
            left = each * (self.steps - self._count)
            typer.echo(f"{self.what}: step {self._count}/{self.steps}, loss {mean:.4f}, {left:.0f} s left", err=True)


def class_accuracy(pipeline: DiTPipeline, digits: Digits, each: int, guidance_scale: float = GUIDANCE_SCALE) -> float:
    """Return the share of generated pictures in which nearest neighbours among the real digits see the asked class.

    Parameters
    ----------
    pipeline : DiTPipeline
    digits : Digits
    each : int
        Pictures a class; one generator a class, seeded with the class, draws them.
    guidance_scale : float
    """
    import torch
    from sklearn.neighbors import KNeighborsClassifier

    classifier = KNeighborsClassifier(n_neighbors=3).fit(digits.small.flatten(1).numpy(), digits.labels.numpy())
    right = 0
    for label in range(len(LABELS)):
        shown = pipeline(
            [label] * each,
            guidance_scale=guidance_scale,
            generator=torch.Generator().manual_seed(label),
            output_type="pt",
        ).images
        right += int((classifier.predict(ink_of(shown).flatten(1).numpy()) == label).sum())
    return right / (each * len(LABELS))


def write(trained: Trained, recipe: Recipe, digits: Digits, folder: Path, *, each: int = 50) -> None:
    """Write the pipeline, its model card and the record of its training.

    The weights are rounded to float16, half the bytes; diffusers loads them to float32. Everything that the card says
    about quality is measured on the pipeline read back from ``folder``.
    """
    import diffusers
    import sklearn
    import torch

    trained.pipeline.to(torch.float16).save_pretrained(folder)
    loaded = diffusers.DiTPipeline.from_pretrained(folder, local_files_only=True)
    loaded.set_progress_bar_config(disable=True)
    record = {
        "name": NAME,
        "recipe": asdict(recipe),
        "data": {"name": "sklearn.datasets.load_digits", "sha256": digits.sha256, "pictures": len(digits.small)},
        "parameters": {
            part: sum(weight.numel() for weight in getattr(loaded, part).parameters())
            for part in ("transformer", "vae")
        },
        "autoencoder_losses": trained.autoencoder_losses,
        "losses": trained.losses,
        "class_accuracy": {
            "value": class_accuracy(loaded, digits, each),
            "pictures": each * len(LABELS),
            "guidance_scale": GUIDANCE_SCALE,
            "classifier": "3 nearest neighbours among the real digits, at 8 x 8",
        },
        "seconds": round(trained.seconds),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "diffusers": diffusers.__version__,
            "scikit-learn": sklearn.__version__,
        },
    }
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_card(record), encoding="utf-8")


def _card(record: dict[str, Any]) -> str:
    recipe, accuracy, parameters = record["recipe"], record["class_accuracy"], record["parameters"]
    return f"""---
license: apache-2.0
library_name: diffusers
pipeline_tag: unconditional-image-generation
---

# {NAME}

A class-conditional diffusion transformer that draws handwritten digits, 32 x 32 pixels, small enough to ship and to
run in seconds on a CPU. It is there to try things on; it is no useful generator.

```python
from diffusers import DiTPipeline

pipeline = DiTPipeline.from_pretrained("FOLDER")
images = pipeline(pipeline.get_label_ids(["three", "seven"]), guidance_scale={GUIDANCE_SCALE:g}).images
```

- **Transformer**: `DiTTransformer2DModel`, 28 blocks of width 64, 2 heads, 16 tokens (patches of 2 x 2 on 8 x 8 x 4
  latents), {parameters["transformer"]:,} parameters. Two fifths of them are rows for classes 10 to 999, all zero:
  `DiTPipeline` asks for class {NO_CLASS} where guidance needs "no class".
- **Autoencoder**: `AutoencoderKL`, {parameters["vae"]:,} parameters.
- **Scheduler**: DDIM, v-prediction, 1,000 training steps, linear betas, trailing spacing. Made for 50 steps.
- **Weights**: float16 safetensors, to be loaded as float32 (what diffusers does unless told otherwise).

## Quality

Of {accuracy["pictures"]:,} pictures, the same number of each class, at guidance {accuracy["guidance_scale"]:g}
and 50 steps, {accuracy["value"]:.1%} show the asked digit in the eyes of a classifier
({accuracy["classifier"]}).
The classifier says nothing about variety, and nothing was held out: expect pictures close to some of the data.

## Training

`python -m effcli.dit_tiny.train FOLDER --steps {recipe["steps"]} --seed {recipe["seed"]}`:
{record["seconds"] / 60:.0f} minutes on a CPU that had other work (torch threads: {record["threads"]}).
`{RECORD}` holds the recipe, the losses, the versions and the hash of the data.

## Data and licence

The weights are under Apache-2.0. The data are the {record["data"]["pictures"]:,} digits of
`sklearn.datasets.load_digits`: the test set of "Optical Recognition of Handwritten Digits" by E. Alpaydin and
C. Kaynak (UCI Machine Learning Repository, https://doi.org/10.24432/C50P49), under CC BY 4.0; here enlarged from 8 x 8
to 32 x 32 pixels, inverted, and shifted by up to a pixel.
"""


def main(
    folder: Annotated[Path, typer.Argument(help="Where to write the pipeline; new or empty.")],
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of the transformer.")] = Recipe.steps,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = Recipe.seed,
) -> None:
    """Train dit-tiny and write it as a diffusers pipeline."""
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise BadInputError(f"'{folder}' is not an empty folder; name a new one")
        recipe, digits = Recipe(seed=seed, steps=steps), load()
        write(train(recipe, digits), recipe, digits, folder)
    except EffcliError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(error.exit_code) from None
    typer.echo(str(folder))


if __name__ == "__main__":
    typer.run(main)
