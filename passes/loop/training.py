"""Train a model on the windows of a text: schedule, saved state, exact continuation, divergence.

::

    text ──> windows of a step ──> losses(model, windows) ──> gradients of all processes ──> AdamW
                                                                  │
                        state, one safetensors file <── every checkpoint_seconds

What is trained for is the caller's: ``losses`` gives the loss, and a figure for windows that are not trained on.

Which windows a step sees follows from the seed and its number alone, and the state (weights, both moments of AdamW, the
curve) is replaced as a whole: a run that was stopped goes on to the same result. Processes are accelerate's: where it
launched several, each takes its part of a step's windows, and the first one saves.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from passes.base import PassError
from profilers.base import Progress, SilentProgress

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

FORMAT = "effcli.training/1"
BETAS = (0.9, 0.95)
WARM_UP, LEAST_RATE = 0.03, 0.1
"""Share of the tokens over which the learning rate rises; what is left of it at the end, as a share."""
CLIP_NORM = 1.0
HELD_OUT_WINDOWS = 4
CURVE_POINTS = 40
SMOOTHING = 0.9
DIVERGED, SETTLED_STEPS = 2.0, 10
"""Training has diverged if the smoothed loss is this many times that of the first steps, or no number at all."""

Losses = Callable[[Any, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""From a model (to be called as it is given) and windows (B, T) on its device: the loss, and the held-out figure."""


@dataclass(frozen=True)
class Settings:
    """How to train.

    Attributes
    ----------
    tokens : int
        Of text to train on, the same ones again where the text is shorter.
    length, batch : int
        Tokens of a window, windows of a step over all processes.
    micro_batch : int
        Windows that are in memory at once; gradients of a step's are added up.
    learning_rate : float
        The highest.
    weight_decay : float
        Of matrices; vectors have none.
    limit_seconds : float or None
        Of all runs together; the learning rate then falls by the time or the tokens, whichever is further.
    checkpoint_seconds : float
        Between two saved states.
    gradient_checkpointing : bool
        Compute activations again on the way back instead of keeping them.
    mixed : bool
        Compute in bfloat16 on float32 weights.
    """

    tokens: int
    length: int = 512
    batch: int = 8
    micro_batch: int = 2
    learning_rate: float = 3e-4
    weight_decay: float = 0.0
    limit_seconds: float | None = None
    checkpoint_seconds: float = 300.0
    gradient_checkpointing: bool = False
    mixed: bool = False

    @property
    def steps(self) -> int:
        """Of the optimizer, if no time limit ends them earlier."""
        return max(1, self.tokens // (self.batch * self.length))


@dataclass(frozen=True)
class CurvePoint:
    """Where training was after so many tokens.

    Attributes
    ----------
    tokens : int
    seconds : float
    loss : float or None
        Mean of the steps since the last point; None before the first.
    held_out : float
        The figure that ``losses`` gives, on windows that are not trained on.
    """

    tokens: int
    seconds: float
    loss: float | None
    held_out: float


@dataclass
class _State:
    step: int = 0
    seconds: float = 0.0
    recent: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    smoothed: float | None = None
    curve: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Trained:
    """What training did.

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
    processes : int
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
    processes: int
    resumed: bool
    curve: tuple[CurvePoint, ...]


def train(
    model: PreTrainedModel,
    names: Sequence[str],
    ids: torch.Tensor,
    settings: Settings,
    path: Path,
    losses: Losses,
    *,
    what: str = "healing",
    seed: int = 0,
    progress: Progress | None = None,
) -> Trained:
    """Train some parameters of a model in place.

    Parameters
    ----------
    model : PreTrainedModel
        On the device to train on. In float32 while it is trained, and of its own dtype again afterwards.
    names : sequence of str
        Of the parameters to train; the others stay as they are.
    ids : torch.Tensor
        Shape (N,): the text. Its last windows are kept apart for the held-out figure.
    settings : Settings
    path : Path
        Of the safetensors file that the state is saved in, and found again by the next call with the same arguments.
    losses : callable
    what : str
        The work's name in messages, a noun.
    seed : int
    progress : Progress, optional

    Raises
    ------
    PassError
        If the text is too short, a saved state is damaged, or training diverges.
    """
    from accelerate import Accelerator

    shown = progress or SilentProgress()
    accelerator = Accelerator(cpu=model.device.type == "cpu")
    windows = Windows(ids, settings, seed, what)
    if settings.batch % accelerator.num_processes:
        raise PassError(
            f"{settings.batch} windows of a step do not divide among {accelerator.num_processes} processes; give a "
            f"batch that is a multiple of {accelerator.num_processes}"
        )
    dtype, state = model.dtype, _State()
    with _training(model, names, settings):
        parameters = dict(model.named_parameters())
        trained = {name: parameters[name] for name in names}
        optimizer = _optimizer(trained, settings)
        resumed = _restore(path, state, trained, optimizer)
        run = _Run(
            model, accelerator.prepare_model(model, device_placement=False), accelerator, windows, settings, optimizer,
            losses, state, what,
        )  # fmt: skip
        saved = time.monotonic()
        with shown.task(what, total=settings.steps) as task:
            task.advance(state.step)
            try:
                while not (ended := run.ended()):
                    run.step()
                    task.describe(f"{what}, loss {state.smoothed:.3f}")
                    task.advance()
                    if accelerator.is_main_process and time.monotonic() - saved >= settings.checkpoint_seconds:
                        _save(path, state, trained, optimizer)
                        saved = time.monotonic()
            except KeyboardInterrupt:
                if accelerator.is_main_process and not run.updating:  # else some weights are a step ahead of others
                    _save(path, state, trained, optimizer)
                raise
            run.measure()
    model.to(dtype)
    return Trained(
        tokens=state.step * settings.batch * settings.length,
        steps=state.step,
        seconds=state.seconds,
        ended=ended,
        trained_parameters=sum(tensor.numel() for tensor in trained.values()),
        windows=windows.count,
        tokens_of_window=settings.length,
        processes=accelerator.num_processes,
        resumed=resumed,
        curve=tuple(CurvePoint(**point) for point in state.curve),
    )


class Windows:
    """The windows of a text: which ones a step trains on, and those that none does.

    Parameters
    ----------
    ids : torch.Tensor
        Shape (N,).
    settings : Settings
    seed : int
    what : str
        The work's name in messages.

    Raises
    ------
    PassError
        If there are fewer windows than a step takes.
    """

    def __init__(self, ids: torch.Tensor, settings: Settings, seed: int, what: str = "healing") -> None:
        length = settings.length
        total = ids.numel() // length
        held_out = min(HELD_OUT_WINDOWS, max(1, total // 8))
        # One window less: each round through the text begins at another token.
        self.count = total - held_out - 1
        if self.count < settings.batch:
            needed = (settings.batch + HELD_OUT_WINDOWS + 1) * length
            raise PassError(
                f"the text for {what} has {ids.numel()} tokens, too few for steps of {settings.batch} windows of "
                f"{length} tokens; give a text of {needed} tokens or more, or smaller or shorter batches"
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
    model: PreTrainedModel
    called: Any
    """The model, wrapped where gradients of several processes are averaged."""
    accelerator: Accelerator
    windows: Windows
    settings: Settings
    optimizer: torch.optim.Optimizer
    losses: Losses
    state: _State
    what: str
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
        settings, state, accelerator = self.settings, self.state, self.accelerator
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * self._rate()
        own = self.windows.of_step(state.step)[accelerator.process_index :: accelerator.num_processes]
        parts = torch.split(own, settings.micro_batch)
        total = torch.zeros((), device=self.model.device)
        for number, part in enumerate(parts, start=1):
            adding = contextlib.nullcontext() if number == len(parts) else accelerator.no_sync(self.called)
            with adding:
                with self._computing():
                    loss = self.losses(self.called, part.to(self.model.device))[0] * (len(part) / len(own))
                accelerator.backward(loss)
            total += loss.detach()
        mean = float(accelerator.reduce(total, reduction="mean"))
        if not math.isfinite(mean):
            raise self._diverged(f"the loss became {mean}")
        trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        torch.nn.utils.clip_grad_norm_(trained, CLIP_NORM)
        self.updating = True
        self.optimizer.step()
        state.step += 1
        self.updating = False
        self.optimizer.zero_grad(set_to_none=True)
        state.seconds = self._agreed(state.seconds + time.perf_counter() - started)
        self._account(mean)
        if state.step % max(1, settings.steps // CURVE_POINTS) == 0 and state.step < settings.steps:
            self.measure()

    def _account(self, loss: float) -> None:
        """Keep a step's loss, and stop where it rises."""
        state = self.state
        state.recent.append(loss)
        state.smoothed = loss if state.smoothed is None else SMOOTHING * state.smoothed + (1 - SMOOTHING) * loss
        if len(state.first) < SETTLED_STEPS:
            state.first.append(loss)
        elif state.smoothed > DIVERGED * sum(state.first) / len(state.first):
            before = sum(state.first) / len(state.first)
            raise self._diverged(f"the loss rose from {before:.3g} to {state.smoothed:.3g}")

    def _agreed(self, seconds: float) -> float:
        """Return the first process's clock, which decides for all."""
        from accelerate.utils import broadcast

        told = broadcast(torch.tensor(seconds, dtype=torch.float32, device=self.model.device), from_process=0)
        return float(told) if self.accelerator.num_processes > 1 else seconds

    def _diverged(self, what: str) -> PassError:
        return PassError(
            f"{self.what} diverged in step {self.state.step + 1}: {what}; give a smaller learning_rate "
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

    def _computing(self) -> torch.autocast:
        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.settings.mixed)

    @torch.no_grad()
    def measure(self) -> None:
        """Add a point to the curve."""
        state, held_out = self.state, self.windows.held_out
        total = 0.0
        for part in torch.split(held_out, self.settings.micro_batch):
            with self._computing():
                total += float(self.losses(self.model, part.to(self.model.device))[1]) * len(part)
        recent, state.recent = state.recent, []
        point = CurvePoint(
            tokens=state.step * self.settings.batch * self.settings.length,
            seconds=state.seconds,
            loss=sum(recent) / len(recent) if recent else None,
            held_out=total / len(held_out),
        )
        state.curve.append(asdict(point))


def _optimizer(trained: dict[str, torch.nn.Parameter], settings: Settings) -> torch.optim.AdamW:
    """Return AdamW over the trained parameters; matrices alone decay."""
    matrices = [parameter for parameter in trained.values() if parameter.dim() > 1]
    vectors = [parameter for parameter in trained.values() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    given = [group for group in groups if group["params"]]
    # Fused: one pass over weights, gradients and moments; on a CPU an eighth of the time of the default.
    return torch.optim.AdamW(given, lr=settings.learning_rate, betas=BETAS, fused=True)


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
            f"the saved state of training '{path}' is damaged ({error}); remove it to start again"
        ) from error
    return True
