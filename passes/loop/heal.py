"""Healing: distil the model as it was into the looped one, on text.

::

    text ──> windows ──┬──> the model as it was ──> logits, hidden states ──┐
                       └──> the looped model ─────> logits, hidden states ──┴──> loss ──> AdamW

The loss of a token is ``KL(original ‖ looped) + hidden_weight · h``, where h is the mean over layers of the squared
distance of their outputs as a share of the original's squared length: logits say what must come out, hidden states
give every layer a target of its own (Relaxed Recursive Transformers, section 3.3, distils logits; TinyBERT, section 3,
hidden states).

Which windows a step sees follows from the seed and its number alone, and the state (weights, both moments of AdamW, the
curve) is one safetensors file that is replaced as a whole: a run that was stopped goes on to the same result.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F

from passes.base import PassError
from passes.loop.modeling_looped import BLOCKS, LoopedLinear
from profilers.base import Progress, SilentProgress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STATE = "healing.safetensors"
FORMAT = "effcli.healing/1"
BETAS = (0.9, 0.95)
WARM_UP, LEAST_RATE = 0.03, 0.1
"""Share of the tokens over which the learning rate rises; what is left of it at the end, as a share."""
CLIP_NORM = 1.0
HELD_OUT_WINDOWS = 4
CURVE_POINTS = 40
SMOOTHING = 0.9
DIVERGED, SETTLED_STEPS = 2.0, 10
"""Healing has diverged if the smoothed loss is this many times that of the first steps, or no number at all."""


@dataclass(frozen=True)
class Settings:
    """How to heal.

    Attributes
    ----------
    tokens : int
        Of text to train on, the same ones again where the text is shorter.
    length, batch : int
        Tokens of a window, windows of a step.
    micro_batch : int
        Windows that are in memory at once; gradients of a step's are added up.
    learning_rate : float
        The highest.
    train : str
        ``deltas``: the layers' own low-rank parts, norms and biases; ``all``: everything but the embeddings.
    hidden_weight : float
    limit_seconds : float or None
        Of all runs together; the learning rate then falls by the time or the tokens, whichever is further.
    checkpoint_seconds : float
        Between two saved states.
    gradient_checkpointing : bool
        Compute activations again on the way back instead of keeping them.
    """

    tokens: int
    length: int = 512
    batch: int = 8
    micro_batch: int = 2
    learning_rate: float = 3e-4
    train: Literal["deltas", "all"] = "all"
    hidden_weight: float = 1.0
    limit_seconds: float | None = None
    checkpoint_seconds: float = 300.0
    gradient_checkpointing: bool = False

    @property
    def steps(self) -> int:
        """Of the optimizer, if no time limit ends them earlier."""
        return max(1, self.tokens // (self.batch * self.length))


@dataclass(frozen=True)
class CurvePoint:
    """The loss after so many tokens: of the last steps (mean), and on windows that are not trained on.

    Attributes
    ----------
    tokens : int
    seconds : float
    loss : float or None
        None before the first step.
    held_out_kl : float
        Nats a token.
    """

    tokens: int
    seconds: float
    loss: float | None
    held_out_kl: float


@dataclass
class _State:
    step: int = 0
    seconds: float = 0.0
    recent: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    smoothed: float | None = None
    curve: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Healed:
    """What healing did.

    Attributes
    ----------
    tokens, steps : int
    seconds : float
        Of all runs together.
    ended : str
        ``tokens`` or ``time limit``.
    trained_parameters : int
    windows, tokens_of_window : int
        How many there are in the text to train on, and their length.
    resumed : bool
    curve : tuple of CurvePoint
    """

    tokens: int
    steps: int
    seconds: float
    ended: str
    trained_parameters: int
    windows: int
    tokens_of_window: int
    resumed: bool
    curve: tuple[CurvePoint, ...]


def heal(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    ids: torch.Tensor,
    settings: Settings,
    work: Path,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> Healed:
    """Train a looped model in place to give what the original gives.

    Parameters
    ----------
    student : PreTrainedModel
        Looped, on the device to train on. Trained in float32 (computing in bfloat16 if it is of 16 bits), and
        of its own dtype again afterwards.
    teacher : PreTrainedModel
        The original, on the same device; only read.
    ids : torch.Tensor
        Shape (N,): the text. Its last windows are kept apart for ``held_out_kl``.
    settings : Settings
    work : Path
        Where the state is saved, and found again by the next call with the same arguments.
    seed : int
    progress : Progress, optional

    Raises
    ------
    PassError
        If the text is too short, or healing diverges.
    """
    shown = progress or SilentProgress()
    windows = _Windows(ids, settings, seed)
    dtype, state = student.dtype, _State()
    names = trainable(student, settings.train)
    with _training(student, names, settings):
        parameters = dict(student.named_parameters())
        trained = {name: parameters[name] for name in names}
        optimizer = torch.optim.AdamW(trained.values(), lr=settings.learning_rate, betas=BETAS, weight_decay=0.0)
        resumed = _restore(work / STATE, state, trained, optimizer)
        run = _Run(student, teacher, windows, settings, optimizer, list(trained.values()), dtype, state)
        saved = time.monotonic()
        with shown.task("heal", total=settings.steps) as task:
            task.advance(state.step)
            try:
                while not (ended := run.ended()):
                    run.step()
                    task.describe(f"heal, loss {state.smoothed:.3f}")
                    task.advance()
                    if time.monotonic() - saved >= settings.checkpoint_seconds:
                        _save(work / STATE, state, trained, optimizer)
                        saved = time.monotonic()
            except KeyboardInterrupt:
                if not run.updating:  # else some weights are a step ahead of others
                    _save(work / STATE, state, trained, optimizer)
                raise
            run.measure()
    student.to(dtype)
    return Healed(
        tokens=state.step * settings.batch * settings.length,
        steps=state.step,
        seconds=state.seconds,
        ended=ended,
        trained_parameters=sum(tensor.numel() for tensor in trained.values()),
        windows=windows.count,
        tokens_of_window=settings.length,
        resumed=resumed,
        curve=tuple(CurvePoint(**point) for point in state.curve),
    )


def trainable(model: PreTrainedModel, train: Literal["deltas", "all"]) -> list[str]:
    """Return the names of the parameters to train: never those of the embeddings, nor a head that shares them."""
    fixed = {
        id(parameter)
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
        if module is not None
        for parameter in module.parameters()
    }
    named = [(name, parameter) for name, parameter in model.named_parameters() if id(parameter) not in fixed]
    if train == "all":
        return [name for name, _ in named]
    own = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, LoopedLinear)
        for parameter in module.parameters(recurse=False)
    }
    return [
        name
        for name, parameter in named
        if id(parameter) in own or (parameter.dim() == 1 and f"{BLOCKS}." not in name)  # norms and biases
    ]


class _Windows:
    """The windows of a text: which ones a step trains on, and those that none does."""

    def __init__(self, ids: torch.Tensor, settings: Settings, seed: int) -> None:
        length = settings.length
        total = ids.numel() // length
        held_out = min(HELD_OUT_WINDOWS, max(1, total // 8))
        # One window less: each round through the text begins at another token.
        self.count = total - held_out - 1
        if self.count < settings.batch:
            needed = (settings.batch + HELD_OUT_WINDOWS + 1) * length
            raise PassError(
                f"the healing text has {ids.numel()} tokens, too few for steps of {settings.batch} windows of "
                f"{length} tokens; give a text of {needed} tokens or more, or a smaller heal_batch or heal_length"
            )
        self.held_out = ids[-held_out * length :].view(held_out, length)
        self._ids, self._settings, self._seed = ids, settings, seed

    def of_step(self, step: int) -> torch.Tensor:
        """Return the windows of a step, shape (batch, length)."""
        batch, length = self._settings.batch, self._settings.length
        chosen = []
        for place in range(step * batch, (step + 1) * batch):
            order, offset = self._round(place // self.count)
            start = offset + length * int(order[place % self.count])
            chosen.append(self._ids[start : start + length])
        return torch.stack(chosen)

    def _round(self, number: int) -> tuple[torch.Tensor, int]:
        generator = torch.Generator().manual_seed(1_000_003 * self._seed + number)
        offset = int(torch.randint(self._settings.length, (), generator=generator)) if number else 0
        return torch.randperm(self.count, generator=generator), offset


@dataclass
class _Run:
    student: PreTrainedModel
    teacher: PreTrainedModel
    windows: _Windows
    settings: Settings
    optimizer: torch.optim.Optimizer
    trained: Sequence[torch.nn.Parameter]
    dtype: torch.dtype
    state: _State
    updating: bool = False

    def __post_init__(self) -> None:
        if not self.state.curve:
            self.measure()

    def ended(self) -> str:
        """Say why there is nothing left to do; an empty string where there is."""
        limit = self.settings.limit_seconds
        if self.state.step >= self.settings.steps:
            return "tokens"
        return "time limit" if limit is not None and self.state.seconds >= limit else ""

    def step(self) -> None:
        """Train on one batch."""
        started = time.perf_counter()
        settings, state = self.settings, self.state
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * self._rate()
        parts = torch.split(self.windows.of_step(state.step), settings.micro_batch)
        loss = 0.0
        for part in parts:
            divergence, distance = self._losses(part)
            total = (divergence + settings.hidden_weight * distance) * (len(part) / settings.batch)
            total.backward()  # type: ignore[no-untyped-call]
            loss += float(total.detach())
        if not math.isfinite(loss):
            raise self._diverged(f"the loss became {loss}")
        torch.nn.utils.clip_grad_norm_(self.trained, CLIP_NORM)
        self.updating = True
        self.optimizer.step()
        state.step += 1
        self.updating = False
        self.optimizer.zero_grad(set_to_none=True)
        state.seconds += time.perf_counter() - started
        state.recent.append(loss)
        state.smoothed = loss if state.smoothed is None else SMOOTHING * state.smoothed + (1 - SMOOTHING) * loss
        if len(state.first) < SETTLED_STEPS:
            state.first.append(loss)
        elif state.smoothed > DIVERGED * sum(state.first) / len(state.first):
            before = sum(state.first) / len(state.first)
            raise self._diverged(f"the loss rose from {before:.3g} to {state.smoothed:.3g}")
        if state.step % max(1, settings.steps // CURVE_POINTS) == 0 and state.step < settings.steps:
            self.measure()

    def _diverged(self, what: str) -> PassError:
        return PassError(
            f"healing diverged in step {self.state.step + 1}: {what}; give a smaller learning_rate "
            f"(it was {self.settings.learning_rate:g})"
        )

    def _rate(self) -> float:
        """Return the learning rate as a share of the highest: a rise, then a cosine down to ``LEAST_RATE``."""
        settings, state = self.settings, self.state
        done = state.step / settings.steps
        if settings.limit_seconds:
            done = max(done, min(1.0, state.seconds / settings.limit_seconds))
        if state.step < WARM_UP * settings.steps:
            return (state.step + 1) / math.ceil(WARM_UP * settings.steps)
        return LEAST_RATE + (1 - LEAST_RATE) * (1 + math.cos(math.pi * done)) / 2

    def _losses(self, windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the KL divergence (nats a token) and the distance of hidden states, of windows (B, T)."""
        given: dict[str, Any] = {
            "input_ids": windows.to(self.student.device),
            "use_cache": False,
            "output_hidden_states": True,
        }
        with torch.no_grad():
            wanted = self.teacher(**given)
        mixed = self.dtype in (torch.bfloat16, torch.float16)
        with torch.autocast(self.student.device.type, torch.bfloat16, enabled=mixed):
            found = self.student(**given)
        divergence = F.kl_div(
            found.logits.float().log_softmax(-1).flatten(0, 1),
            wanted.logits.float().log_softmax(-1).flatten(0, 1),
            reduction="batchmean",
            log_target=True,
        )
        # The first token's states are thousands of times larger than others' (massive activations): left out.
        pairs = zip(wanted.hidden_states[1:], found.hidden_states[1:], strict=True)
        shares = [
            (mine[:, 1:].float() - target[:, 1:].float()).square().sum()
            / target[:, 1:].float().square().sum().clamp_min(1e-20)
            for target, mine in pairs
        ]
        return divergence, torch.stack(shares).mean()

    @torch.no_grad()
    def measure(self) -> None:
        """Add a point to the curve."""
        state = self.state
        parts = torch.split(self.windows.held_out, self.settings.micro_batch)
        total = sum(float(self._losses(part)[0]) * len(part) for part in parts)
        recent, state.recent = state.recent, []
        point = CurvePoint(
            tokens=state.step * self.settings.batch * self.settings.length,
            seconds=state.seconds,
            loss=sum(recent) / len(recent) if recent else None,
            held_out_kl=total / len(self.windows.held_out),
        )
        state.curve.append(asdict(point))


@contextlib.contextmanager
def _training(model: PreTrainedModel, names: Sequence[str], settings: Settings) -> Iterator[None]:
    """Make a model's parameters float32 and those of ``names`` trainable, inside the context."""
    wanted = set(names)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.float()
    layers = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in wanted)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        # Layers look at this flag of their own alone; modules inside them stay in evaluation mode, without dropout.
        layers = [layer for layer in model.modules() if getattr(layer, "gradient_checkpointing", False)]
        for layer in layers:
            layer.training = True
    try:
        yield
    finally:
        if settings.gradient_checkpointing:
            model.gradient_checkpointing_disable()
            for layer in layers:
                layer.training = False
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name])
            parameter.grad = None


def _save(path: Path, state: _State, trained: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Replace the saved state as a whole."""
    from safetensors.torch import save_file

    tensors = {}
    for name, parameter in trained.items():
        tensors[f"weight.{name}"] = parameter.detach().cpu().contiguous()
        for moment in ("exp_avg", "exp_avg_sq"):
            if parameter in optimizer.state:
                tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment].cpu().contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.partial")
    try:
        save_file(tensors, temporary, metadata={"effcli": json.dumps({"format": FORMAT, **asdict(state)})})
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _restore(
    path: Path, state: _State, trained: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer
) -> bool:
    """Take up a saved state where there is one; say whether there was."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return False
    try:
        with safe_open(path, framework="pt") as opened:
            said = json.loads((opened.metadata() or {})["effcli"])
            if said.pop("format") != FORMAT:
                raise ValueError("another format")
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
        for name, value in said.items():
            setattr(state, name, value)
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(tensors[f"weight.{name}"])
                if state.step:
                    optimizer.state[parameter] = {
                        "step": torch.tensor(float(state.step)),
                        **{key: tensors[f"{key}.{name}"].to(parameter.device) for key in ("exp_avg", "exp_avg_sq")},
                    }
    except (SafetensorError, json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise PassError(
            f"the saved state of healing '{path}' is damaged ({error}); remove it to start again"
        ) from error
    return True
