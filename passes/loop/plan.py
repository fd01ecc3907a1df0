"""Predict what looping does on a device, from shapes and the measured profile. See ``docs/passes/loop.md``.

Looping cuts what is stored. It does not by itself cut what a step moves: a shared block is read once for each of its
loops, and the layers' own low-rank parts come on top, as bytes, FLOPs and small kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from passes.base import Figures, ModelProfile, PassError, Prediction
from passes.loop import grouping
from passes.loop.layout import LoopPlan, Sizes
from passes.loop.parameters import LoopParameters
from passes.loop.targets import Structure

if TYPE_CHECKING:
    from profilers.peaks import Peaks

SLOWER_ABOVE = 1.03
"""TPOT after / before from which decode is said to become slower; less is within what a timing varies by."""
EFFICIENCY = 0.5
"""Share of the measured matrix-product peak that forward passes reach."""
FIT_EFFICIENCY = 0.1
"""Share of the float32 peak that float64 eigenvectors and solutions of linear equations reach."""
UNPACK_BYTES, UNPACK_OPS = 80, 8
"""Of a sparse part: bytes of memory traffic that unpacking an entry of the linear takes as long as, from timings on a
CPU core (5 ns an entry); ops of a linear."""
SMALL_OPS = 3
"""Further ops of a linear with a low-rank part: two products and a sum."""
EIGEN_FLOPS = 9
"""FLOPs of the eigenvectors of a symmetric n x n matrix, over n³."""
FLOAT64_MATRICES = 8
"""As large as the widest second moments, that fitting one linear holds."""
PROCESS_BYTES = 700_000_000
"""Of the Python process on a CPU with PyTorch and transformers imported, without a model."""
STEP_FLOPS = 8
"""FLOPs of healing on a token, over the parameters: 2 for the original, 6 forth and back through the looped model."""
STATE_BYTES = 16
"""Of a parameter while it is trained: itself, its gradient and AdamW's two moments in float32."""
LOOPS = (2, 3, 5)
"""Loops that notes compare, where they divide the layers."""


@dataclass(frozen=True)
class Costs:
    """What the layers' own low-rank parts add to a decode step and a prefill.

    Attributes
    ----------
    delta_bytes : int
        Read once a step.
    decode_seconds, prefill_seconds : float or None
    """

    delta_bytes: int
    decode_seconds: float
    prefill_seconds: float | None


def predict(parameters: LoopParameters, profile: ModelProfile, structure: Structure) -> Prediction:
    """Predict bytes, times and memory after the pass, and what the pass itself needs.

    Parameters
    ----------
    parameters : LoopParameters
    profile : ModelProfile
        Its model is on the meta device. Without measured times the predicted ones are None and a note says so.
    structure : Structure

    Raises
    ------
    PassError
        If no plan of this model is as the parameters ask.
    """
    plan = expected(parameters, structure)
    sizes, notes = plan.sizes(structure), []
    if not parameters.is_complete:
        notes.append(f"neither blocks and loops nor a target is given: figures are those of {_named(plan)}")
    elif parameters.chosen_pattern == "free":
        notes.append(
            "which neighbours share is chosen by measured damage when the pass runs; sizes are those of a choice that "
            "just meets the target"
        )
    notes += [_line(item, structure, profile) for item in compared(parameters, structure, plan)]
    costs = _costs(sizes, plan, profile)
    figures = profile.figures
    weight_bytes = sizes.bytes_after
    if figures.weight_bytes is not None:
        weight_bytes = figures.weight_bytes - sizes.bytes_before + sizes.bytes_after
    tpot = None if figures.tpot_seconds is None else figures.tpot_seconds + costs.decode_seconds
    ttft = None
    if figures.ttft_seconds is not None and costs.prefill_seconds is not None:
        ttft = figures.ttft_seconds + costs.prefill_seconds
    if figures.tpot_seconds is None:
        notes.append("the profile holds no measured times, so none are predicted; profile the model with its weights")
    else:
        notes.append(
            "decode: a shared block is read again in each of its loops, so a step moves what it moved and "
            f"{costs.delta_bytes / 1e6:.3g} MB of the layers' own parts, {1e3 * costs.decode_seconds:+.3g} ms with "
            "their small ops and what unpacks sparse ones; less is moved only where a block stays in a cache between "
            "its loops: "
            f"{_cached(plan, structure, profile)}"
        )
    peak = figures.peak_memory_bytes
    if peak is not None:
        peak += sizes.bytes_after - sizes.bytes_before
        notes.append("peak memory: the measured one with the weights replaced")
    seconds, memory = _cost(parameters, profile, structure, plan, notes)
    fits = _fits(profile, memory)
    slower = None if tpot is None or not figures.tpot_seconds else tpot > SLOWER_ABOVE * figures.tpot_seconds
    return Prediction(
        figures=Figures(
            weight_bytes=weight_bytes,
            kv_bytes_per_token=figures.kv_bytes_per_token,
            ttft_seconds=ttft,
            tpot_seconds=tpot,
            peak_memory_bytes=peak,
        ),
        bits_per_parameter=8 * sizes.bytes_after / sizes.parameters_before,
        pass_seconds=seconds,
        pass_memory_bytes=memory,
        fits=fits,
        slower=slower,
        notes=tuple(notes),
    )


def expected(parameters: LoopParameters, structure: Structure) -> LoopPlan:
    """Return the plan that the parameters lead to, as far as it is known before any damage is measured.

    With ``pattern=free`` as many neighbours share, from the middle outwards, as the target needs.

    Raises
    ------
    PassError
    """
    grouping.check(parameters, structure)
    if parameters.blocks is not None or (parameters.target is not None and parameters.chosen_pattern != "free"):
        return LoopPlan.even(
            structure, grouping.regular(parameters, structure), parameters.even_rank, parameters.density
        )
    if parameters.target is None:
        layers = grouping.looped_layers(parameters, structure)
        regular = [_regular(parameters, structure, layers, loops) for loops in grouping.divisors(len(layers))]
        first = next((plan for plan in regular if plan is not None), None)
        if first is not None:
            return first
        parameters = parameters.model_copy(update={"target": 1 - 1e-9})
    middle = (structure.layers - 1) / 2

    def guess(group: tuple[int, ...], rank: int) -> float:
        """Return a damage as if all differences were alike and had flat spectra, a little less in the middle."""
        side = min(min(shape.out_features, shape.in_features) for shape in structure.linears[group[0]].values())
        left = max(0.0, 1 - len(group) / (len(group) - 1) * rank / side)
        return left * (len(group) - 1) * (1.0 + sum(abs(index - middle) for index in group) / structure.layers**2)

    chosen = grouping.free(parameters, structure, guess)
    return LoopPlan.even(structure, [option.layers for option in chosen], [option.rank for option in chosen])


def compared(parameters: LoopParameters, structure: Structure, chosen: LoopPlan) -> list[LoopPlan]:
    """Return the plans that notes compare: the chosen one, and SEQUENCE with some loops."""
    layers = grouping.looped_layers(parameters, structure)
    plans = [chosen]
    for loops in grouping.divisors(len(layers)):
        if loops in LOOPS:
            plan = _regular(parameters, structure, layers, loops)
            if plan is not None and plan not in plans:
                plans.append(plan)
    return plans


def _regular(parameters: LoopParameters, structure: Structure, layers: range, loops: int) -> LoopPlan | None:
    pattern = "cycle" if parameters.pattern == "cycle" else "sequence"
    groups = grouping.arrange(layers, len(layers) // loops, pattern)
    if not grouping.can_share(structure, groups):
        return None
    return LoopPlan.even(structure, groups, parameters.even_rank, parameters.density)


def _named(plan: LoopPlan) -> str:
    loops = sorted({len(block.layers) for block in plan.blocks})
    ranks = {rank for block in plan.blocks for ranks in block.ranks.values() for rank in ranks}
    named = f"blocks={len(plan.blocks)},loops={'/'.join(map(str, loops))},rank={max(ranks, default=0)}"
    entries = sum(sum(counts) for block in plan.blocks for counts in block.sparse.values())
    return f"{named},{entries:,} sparse entries" if entries else named


def _line(plan: LoopPlan, structure: Structure, profile: ModelProfile) -> str:
    """Return one line on a plan: parameters, bytes, FLOPs for each byte stored, decode time."""
    sizes = plan.sizes(structure)
    flops = 2 * sizes.parameters_before + sizes.delta_flops_per_token
    before = 2 * sizes.parameters_before / sizes.bytes_before
    costs = _costs(sizes, plan, profile)
    measured = profile.figures.tpot_seconds
    decode = "" if measured is None else f", decode {1e3 * (measured + costs.decode_seconds):.3g} ms a token predicted"
    return (
        f"{_named(plan)}: {sizes.parameters_after / 1e6:.4g} M parameters ({sizes.share:.1%} of all, "
        f"{sizes.layers_share:.1%} of the layers'), {sizes.bytes_after / 1e6:.4g} MB stored, "
        f"{flops / sizes.bytes_after:.3g} FLOP a token for each byte stored (was {before:.3g}){decode}"
    )


def _costs(sizes: Sizes, plan: LoopPlan, profile: ModelProfile) -> Costs:
    """Return what low-rank parts add, from the measured peaks."""
    peaks = profile.peaks
    delta_bytes = sizes.delta_parameters * profile.dtype.itemsize + sizes.mask_bytes
    linears = sum(sum(rank > 0 for rank in ranks) for block in plan.blocks for ranks in block.ranks.values())
    unpacked = sum(one > 0 for block in plan.blocks for counts in block.sparse.values() for one in counts)
    unpacking = (
        UNPACK_BYTES * sizes.unpacked_entries / peaks.memory_bytes_per_second
        + UNPACK_OPS * unpacked * peaks.op_overhead_seconds
    )
    decode = delta_bytes / peaks.memory_bytes_per_second + SMALL_OPS * linears * peaks.op_overhead_seconds + unpacking
    rate = _rate(peaks, str(profile.dtype).removeprefix("torch."))
    tokens = profile.batch * profile.context
    prefill = None if rate is None else sizes.delta_flops_per_token * tokens / (EFFICIENCY * rate) + unpacking
    return Costs(delta_bytes, decode, prefill)


def _cached(plan: LoopPlan, structure: Structure, profile: ModelProfile) -> str:
    """Say how a block compares with the device's last cache, where neighbouring layers share."""
    sizes = [
        sum(shape.parameters * profile.dtype.itemsize for shape in structure.linears[block.layers[0]].values())
        for block in plan.blocks
    ]
    if not sizes:
        return "there is none"
    neighbours = all(b - a == 1 for block in plan.blocks for a, b in zip(block.layers, block.layers[1:], strict=False))
    where = "its loops follow one another" if neighbours else "other layers run between its loops"
    return f"a block is {max(sizes) / 1e6:.3g} MB, and {where}; not predicted"


def _rate(peaks: Peaks, dtype: str) -> float | None:
    return peaks.flops_per_second.get(dtype)


def _cost(
    parameters: LoopParameters, profile: ModelProfile, structure: Structure, plan: LoopPlan, notes: list[str]
) -> tuple[float | None, int]:
    """Return seconds and bytes that the pass takes."""
    from passes.loop import importance, statistics

    tokens = parameters.samples * parameters.length if parameters.is_fitted else 0
    backward = min(tokens, importance.TOKENS) if parameters.uses_importance else 0
    runs = tokens + 3 * backward
    groups = 0
    if parameters.chosen_pattern == "free":
        groups = len(grouping.candidates(parameters, structure))
        runs += (1 + groups) * min(parameters.damage_samples, parameters.samples) * parameters.length
    moments = sum(
        2.0 * tokens * shape.in_features**2
        for block in plan.blocks
        for index in block.layers
        for shape in structure.linears[index].values()
    )
    rounds = 1 + (parameters.allocation == "auto") * 2
    rounds += parameters.rounds if parameters.init == "least-squares" and parameters.rank != 0 else 0
    if parameters.density:
        rounds = 1 if parameters.even_rank else 0
    fits = sum(
        rounds * (EIGEN_FLOPS * min(s.out_features, s.in_features) ** 3 + 2.0 * s.out_features * s.in_features**2)
        for block in plan.blocks
        for index in block.layers
        for s in structure.linears[index].values()
    )
    rate, single = _rate(profile.peaks, str(profile.dtype).removeprefix("torch.")), _rate(profile.peaks, "float32")
    seconds = None
    if rate is not None and single is not None:
        forward = 2.0 * structure.parameters * runs / (EFFICIENCY * rate)
        seconds = forward + moments / (EFFICIENCY * single) + fits / (FIT_EFFICIENCY * single)
        damage = f", {groups} groups tied in turn" if groups else ""
        notes.append(
            f"pass time: {runs:,} tokens run{damage}, second moments of {tokens:,} tokens, and fitting at "
            f"{FIT_EFFICIENCY:.0%} of the measured float32 peak"
        )
    if seconds is not None and rate is not None and parameters.heal_tokens:
        healing = STEP_FLOPS * structure.parameters * parameters.heal_tokens / (EFFICIENCY * rate)
        if parameters.heal_minutes is not None:
            healing = min(healing, 60 * parameters.heal_minutes)
        seconds += healing
        notes.append(
            f"healing: {parameters.heal_tokens:,} tokens, about {healing / 60:.3g} minutes; what it will win back is "
            "not predicted"
        )
    held = sum(statistics.moment_bytes(structure, index) for index in plan.shared_layers)
    sizes = plan.sizes(structure)
    weights = profile.figures.weight_bytes or sizes.bytes_before
    fitted = 4 * (sizes.layers_after if plan.blocks else 0)
    widest = max((shape.in_features for item in structure.linears for shape in item.values()), default=0)
    solving = FLOAT64_MATRICES * 8 * widest**2
    memory = weights + held + fitted + solving
    if parameters.heal_tokens:  # the original beside the looped model, which is trained
        memory = max(memory, weights + STATE_BYTES * (sizes.bytes_after // profile.dtype.itemsize))
    if profile.device.type == "cpu":
        memory += PROCESS_BYTES
    notes.append(
        f"pass memory: the weights, {held / 1e6:.3g} MB of second moments at most (fewer at a time where memory is "
        f"short), {fitted / 1e6:.3g} MB of fitted weights in float32, {solving / 1e6:.3g} MB to solve for one linear"
    )
    return seconds, memory


def _fits(profile: ModelProfile, memory: int) -> bool:
    from profilers.device import memory_available_bytes

    return memory <= memory_available_bytes(profile.device)


__all__ = ["Costs", "PassError", "compared", "expected", "predict"]
