"""Training from scratch: a looped model, and the same architecture with a set of weights for every layer, its twin.

::

    CONFIG ──> twin, random ───> train ──> OUT-twin, the pipeline's original          (before anything is measured)
       └─────> looped, random ─> train ──> OUT                                        (apply)
                                  └─ the same windows in the same order, learning rates and seed

Both run as many layers on a token, so they take the same FLOPs but for those of the low-rank parts; what differs is how
many weights there are (the experiment of Universal Transformers, ICLR 2019, and ALBERT, ICLR 2020: shared weights
against own ones at the same depth). The loss of a token is its cross-entropy, in nats.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from passes.base import ModelProfile, PassContext, PassError, Prediction, SourceContext
from passes.loop import scratch_record, scratch_text, scratch_tokenizer, training
from passes.loop.convert import convert
from passes.loop.layout import LoopPlan
from passes.loop.parameters import LoopParameters
from passes.loop.scratch_record import Trained
from passes.loop.scratch_text import Tokens
from passes.loop.targets import Structure

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HELD_OUT = "held-out.txt"
TRAINING_FLOPS = 3
"""FLOPs of training on a token over those of running it: forth, and twice back."""
STEP_TOKENS = 4096
"""Tokens that are in memory at a time."""
WEIGHT_DECAY = 0.1
STATE = "training.safetensors"
SHARD_BYTES = 2 * 10**9


def recipe(parameters: LoopParameters) -> dict[str, Any]:
    """Return what the twin depends on, besides its config and seed.

    Raises
    ------
    PassError
        If the text cannot be read.
    """
    assert parameters.train_text is not None
    names = ("train_tokens", "train_length", "train_batch", "learning_rate", "gradient_checkpointing")
    return {"train_text": scratch_text.sha256(parameters.train_text)} | {
        name: getattr(parameters, name) for name in names
    }


def check(parameters: LoopParameters, model: PreTrainedModel) -> None:
    """Refuse windows that are longer than the model's context.

    Raises
    ------
    PassError
    """
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is not None and parameters.train_length + 1 > limit:
        raise PassError(
            f"train_length={parameters.train_length} is past the config's max_position_embeddings={limit} (with a BOS "
            f"token before it); give train_length={limit - 1} or less"
        )


def build_twin(folder: Path, parameters: LoopParameters, context: SourceContext) -> tuple[str, ...]:
    """Train the unshared model of a config, and write it with its tokenizer, the held-out text and its record.

    Parameters
    ----------
    folder : Path
    parameters : LoopParameters
    context : SourceContext
        Its model is on the meta device; the twin gets its config and dtype.

    Returns
    -------
    tuple of str
        How it was made.

    Raises
    ------
    PassError
        If the text is too short, the tokenizer does not suit, or training diverges.
    """
    from passes.loop import targets

    check(parameters, context.model)
    text = scratch_text.read(parameters)
    config, tokenizer, notes = copy.deepcopy(context.model.config), context.tokenizer, []
    vocabulary = config.get_text_config(decoder=True).vocab_size
    if tokenizer is None:
        special = scratch_tokenizer.special_tokens(config)
        tokenizer = scratch_tokenizer.train(text.training, vocabulary, special)
        for role, value in special.roles.items():
            setattr(config, role, value)
        notes.append(
            f"no tokenizer lies beside the config: a byte-level BPE of {len(tokenizer):,} tokens was trained on the "
            f"training part of '{text.name}', with the special tokens {', '.join(special.tokens)}"
        )
    tokens = scratch_text.tokenize(text, tokenizer, vocabulary, parameters, context.evaluation_window)
    model = initial(type(context.model), config, context.seed)
    structure = targets.find(model)
    done = _train(model, tokens, parameters, context, "training the twin")
    made = _trained(done, structure.parameters, flops_per_token(structure, model))
    model.cpu().to(context.model.dtype).save_pretrained(folder, max_shard_size=SHARD_BYTES)
    tokenizer.save_pretrained(folder)
    (folder / HELD_OUT).write_text(text.held_out, encoding="utf-8")
    scratch_record.write(folder, made)
    rounds = made.tokens / tokens.training.numel()
    notes.append(
        f"trained from random weights on {made.tokens:,} tokens of '{text.name}' ({rounds:.1f} rounds through its "
        f"first 95 %, {made.seconds / 60:.1f} minutes): held-out loss {made.held_out_loss:.4f} nats a token"
    )
    return tuple(notes)


def train_looped(
    model: PreTrainedModel,
    structure: Structure,
    plan: LoopPlan,
    parameters: LoopParameters,
    context: PassContext,
) -> dict[str, Any]:
    """Make a model a looped one with random weights, and train it as its twin was.

    Parameters
    ----------
    model : PreTrainedModel
        The twin. Its weights are dropped; changed in place.
    structure : Structure
        Of the twin.
    plan : LoopPlan
    parameters : LoopParameters
    context : PassContext
        Its source is the twin's folder.

    Returns
    -------
    dict
        Both models' figures, for the record: ``twin`` and ``looped`` (:class:`Trained`), ``loss_ratio``,
        ``parameter_share``, and what they were trained with.

    Raises
    ------
    PassError
        If the twin has no record of its training, or training diverges.
    """
    twin = scratch_record.read(context.source)
    tokenizer: PreTrainedTokenizerBase | None = context.tokenizer
    if tokenizer is None:
        raise PassError(f"the tokenizer of '{context.source}' cannot be loaded; run again with --force")
    text = scratch_text.read(parameters)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    tokens = scratch_text.tokenize(text, tokenizer, vocabulary, parameters)
    dtype, sizes = model.dtype, plan.sizes(structure)
    flops = flops_per_token(structure, model)
    restart(model, plan, plan.to_json(sizes) | parameters.loop_entries, context.seed)
    done = _train(model, tokens, parameters, context, "training the looped model")
    model.to(dtype)
    looped = _trained(done, sizes.parameters_after, flops + sizes.delta_flops_per_token)
    return {
        "text": text.name,
        "training_tokens": tokens.training.numel(),
        "held_out_tokens": tokens.held_out.numel(),
        "rounds": looped.tokens / tokens.training.numel(),
        "length": parameters.train_length,
        "batch": parameters.train_batch,
        "learning_rate": parameters.learning_rate,
        "computed_in": "bfloat16" if computes_bfloat16(context.device) else "float32",
        "twin": twin,
        "looped": asdict(looped),
        "loss_ratio": looped.held_out_loss / twin["held_out_loss"],
        "parameter_share": looped.parameters / twin["parameters"],
    }


def initial(model_class: type[PreTrainedModel], config: Any, seed: int) -> PreTrainedModel:
    """Return a model with its architecture's own random weights, in float32 on the CPU, without dropout."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class(copy.deepcopy(config)).float().eval()


def restart(model: PreTrainedModel, plan: LoopPlan, loop: dict[str, Any], seed: int) -> None:
    """Replace a model's weights by random ones and share the blocks of a plan: each block starts as its first layer.

    In float32, on the CPU. What is not shared starts as in the twin; the layers' own parts start without effect.
    """
    fresh = initial(type(model), model.config, seed)
    model.cpu().float()
    model.load_state_dict(fresh.state_dict())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        convert(model, plan, loop)


def flops_per_token(structure: Structure, model: PreTrainedModel) -> int:
    """Return the FLOPs of a token's products with the linears of all layers, as run, and with the head."""
    head = model.get_output_embeddings()
    linears = sum(shape.parameters for layer in structure.linears for shape in layer.values())
    return 2 * (linears + (0 if head is None else head.weight.numel()))


def computes_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies matrices in bfloat16 by itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and bool(torch.cpu._is_amx_tile_supported())


def next_token_loss(model: Any, ids: torch.Tensor, bos: int | None) -> torch.Tensor:
    """Return the mean cross-entropy, nats a token, of windows (B, T) given what precedes each token in its window.

    With a BOS token before each window all T tokens count, else T − 1.
    """
    if bos is not None:
        ids = torch.cat([torch.full_like(ids[:, :1], bos), ids], dim=1)
    logits = model(input_ids=ids, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())


def predict(prediction: Prediction, parameters: LoopParameters, profile: ModelProfile) -> Prediction:
    """Return a prediction with what training the looped model takes."""
    from passes.loop import targets
    from passes.loop.plan import EFFICIENCY, STATE_BYTES, expected
    from profilers.device import memory_available_bytes

    structure = targets.find(profile.model)
    sizes = expected(parameters, structure).sizes(structure)
    flops = flops_per_token(structure, profile.model) + sizes.delta_flops_per_token
    rates = profile.peaks.flops_per_second
    name = "bfloat16" if computes_bfloat16(profile.device) and "bfloat16" in rates else "float32"
    rate = rates.get(name)
    seconds, said = None, "how long is not known"
    if rate is not None:
        seconds = TRAINING_FLOPS * flops * parameters.train_tokens / (EFFICIENCY * rate)
        said = f"about {seconds / 60:.3g} minutes at {EFFICIENCY:.0%} of the measured peak in {name}"
    memory = STATE_BYTES * sizes.parameters_after
    return dataclasses.replace(
        prediction,
        pass_seconds=seconds,
        pass_memory_bytes=memory,
        fits=memory <= memory_available_bytes(profile.device),
        notes=(
            *(line for line in prediction.notes if not line.startswith("pass memory")),
            f"training from scratch: {parameters.train_tokens:,} tokens, {said}; its twin was trained as long before",
            f"pass memory: {STATE_BYTES} bytes a parameter for weights, gradients and moments; activations come on top",
        ),
    )


def _train(
    model: PreTrainedModel,
    tokens: Tokens,
    parameters: LoopParameters,
    context: PassContext | SourceContext,
    what: str,
) -> tuple[training.Trained, float]:
    """Train all weights of a model in float32; return what training did, and the loss on all held-out windows."""
    length, device = parameters.train_length, context.device
    mixed = computes_bfloat16(device)
    settings = training.Settings(
        tokens=parameters.train_tokens,
        length=length,
        batch=parameters.train_batch,
        micro_batch=max(1, STEP_TOKENS // length),
        learning_rate=parameters.learning_rate,
        weight_decay=WEIGHT_DECAY,
        checkpoint_seconds=60 * parameters.checkpoint_minutes,
        gradient_checkpointing=parameters.gradient_checkpointing,
        mixed=mixed,
    )

    def losses(called: Any, windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        loss = next_token_loss(called, windows, tokens.bos)
        return loss, loss.detach()

    model.to(device)
    held_out = tokens.held_out[: tokens.held_out.numel() // length * length].view(-1, length)
    # The last windows of what training is given are those of its curve.
    ids = torch.cat([tokens.training, held_out[: training.HELD_OUT_WINDOWS].flatten()])
    names = [name for name, _ in model.named_parameters()]
    done = training.train(
        model, names, ids, settings, context.work / STATE, losses,
        what=what, seed=context.seed, progress=context.progress,
    )  # fmt: skip
    total = 0.0
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=mixed):
        for part in torch.split(held_out, settings.micro_batch):
            total += float(next_token_loss(model, part.to(device), tokens.bos)) * len(part)
    return done, total / len(held_out)


def _trained(done: tuple[training.Trained, float], parameters: int, flops: int) -> Trained:
    said, loss = done
    curve = [
        {"tokens": point.tokens, "seconds": point.seconds, "loss": point.loss, "held_out_loss": point.held_out}
        for point in said.curve
    ]
    return Trained(said.tokens, said.steps, said.seconds, loss, parameters, flops, curve)
