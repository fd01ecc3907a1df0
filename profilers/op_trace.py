"""Trace a forward op by op: FLOPs, bytes moved (weights, KV, activations apart) and, if asked, time.

::

    forward ──> OpTracer.run_op ──┬─> composite op: decompose, come back for its parts
                                  ├─> view: free
                                  └─> anything else: run it, count it once, book it under
                                        the op  (name, shapes, class)
                                        the modules it ran in (inclusive)

Counting rules and their reasons: ``docs/profilers/intensity.md``. On the meta device nothing is computed and no
T x T tensor is formed for fused attention. When the block ends, the model and ``transformers`` are as they were.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from profilers.attention_pairs import causal_pairs, sliding_window, upper_left_causal_pairs, visible_pairs
from profilers.cache_watch import held_by, watch_caches
from profilers.flop_formulas import attention_flops
from profilers.meta import meta_compatible
from profilers.op_rules import OpRule, footprint, selected_bytes, tensors_in
from profilers.storages import address_of, weak_storage

ROOT = "(model)"
CACHE_UPDATE = "cache update"

_INDEX_PUT_VALUES = 2  # position of the values among the arguments of index_put_


@dataclass(slots=True)
class Cost:
    """What a group of op calls did.

    ``flops`` counts fused attention as a dense rectangle of queries x keys, ``flops_needed`` only the pairs that the
    mask lets through. ``cache_copy_bytes`` is traffic of the cache class beyond reading and writing the new entries;
    it is not in ``bytes``.
    """

    calls: int = 0
    flops: int = 0
    flops_needed: int = 0
    weight_bytes: int = 0
    activation_bytes: int = 0
    kv_bytes: int = 0
    cache_copy_bytes: int = 0

    @property
    def bytes(self) -> int:
        """Bytes moved: weights, activations and KV together."""
        return self.weight_bytes + self.activation_bytes + self.kv_bytes

    def add(self, other: Cost) -> None:
        """Add ``other`` to this."""
        self.calls += other.calls
        self.flops += other.flops
        self.flops_needed += other.flops_needed
        self.weight_bytes += other.weight_bytes
        self.activation_bytes += other.activation_bytes
        self.kv_bytes += other.kv_bytes
        self.cache_copy_bytes += other.cache_copy_bytes


@dataclass(frozen=True, slots=True)
class OpGroup:
    """Calls that are alike: the same op on the same shapes, each with the same cost."""

    name: str  # with the operands' shapes where there are FLOPs
    op_class: str
    flops: int  # of one call
    bytes: int  # of one call


@dataclass(frozen=True)
class Trace:
    """One traced block.

    Attributes
    ----------
    total : Cost
    modules : dict of str to Cost
        By module name (``model.layers.0.mlp``), inclusive of what is inside; ``"(model)"`` is the whole block.
    kinds : dict of str to str
        Class name of each module in ``modules``.
    ops : dict of OpGroup to Cost
        They add up to ``total``.
    timeline : tuple of (OpGroup, float)
        Every call in order with its time in seconds; empty unless timed.
    experts : tuple of (int, float)
        For each grouped matrix product: experts there are, and experts used (expected, on meta).
    recurrent : bool
        Whether there is a recurrent state (SSM, linear attention).
    uncounted : tuple of str
        Ops that may do arithmetic for which there is no formula.
    notes : tuple of str
    """

    total: Cost
    modules: dict[str, Cost]
    kinds: dict[str, str]
    ops: dict[OpGroup, Cost]
    timeline: tuple[tuple[OpGroup, float], ...]
    experts: tuple[tuple[int, float], ...]
    recurrent: bool
    uncounted: tuple[str, ...]
    notes: tuple[str, ...]


class _Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Hands every op to the tracer; entered again while a composite op is taken apart."""

    def __init__(self, tracer: OpTracer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tracer = tracer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._tracer.run_op(self, func, args, kwargs or {})


class OpTracer:
    """Context manager that counts every op run inside it; :meth:`result` gives the :class:`Trace`.

    The forward must run under ``torch.inference_mode()``, where fused attention arrives as one op.

    Parameters
    ----------
    model : torch.nn.Module
        Its parameters and buffers are the weights, its submodules the rows of the table.
    cache : object or None
        A cache that exists already (before a decode step): its tensors count as KV. One that is made inside the block
        is noticed by itself.
    timed : bool
        Time each op on the model's device. Times hold the cost of launching the op.
    """

    def __init__(self, model: torch.nn.Module, cache: Any = None, *, timed: bool = False) -> None:
        self._names = {id(module): name for name, module in model.named_modules() if name}
        self._weights = {address_of(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self._kv: dict[int, StorageWeakRef] = {}
        for tensor in held_by(cache):
            self._hold_as_kv(tensor)
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        self._clock = OpClock(device) if timed and device.type != "meta" else None
        self._frames: list[_Frame] = [_Frame(model, None)]
        self._modules: dict[str, Cost] = {}
        self._kinds: dict[str, str] = {ROOT: type(model).__name__}
        self._ops: dict[OpGroup, Cost] = {}
        self._rules: dict[Any, OpRule] = {}
        self._update: Cost | None = None  # set while the cache's own code runs
        self._update_seconds: list[Callable[[], float]] = []
        self._pending: list[tuple[OpGroup, Callable[[], float]]] = []
        self._experts: list[tuple[int, float]] = []
        self._pairs: dict[tuple[Any, ...], tuple[StorageWeakRef, int]] = {}
        self._recurrent = any(
            state is not None
            for layer in getattr(cache, "layers", ())
            for state in getattr(layer, "recurrent_states", {}).values()
        )
        self._uncounted: dict[str, None] = {}
        self._notes: dict[str, None] = {}
        if cache is not None and not self._kv:
            self._notes[
                f"{type(cache).__name__} holds no tensors that are known: its traffic counts as activations"
            ] = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> OpTracer:
        with contextlib.ExitStack() as stack:
            handles = (
                register_module_forward_pre_hook(self._enter_module),
                register_module_forward_hook(self._leave_module),
            )
            for handle in handles:
                stack.callback(handle.remove)
            stack.enter_context(watch_caches(self.run_update))
            stack.enter_context(meta_compatible())
            stack.enter_context(_Mode(self))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def result(self) -> Trace:
        """Return what was counted. Call it after the block."""
        if self._clock is not None:
            self._clock.finish()
        total = self._frames[0].cost
        return Trace(
            total=total,
            modules={ROOT: total} | self._modules,
            kinds=self._kinds,
            ops=self._ops,
            timeline=tuple((group, elapsed()) for group, elapsed in self._pending),
            experts=tuple(self._experts),
            recurrent=self._recurrent,
            uncounted=tuple(self._uncounted),
            notes=tuple(self._notes),
        )

    # -- modules ------------------------------------------------------------------------------------------------------

    def _enter_module(self, module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        if id(module) in self._names:
            rows = args[0].numel() // args[0].shape[-1] if args and _is_matrix(args[0]) else None
            self._frames.append(_Frame(module, rows))

    def _leave_module(self, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        name = self._names.get(id(module))
        if name is None:
            return
        frame = self._frames.pop()
        self._frames[-1].cost.add(frame.cost)
        if name not in self._modules:
            self._modules[name] = Cost()
            self._kinds[name] = type(module).__name__
        self._modules[name].add(frame.cost)

    # -- caches -------------------------------------------------------------------------------------------------------

    def _hold_as_kv(self, tensor: torch.Tensor) -> None:
        # A weak reference keeps the address from being given to another storage while the data itself is freed.
        self._kv[address_of(tensor)] = weak_storage(tensor)

    def run_update(self, cache: Any, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a cache's update: reading and writing the new entries counts, what else it moves is kept apart."""
        if self._update is not None:  # a cache that hands on to another
            return method(cache, *args, **kwargs)
        self._recurrent |= method.__name__ == "update_recurrent_state"
        inside = Cost()
        self._update, self._update_seconds = inside, []
        try:
            output = method(cache, *args, **kwargs)
        finally:
            self._update = None
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        index = kwargs.get("layer_idx", next((value for value in args if isinstance(value, int)), None))
        for tensor in held_by(cache.layers[index] if isinstance(index, int) else cache):
            self._hold_as_kv(tensor)
        addresses = {address_of(tensor) for tensor in given}
        for tensor in output if isinstance(output, tuple) else (output,):
            if isinstance(tensor, torch.Tensor) and address_of(tensor) not in addresses:
                self._hold_as_kv(tensor)
        new = sum(footprint(tensor) for tensor in given)
        cost = Cost(
            calls=1,
            flops=inside.flops,
            flops_needed=inside.flops_needed,
            activation_bytes=new,
            kv_bytes=new,
            cache_copy_bytes=max(0, inside.bytes - 2 * new),
        )
        elapsed = self._update_seconds
        self._book(OpGroup(CACHE_UPDATE, "cache", cost.flops, cost.bytes), cost, lambda: sum(e() for e in elapsed))
        return output

    # -- ops ----------------------------------------------------------------------------------------------------------

    def run_op(self, mode: _Mode, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one op and count it, or take it apart and let its parts come back."""
        rule = self._rules.get(func)
        if rule is None:
            rule = self._rules[func] = OpRule(func)
        if rule.composite:
            with mode:
                return func.decompose(*args, **kwargs)
        if rule.free:
            return func(*args, **kwargs)
        if rule.name == "linear" and args[0].dim() > 2 and args[1].requires_grad:
            func = _folded_linear
        if rule.name == "scaled_dot_product_attention" and args[0].device.type == "meta":
            out, elapsed = _attention_shape(args[0], args[2]), None
        elif self._clock is None:
            out, elapsed = func(*args, **kwargs), None
        else:
            out, elapsed = self._clock.run(func, args, kwargs)
        self._count(rule, args, kwargs, out, elapsed)
        return out

    def _count(self, rule: OpRule, args: Any, kwargs: Any, out: Any, elapsed: Callable[[], float] | None) -> None:
        cost = Cost(calls=1)
        name = rule.name
        if rule.formula is not None:
            cost.flops = cost.flops_needed = rule.formula(args, kwargs, out)
            name = f"{name} [{', '.join(_shape(tensor) for tensor in _operands(args))}]"
            if rule.name == "scaled_dot_product_attention":
                cost.flops_needed = self._needed(args, kwargs)
        elif rule.op_class == "softmax" and hasattr(self._frames[-1].module, "is_causal"):
            self._notes["flops_needed: attention in pieces (eager), counted as executed"] = None
        elif rule.op_class == "other":
            self._uncounted[rule.name] = None
        for tensor, moved in self._traffic(rule, args, kwargs, out):
            address = address_of(tensor)
            if address in self._kv:
                cost.kv_bytes += moved
            elif address in self._weights:
                cost.weight_bytes += moved
            else:
                cost.activation_bytes += moved
        if self._update is not None:
            self._update.add(cost)
            if elapsed is not None:
                self._update_seconds.append(elapsed)
            return
        self._book(OpGroup(name, rule.op_class, cost.flops, cost.bytes), cost, elapsed)

    def _book(self, group: OpGroup, cost: Cost, elapsed: Callable[[], float] | None) -> None:
        self._frames[-1].cost.add(cost)
        known = self._ops.get(group)
        if known is None:
            self._ops[group] = known = Cost()
        known.add(cost)
        if elapsed is not None and self._clock is not None:
            self._pending.append((group, elapsed))

    def _traffic(self, rule: OpRule, args: Any, kwargs: Any, out: Any) -> Iterator[tuple[torch.Tensor, int]]:
        """Yield each tensor that the op touches and the bytes it moves there."""
        if rule.row_write is not None:
            yield from _row_writes(rule.row_write, args, kwargs)
            return
        outputs = list(tensors_in(out if isinstance(out, (tuple, list)) else (out,)))
        written = [args[p] if p < len(args) else kwargs.get(name) for p, name in rule.written]
        changed = {id(tensor) for tensor in tensors_in(written)}
        counted: set[tuple[int, int, int]] = set()
        for position, tensor in enumerate(tensors_in((*args, *kwargs.values())) if rule.reads else ()):
            if id(tensor) in changed:
                continue
            size = footprint(tensor)
            if position == 0 and rule.gathers:
                size = sum(footprint(output) for output in outputs)  # the rows read, not the table
            elif position == 1 and rule.grouped:
                size = self._grouped_weight_bytes(tensor, size, args, kwargs)
            place = (address_of(tensor), int(tensor.storage_offset()), size)
            if place not in counted:  # the same data under two names is read once
                counted.add(place)
                yield tensor, size
        for tensor in tensors_in(written):
            yield tensor, footprint(tensor) * (2 if rule.reads_written else 1)
        for tensor in outputs:
            if id(tensor) not in changed:
                yield tensor, footprint(tensor)

    def _grouped_weight_bytes(self, weight: torch.Tensor, size: int, args: Any, kwargs: Any) -> int:
        offsets = kwargs.get("offs", next((a for a in args[2:] if _is_offsets(a)), None))
        if weight.dim() != 3 or offsets is None:
            return size
        experts = int(weight.shape[0])
        if offsets.device.type == "meta":
            used = self._expected_experts(experts, int(args[0].shape[0]))
        else:
            ends = offsets.tolist()
            used = float(sum(end > start for start, end in zip([0, *ends[:-1]], ends, strict=True)))
        self._experts.append((experts, used))
        return round(size * used / experts)

    def _expected_experts(self, experts: int, rows: int) -> float:
        """Experts that at least one of n tokens chooses, each choosing k of E uniformly: E (1 - (1 - k/E)^n)."""
        tokens = self._frames[-1].rows
        if tokens is None or rows % tokens:
            self._notes["experts used: taken as independent uniform draws, the number of tokens being unknown"] = None
            return experts * (1 - (1 - 1 / experts) ** rows)
        return experts * (1 - (1 - (rows // tokens) / experts) ** tokens)

    # -- attention masks ----------------------------------------------------------------------------------------------

    def _needed(self, args: Any, kwargs: Any) -> int:
        """FLOPs of fused attention over the pairs that its mask lets through."""
        query, key, value = args[:3]
        mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
        is_causal = args[5] if len(args) > 5 else kwargs.get("is_causal", False)
        queries, keys = int(query.shape[-2]), int(key.shape[-2])
        dense = queries * keys
        if is_causal:
            pairs: float = upper_left_causal_pairs(queries, keys)
        elif mask is None:
            pairs = dense
        elif mask.device.type == "meta":
            # One row of mask is one token, even where its heads are packed into the queries.
            pairs = dense if mask.shape[-2] == 1 else self._pairs_by_structure(queries, keys)
        else:
            pairs = self._pairs_by_value(mask) / max(1, mask.numel()) * dense
        return round(attention_flops(query, key, value) * pairs / dense)

    def _pairs_by_value(self, mask: torch.Tensor) -> int:
        """Count what a mask lets through; layers share a mask, so each is counted once."""
        place = (address_of(mask), mask.storage_offset(), tuple(mask.shape), mask.stride())
        if place not in self._pairs:
            self._pairs[place] = (weak_storage(mask), visible_pairs(mask))
        return self._pairs[place][1]

    def _pairs_by_structure(self, queries: int, keys: int) -> int:
        """Pairs that the attention module now running lets through, from what it says about itself."""
        if queries == 1:
            return keys  # a growing cache holds only what the newest token may see
        module = next((frame.module for frame in reversed(self._frames) if hasattr(frame.module, "is_causal")), None)
        window = None if module is None else sliding_window(module)
        if module is None or window is NotImplemented or (window is not None and not module.is_causal):
            self._notes["flops_needed: a mask without values and of unknown structure, counted as executed"] = None
            return queries * keys
        return causal_pairs(queries, keys, window) if module.is_causal else queries * keys


def _row_writes(rule: tuple[int, bool], args: Any, kwargs: Any) -> Iterator[tuple[torch.Tensor, int]]:
    """Traffic of an op that changes some rows of its first argument: indices, new values, and the rows themselves."""
    position, adds = rule
    target, indices = args[0], args[1:position]
    values = args[position] if len(args) > position else kwargs.get("value")
    adds = adds or (position == _INDEX_PUT_VALUES and (True in args[3:4] or kwargs.get("accumulate", False)))
    for index in tensors_in(indices):
        yield index, footprint(index)
    if isinstance(values, torch.Tensor):
        yield values, footprint(values)
        size = values.numel() * target.element_size()
    else:  # one number, at every place of the index
        size = sum(index.numel() for index in tensors_in(indices)) * target.element_size()
    if position == _INDEX_PUT_VALUES:  # the values may be broadcast over the rows
        size = max(size, selected_bytes(target, args[1]))
    yield target, size * (2 if adds else 1)


@dataclass(slots=True)
class _Frame:
    """A module being run: what it cost so far, and how many rows its first argument has."""

    module: torch.nn.Module
    rows: int | None
    cost: Cost = field(default_factory=Cost)


class OpClock:
    """Times one op at a time; on CUDA with events, read when all is done so that the device is not held up."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cuda = device.type == "cuda"

    def run(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, Callable[[], float]]:
        """Call ``func``; return what it returns, and a function that gives its seconds after :meth:`finish`."""
        if self._cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            out = func(*args, **kwargs)
            end.record()
            return out, lambda: start.elapsed_time(end) / 1e3
        begun = time.perf_counter()
        out = func(*args, **kwargs)
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        seconds = time.perf_counter() - begun
        return out, lambda: seconds

    def finish(self) -> None:
        """Wait for what was timed."""
        if self._cuda:
            torch.cuda.synchronize(self._device)


def _folded_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Run a linear layer as one matrix product over all rows, as torch does for a weight that requires gradients.

    Below a dispatch mode torch does not see that it does, and for some strides copies the weight instead.
    """
    rows = x.reshape(-1, x.shape[-1])
    out = rows.mm(weight.t()) if bias is None else torch.addmm(bias, rows, weight.t())
    return out.view(*x.shape[:-1], weight.shape[0])


def _attention_shape(query: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Output of fused attention on meta, laid out (batch, T, heads, d) as the CPU and CUDA kernels lay theirs out."""
    *batch, heads, queries, _ = query.shape
    return query.new_empty(*batch, queries, heads, value.shape[-1]).transpose(-2, -3)


def _operands(args: Iterable[Any]) -> list[torch.Tensor]:
    return [value for value in args if isinstance(value, torch.Tensor)][:3]


def _shape(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape))


def _is_matrix(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() >= 2 and value.shape[-1] > 0


def _is_offsets(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() == 1 and value.dtype in (torch.int32, torch.int64)
