"""Puts a driver into a live pipeline, and takes it out again without a trace.

::

    denoiser.forward ── _DenoiserHook ── driver.denoise(step, branch, call)
                                             │ call.full            │ call.reuse(residual)
        embedders ── block 0 ── … ── block n ── heads     embedders ── + residual ── heads
                     (hooks: record what enters           (hooks: blocks are identities,
                      the first, leaves the last)          the last one adds the residual)
    scheduler.set_timesteps, .step ── count the steps

The residual is what left the last block minus what would have entered it, were all blocks identities. Between most
stacks' blocks there is nothing else, and that is what entered the first block. Where there is (Latte turns its tokens
between space and time, and adds a position embedding on the way), one more forward of identities finds it; the first
call that is kept tells which.

No decision depends on the content of a tensor, so nothing waits for the device.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import is_compiled_module, unwrap_module

from passes.base import PassError
from passes.lemica import targets
from passes.lemica.driving import Call, Driver, Residual, output_tensor, with_tensor
from passes.lemica.schedule import Mode, Schedule

_DENOISER_HOOK = "effcli_lemica_denoiser"
_BLOCK_HOOK = "effcli_lemica_block"

# What the blocks do in a forward of the denoiser.
_RUN, _RECORD, _IDENTITY, _PROBE = range(4)

_States = tuple[torch.Tensor, torch.Tensor | None]
"""Hidden states and text states (where the block returns them)."""


_Function = TypeVar("_Function", bound=Callable[..., Any])


def _untraced(function: _Function) -> _Function:
    """Keep torch.compile out of our own frames, and let it into what they call."""
    kept_out: _Function = torch.compiler.disable(  # type: ignore[no-untyped-call]
        function,
        recursive=False,
        reason="a cache schedule decides what runs; with fullgraph=True, compile by transformer.compile(), or first",
    )
    return kept_out


def attach(pipeline: Any, driver: Driver, *, mode: Literal["auto", "residual", "output"] = "auto") -> Attached:
    """Let a driver answer the calls of a pipeline's denoiser until :meth:`Attached.remove`.

    Parameters
    ----------
    pipeline : diffusers.DiffusionPipeline
    driver : Driver
    mode : {"auto", "residual", "output"}
        See :func:`passes.lemica.targets.find`.

    Raises
    ------
    PassError
        If the pipeline cannot be driven, is driven already, or has one of diffusers' own caches enabled.
    """
    target = targets.find(pipeline, mode)
    if isinstance(pipeline.scheduler.__dict__.get("step"), _Watched):
        raise PassError(f"this {type(pipeline).__name__} follows a driver already; remove() that one first")
    for name in target.denoisers:
        if getattr(targets.denoiser(pipeline, name), "is_cache_enabled", False):
            raise PassError(f"a cache of diffusers is enabled on the pipeline's {name}; call disable_cache() first")
    return Attached(pipeline, driver, target)


class Attached:
    """A driver in a pipeline; a context manager that takes it out.

    Attributes
    ----------
    target : passes.lemica.targets.Target
        What is driven.
    driver : Driver
    """

    def __init__(self, pipeline: Any, driver: Driver, target: targets.Target) -> None:
        self.driver = driver
        self.target = target
        self._undo: list[Callable[[], None]] = []
        try:
            self._put_in(pipeline, _Run(driver, pipeline))
        except BaseException:
            self.remove()
            raise

    def _put_in(self, pipeline: Any, run: _Run) -> None:
        self._undo.append(_watch_scheduler(pipeline.scheduler, run))
        for name, blocks in zip(self.target.denoisers, self.target.blocks, strict=True):
            stack = _Stack(name)
            denoiser = targets.denoiser(pipeline, name)
            for block_name in blocks:
                block = denoiser.get_submodule(block_name)
                hook: _Hook = _BlockHook(stack, type(unwrap_module(block)))
                self._undo.append(_Placement(block, hook, _BLOCK_HOOK).remove)
            hook = _DenoiserHook(run, stack, denoiser, self.target.mode)
            self._undo.append(_Placement(getattr(pipeline, name), hook, _DENOISER_HOOK).remove)

    def remove(self) -> None:
        """Take the driver out: the pipeline is as it was. May be called again."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


class Follower:
    """The driver that follows a schedule.

    Parameters
    ----------
    schedule : Schedule
    combine : callable, optional
        ``combine(step, branch, residuals)`` returns what stands for the blocks at a skipped step; ``residuals`` are
        those of the last full steps, newest first, at most ``history``. Default: as ``schedule.reuse`` says.
    history : int
        Full steps whose residuals ``combine`` is given.

    Attributes
    ----------
    calls, full_calls : int
        Calls of the denoiser, and those that ran in full, in the current or last run. Each guidance branch that is a
        call of its own counts.
    """

    def __init__(
        self,
        schedule: Schedule,
        combine: Callable[[int, int, tuple[Residual, ...]], Residual] | None = None,
        history: int = 2,
    ) -> None:
        if combine is None and schedule.reuse == "fitted":
            raise PassError(f"schedule '{schedule.name}' reuses by fitted coefficients, and none were given")
        if combine is None and schedule.reuse == "linear":
            combine = Linear(schedule)
        self.schedule = schedule
        self.calls = 0
        self.full_calls = 0
        self._combine = combine
        self._flags = schedule.flags
        self._history = 1 if combine is None else history
        self._sources = _sources(schedule, self._history)
        needed = {source for step, full in enumerate(self._flags) if not full for source in self._sources[step]}
        self._keep = tuple(step in needed for step in range(schedule.steps))
        self._kept: dict[int, tuple[tuple[int, Residual], ...]] = {}

    def begin(self, steps: int) -> None:
        """Hear that a run starts.

        Raises
        ------
        PassError
            If it has another number of steps than the schedule.
        """
        schedule = self.schedule
        if steps != schedule.steps:
            raise PassError(
                f"this run has {steps} time steps, and schedule '{schedule.name}' is for {schedule.steps}; call the "
                f"pipeline so that its scheduler sets {schedule.steps}, or calibrate a schedule for {steps}"
            )
        self.calls = self.full_calls = 0
        self._kept.clear()

    @_untraced
    def denoise(self, step: int, branch: int, call: Call) -> Any:
        """Run a full step's call, reuse at the others; a call that no residual fits runs in full."""
        self.calls += 1
        kept = self._kept.get(branch, ())
        if not self._flags[step] and kept and kept[0][0] >= self._sources[step][0] and call.fits(kept[0][1]):
            if self._combine is None:
                return call.reuse(kept[0][1])
            return call.reuse(self._combine(step, branch, tuple(residual for _, residual in kept)))
        self.full_calls += 1
        output, residual = call.full(keep=self._keep[step] or not self._flags[step])
        if residual is not None:
            # Of what was kept, only what the schedule's last full steps left goes with it, and only if it fits.
            older = kept[: self._history - 1]
            followed = older and older[0][0] in self._sources[step] and call.fits(older[0][1])
            self._kept[branch] = ((step, residual), *(older if followed else ()))
        return output

    def stepped(self, step: int, sample: torch.Tensor) -> None:
        """Hear that a step is done; after the last one, let go of the residuals."""
        if step == self.schedule.steps - 1:
            self._kept.clear()


class Linear:
    """The line through the residuals of the last two full steps, drawn on to the skipped step.

    R_i + (s − i) / (i − i′) · (R_i − R_i′), with i the last full step before s and i′ the one before it; R_i where
    there is no i′.
    """

    def __init__(self, schedule: Schedule) -> None:
        self._slopes = tuple(
            (step - found[0]) / (found[0] - found[1]) if len(found) == 2 else 0.0
            for step, found in enumerate(_sources(schedule, 2))
        )

    def __call__(self, step: int, branch: int, residuals: tuple[Residual, ...]) -> Residual:
        """Return the residual for a skipped step; ``residuals`` are those at i and, where there is one, i′."""
        newest = residuals[0]
        if len(residuals) == 1:
            return newest
        older, slope = residuals[1], self._slopes[step]
        hidden = torch.add(newest.hidden, newest.hidden - older.hidden, alpha=slope)
        if newest.context is None or older.context is None:
            return Residual(hidden)
        return Residual(hidden, torch.add(newest.context, newest.context - older.context, alpha=slope))


def _sources(schedule: Schedule, count: int) -> tuple[tuple[int, ...], ...]:
    """Return each step's last ``count`` full steps before it, newest first."""
    found: list[tuple[int, ...]] = []
    last: tuple[int, ...] = ()
    for step, full in enumerate(schedule.flags):
        found.append(last)
        if full:
            last = (step, *last)[:count]
    return tuple(found)


# --- one run of the pipeline -----------------------------------------------------------------------------------------


class _Run:
    """Where a run of the pipeline is."""

    def __init__(self, driver: Driver, pipeline: Any) -> None:
        self.driver = driver
        self.pipeline = type(pipeline).__name__
        self.scheduler = pipeline.scheduler
        self.steps: int | None = None
        self.step = 0
        self.branch = 0

    def begin(self, steps: int) -> None:
        self.steps, self.step, self.branch = steps, 0, 0
        self.driver.begin(steps)

    @_untraced
    def denoise(self, call: Call) -> Any:
        if self.steps is None:
            raise PassError(
                f"the denoiser was called before the {type(self.scheduler).__name__} that {self.pipeline} had when "
                "attached set its time steps; if the scheduler was replaced, remove() and attach again"
            )
        if self.step >= self.steps:
            raise PassError(f"the denoiser was called after the last of {self.steps} steps; call the pipeline instead")
        if self.step == 0 and getattr(self.scheduler, "begin_index", None):
            raise PassError(
                f"this run starts at time step {self.scheduler.begin_index} of {self.steps} (from an image, say); a "
                "schedule counts from the first: remove() it, or run all steps (strength=1)"
            )
        branch = self.branch
        self.branch += 1
        return self.driver.denoise(self.step, branch, call)

    def stepped(self, result: Any) -> None:
        step = self.step
        self.step, self.branch = step + 1, 0
        self.driver.stepped(step, output_tensor(result))


def _watch_scheduler(scheduler: Any, run: _Run) -> Callable[[], None]:
    """Count the steps of a scheduler; return what undoes it."""
    # Instance attributes that were there before are put back; methods of the class come back by themselves.
    before = {name: scheduler.__dict__[name] for name in ("set_timesteps", "step") if name in scheduler.__dict__}
    scheduler.set_timesteps = _Watched(scheduler.set_timesteps, lambda _: run.begin(len(scheduler.timesteps)))
    scheduler.step = _Watched(scheduler.step, run.stepped)

    def undo() -> None:
        for name in ("set_timesteps", "step"):
            del scheduler.__dict__[name]
        scheduler.__dict__.update(before)

    return undo


class _Watched:
    """A method that tells somebody what it returned; pipelines see the method's signature."""

    def __init__(self, method: Callable[..., Any], tell: Callable[[Any], None]) -> None:
        functools.update_wrapper(self, method)
        self._method = method
        self._tell = tell

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self._method(*args, **kwargs)
        self._tell(result)
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # A copy of the scheduler (for a second stream, say) must step itself, unwatched.
        owner = getattr(self._method, "__self__", None)
        copied = memo.get(id(owner))
        return self._method if copied is None else types.MethodType(self._method.__func__, copied)  # type: ignore[attr-defined]


# --- one denoiser ----------------------------------------------------------------------------------------------------


class _Stack:
    """What the hooks of one denoiser's blocks share."""

    def __init__(self, denoiser: str) -> None:
        self.denoiser = denoiser
        self.mode = _RUN
        # Of the forward under way: what entered the first block; what left the last one, or entered it (identities).
        self.entered: _States | None = None
        self.left: _States | None = None
        # What the last block adds when blocks are identities.
        self.hidden: torch.Tensor | None = None
        self.context: torch.Tensor | None = None
        # Found by probes: the block that is called last; by the shapes of the denoiser's inputs, the flow of states.
        self.last: _BlockHook | None = None
        self.flows: dict[tuple[Any, ...], _Flow] = {}

    def clear(self) -> None:
        self.mode = _RUN
        self.entered = self.left = self.hidden = self.context = None


@dataclass(frozen=True)
class _Recorded(Residual):
    """A residual that knows whose it is: another denoiser of the same pipeline must not reuse it."""

    denoiser: str = ""


@dataclass
class _WholeOutput(BaseOutput):  # type: ignore[misc]
    """A denoiser's output that was not computed."""

    sample: Any = None


class _StackCall:
    """A call of a denoiser whose block stack is cached."""

    def __init__(
        self,
        stack: _Stack,
        forward: Callable[..., Any],
        eager: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        self._stack = stack
        self._forward = forward
        self._eager = eager
        self._args = args
        self._kwargs = kwargs

    @_untraced
    def full(self, *, keep: bool) -> tuple[Any, Residual | None]:
        """See :meth:`passes.lemica.driving.Call.full`."""
        stack = self._stack
        # A compiled forward records always: that is one graph instead of two, and it copies nothing.
        output = self._through(_RECORD if keep or self._forward is not self._eager else _RUN)
        if not keep:
            stack.clear()
            return output, None
        entered, left = _present(stack.entered), _present(stack.left)
        stack.clear()
        flow = stack.flows.get(_shapes(self._args, self._kwargs))
        if flow is None or not flow.plain:
            # A forward may return memory that the next one overwrites (graphs of CUDA).
            output = with_tensor(output, output_tensor(output).clone())
            left = (left[0].clone(), None if left[1] is None else left[1].clone())
            entered = self._probe() if flow is None else self._identities()
        context = None if left[1] is None or entered[1] is None else left[1] - entered[1]
        return output, _Recorded(left[0] - entered[0], context, stack.denoiser)

    @_untraced
    def reuse(self, residual: Residual) -> Any:
        """See :meth:`passes.lemica.driving.Call.reuse`."""
        stack = self._stack
        if stack.last is None:
            self._probe()
        stack.hidden, stack.context = residual.hidden, residual.context
        try:
            return self._through(_IDENTITY)
        finally:
            stack.clear()

    def fits(self, residual: Residual) -> bool:
        """See :meth:`passes.lemica.driving.Call.fits`."""
        stack = self._stack
        if isinstance(residual, _Recorded) and residual.denoiser != stack.denoiser:
            return False
        key = _shapes(self._args, self._kwargs)
        if key not in stack.flows:
            self._probe()
        flow = stack.flows[key]
        return residual.hidden.shape == flow.hidden and (
            residual.context is None or residual.context.shape == flow.context
        )

    @_untraced
    def _through(self, mode: int) -> Any:
        stack = self._stack
        stack.mode = mode
        # There is nothing to gain from compiling what runs once.
        forward = self._eager if mode == _PROBE else self._forward
        try:
            return forward(*self._args, **self._kwargs)
        except BaseException:
            stack.clear()
            raise
        finally:
            stack.mode = _RUN

    @_untraced
    def _identities(self) -> _States:
        """Return what enters the last block when blocks are identities."""
        self._through(_IDENTITY)
        entered = _present(self._stack.left)
        self._stack.clear()
        return entered

    @_untraced
    def _probe(self) -> _States:
        """Find the block that is called last and how states flow to it; return what enters it."""
        stack = self._stack
        self._through(_PROBE)
        entered, left = _present(stack.entered), _present(stack.left)
        stack.clear()
        stack.flows[_shapes(self._args, self._kwargs)] = _Flow(
            plain=_equal(entered[0], left[0]) and _equal(entered[1], left[1]),
            hidden=left[0].shape,
            context=None if left[1] is None else left[1].shape,
        )
        return left


class _OutputCall:
    """A call of a denoiser whose whole output is cached."""

    def __init__(
        self,
        denoiser: str,
        forward: Callable[..., Any],
        signature: inspect.Signature,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        self._denoiser = denoiser
        self._forward = forward
        self._signature = signature
        self._args = args
        self._kwargs = kwargs

    @_untraced
    def full(self, *, keep: bool) -> tuple[Any, Residual | None]:
        """See :meth:`passes.lemica.driving.Call.full`."""
        output = self._forward(*self._args, **self._kwargs)
        return output, _Recorded(output_tensor(output).clone(), None, self._denoiser) if keep else None

    @_untraced
    def reuse(self, residual: Residual) -> Any:
        """See :meth:`passes.lemica.driving.Call.reuse`."""
        tensor = residual.hidden.clone()
        arguments = self._signature.bind(*self._args, **self._kwargs).arguments
        sample = list(tensor.unbind(0)) if isinstance(self._sample(), list) else tensor
        return _WholeOutput(sample=sample) if arguments.get("return_dict", True) else (sample,)

    def fits(self, residual: Residual) -> bool:
        """See :meth:`passes.lemica.driving.Call.fits`."""
        if isinstance(residual, _Recorded) and residual.denoiser != self._denoiser:
            return False
        sample = self._sample()
        shape = (len(sample), *sample[0].shape) if isinstance(sample, list) else tuple(sample.shape)
        kept = tuple(residual.hidden.shape)
        # Channels may differ: some denoisers take a mask as well, or return a variance.
        return len(kept) == len(shape) and kept[:1] + kept[2:] == shape[:1] + shape[2:]

    def _sample(self) -> Any:
        return self._args[0] if self._args else next(iter(self._kwargs.values()))


class _Hook(ModelHook):  # type: ignore[misc]
    """A hook that stands in for a forward, of a module or of what torch.compile made of it."""

    def answer(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the output."""
        raise NotImplementedError

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Stand in for the module's forward, where diffusers calls it: see :func:`_register`."""
        return self.answer(self.fn_ref.original_forward, args, kwargs)


class _DenoiserHook(_Hook):
    """Asks the driver what becomes of a call."""

    def __init__(self, run: _Run, stack: _Stack, module: torch.nn.Module, mode: Mode) -> None:
        super().__init__()
        self._run = run
        self._stack = stack
        self._module = module
        self._signature = inspect.signature(functools.partial(type(module).forward, module))
        self._mode = mode

    # Whoever compiles the denoiser around this hook gets a graph of what is beneath it.
    @_untraced
    def answer(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what the driver returns."""
        if self._mode == "output":
            return self._run.denoise(_OutputCall(self._stack.denoiser, forward, self._signature, args, kwargs))
        compiled = self.fn_ref is None or forward is not self.fn_ref.original_forward
        eager = self._module._call_impl if compiled else forward
        return self._run.denoise(_StackCall(self._stack, forward, eager, args, kwargs))


class _BlockHook(_Hook):
    """Runs a block, records what enters or leaves it, or makes it an identity."""

    def __init__(self, stack: _Stack, kind: type[torch.nn.Module]) -> None:
        super().__init__()
        self._stack = stack
        known = TransformerBlockRegistry.get(kind)
        names = list(inspect.signature(kind.forward).parameters)[1:]
        # Not every block calls its hidden states as the registry says (Z-Image); they come first.
        hidden = known.hidden_states_argument_name
        self._hidden_name = hidden if hidden in names else names[0]
        self._hidden_position = names.index(self._hidden_name)
        self._hidden_index = known.return_hidden_states_index
        self._context_name = known.encoder_hidden_states_argument_name
        self._context_index = known.return_encoder_hidden_states_index
        self._context_position = names.index(self._context_name) if self._context_index is not None else -1
        self._adds = False

    def answer(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what the block returns, or what an identity in its place would."""
        stack = self._stack
        if stack.mode == _RUN:
            return forward(*args, **kwargs)
        states = self._read_arguments(args, kwargs)
        if stack.mode == _RECORD:
            if stack.entered is None:
                stack.entered = states
            output = forward(*args, **kwargs)
            stack.left = self._read_output(output)
            return output
        if stack.mode == _PROBE:
            if stack.entered is None:
                stack.entered = states
            if stack.last is not None:
                stack.last._adds = False
            stack.last = self
            self._adds = True
            stack.left = states
        elif self._adds:
            stack.left = states
            hidden, context = states
            if stack.hidden is not None:
                hidden = hidden + stack.hidden
            if stack.context is not None and context is not None:
                context = context + stack.context
            states = (hidden, context)
        return self._build_output(states)

    def _read_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _States:
        name = self._hidden_name
        hidden = kwargs[name] if name in kwargs else args[self._hidden_position]
        if self._context_index is None:
            return hidden, None
        name = self._context_name
        return hidden, kwargs[name] if name in kwargs else args[self._context_position]

    def _read_output(self, output: Any) -> _States:
        if not isinstance(output, tuple):
            return output, None
        return output[self._hidden_index], None if self._context_index is None else output[self._context_index]

    def _build_output(self, states: _States) -> Any:
        if self._context_index is None:
            return states[0]
        built: list[torch.Tensor | None] = [None, None]
        built[self._hidden_index], built[self._context_index] = states
        return tuple(built)


@dataclass(frozen=True)
class _Flow:
    """How states flow through a stack of identities: unchanged or not, and the shapes that enter the last block."""

    plain: bool
    hidden: torch.Size
    context: torch.Size | None


def _present(states: _States | None) -> _States:
    if states is None:
        raise PassError("no block of the denoiser's stack was called; cache its whole output: mode=output")
    return states


def _equal(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.shape == other.shape and torch.equal(one, other)


def _shapes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Return the shapes of a denoiser's inputs."""
    return tuple(
        item.shape
        if isinstance(item, torch.Tensor)
        else tuple(part.shape for part in item if isinstance(part, torch.Tensor))
        for item in (*args, *kwargs.values())
        if isinstance(item, (torch.Tensor, list, tuple))
    )


# --- hooks on and off ------------------------------------------------------------------------------------------------


class _Placement:
    """A hook in its place: on a module's forward, or around what torch.compile made of the module.

    Outside of the compiled region, the hook breaks no graph and needs no compiling itself.
    """

    def __init__(self, module: torch.nn.Module, hook: _Hook, name: str) -> None:
        self._module = module
        self._hook = hook
        self._name = name
        self._take_off = self._put_on()

    def remove(self) -> None:
        """Take the hook off and leave no trace."""
        self._take_off()

    def _put_on(self) -> Callable[[], None]:
        module, hook = self._module, self._hook
        if is_compiled_module(module):
            return _surround(module, "forward", hook)
        take_off = (
            _register(module, hook, self._name)
            if module._compiled_call_impl is None
            else _surround(module, "_compiled_call_impl", hook)
        )
        # A module that is compiled later loses what is around its call.
        module.compile = self._compile  # type: ignore[method-assign]

        def undo() -> None:
            del module.compile
            take_off()

        return undo

    def _compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the module, then put the hook around the result."""
        self._take_off()
        self._module.compile(*args, **kwargs)
        self._take_off = self._put_on()


def _surround(module: torch.nn.Module, attribute: str, hook: _Hook) -> Callable[[], None]:
    compiled = getattr(module, attribute)

    def answer(*args: Any, **kwargs: Any) -> Any:
        return hook.answer(compiled, args, kwargs)

    setattr(module, attribute, answer)
    return lambda: setattr(module, attribute, compiled)


def _register(module: torch.nn.Module, hook: _Hook, name: str) -> Callable[[], None]:
    had_registry = "_diffusers_hook" in module.__dict__
    had_forward = "forward" in module.__dict__
    with _beneath_accelerate(module):
        HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, name)
        # Straight to the hook: a skipped step passes by every block, and diffusers' way is four frames longer.
        answer, forward = hook.answer, hook.fn_ref.original_forward

        def direct(*args: Any, **kwargs: Any) -> Any:
            return answer(forward, args, kwargs)

        module.forward = functools.update_wrapper(direct, forward)

    def undo() -> None:
        registry: Any = module._diffusers_hook
        with _beneath_accelerate(module):
            registry.remove_hook(name, recurse=False)
        if not had_registry and not registry.hooks:
            del module._diffusers_hook
        own = module.__dict__.get("forward")
        if not had_forward and own == types.MethodType(type(module).forward, module):
            del module.forward

    return undo


@contextmanager
def _beneath_accelerate(module: torch.nn.Module) -> Iterator[None]:
    """Let the forward that accelerate's hook wraps stand for the module's own.

    Accelerate takes its hook off by putting back what it wrapped, and offloading takes it off after every run; a hook
    on top of it would go with it.
    """
    if "_old_forward" not in module.__dict__:
        yield
        return
    outer = module.forward
    module.forward = module._old_forward  # type: ignore[assignment]
    yield
    module._old_forward = module.forward  # type: ignore[assignment]
    module.forward = outer
