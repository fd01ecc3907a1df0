"""What schedules do to time and pictures, and how they compare with other ways to skip steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from effcli import formatting as fmt
from effcli.formatting import printable
from effcli.reports.blocks import Block, Chart, Report, Section, Table, columns, unique
from effcli.reports.changes import mapping, number
from effcli.reports.pipeline_reading import (
    ErrorMap,
    Result,
    Row,
    frames,
    interval_text,
    mean_text,
    mode_of,
    other_passes,
    ranges,
    results,
    reuse_text,
    rows,
    spread,
    whole,
)
from effcli.reports.sections.change import times

LIKENESS_NOTE = (
    "Against the same prompts (or classes) and seeds with every step in full; none of them was calibrated on. Latent "
    "L1 is the mean absolute difference of the final latents. Intervals are 95 %, over samples."
)
CLEAR_GAIN_DB = 1.0
"""Minimax and the shortest sum that differ by less are called about the same."""
FASTEST_NOTE = (
    "at most: all denoiser calls over full calls, what the denoiser would gain if a skipped step cost nothing."
)


def gain_text(gain: float | None) -> str:
    """Say a speed-up in words: ``2.61× as fast``, ``slower: 0.95×``."""
    if gain is None:
        return fmt.MISSING
    return f"{times(gain)} as fast" if gain > 1 else f"slower: {times(gain)}"


def section(report: Report, errors: ErrorMap | None) -> Section:
    """Show each schedule before and after."""
    found = results(report)
    if not found:
        return Section("schedules", "Before and after", ("The report holds no measured schedule.",), ())
    lead = [
        f"{result.name}: steps {ranges(result.full) or fmt.MISSING} run in full{_reuse(result)}." for result in found
    ]
    return Section(
        "schedules", "Before and after", tuple(lead), (_times(report, found), _likeness(report, found, errors))
    )


def _reuse(result: Result) -> str:
    between = reuse_text(result.reuse, result.mode)
    origin = f" ({result.origin})" if result.origin else ""
    what = "the blocks" if result.mode == "residual" else "the denoiser"
    return f"; between them {between} stands for {what}{origin}"


def _times(report: Report, found: Sequence[Result]) -> Table:
    made = []
    for result in found:
        for part, label, most in (("run", "whole run", None), ("denoiser", "denoiser", result.allowed)):
            gain = result.gain(part)
            made.append(
                (
                    result.name,
                    result.of_steps,
                    label,
                    fmt.seconds(number(result.data.get(f"{part}_seconds_before"))),
                    fmt.seconds(number(result.data.get(f"{part}_seconds_after"))),
                    gain_text(gain),
                    fmt.MISSING if most is None else times(most),
                )
            )
    heads = columns("<schedule", "in full", "<what", "before", "after", "<gain", "at most")
    others = ", ".join(other_passes(report))
    notes = (
        "whole run: from prompt to picture, median. denoiser: its part of it.",
        FASTEST_NOTE,
        f"after has what {others} did as well, which at most leaves out." if others else None,
    )
    return Table("Time", heads, tuple(made), unique(notes))


def _likeness(report: Report, found: Sequence[Result], errors: ErrorMap | None) -> Table:
    likenesses = [mapping(result.data.get("likeness")) for result in found]
    perceptual = any(spread(likeness.get("lpips")) for likeness in likenesses)
    made = []
    for result, likeness in zip(found, likenesses, strict=True):
        worst = errors.worst(result.full) if errors is not None and errors.steps == result.steps else None
        psnr = spread(likeness.get("psnr_db"))
        made.append(
            (
                result.name,
                fmt.integer(whole(likeness.get("samples"))),
                fmt.significant(psnr.mean if psnr is not None else None),
                interval_text(psnr),
                mean_text(likeness.get("ssim")),
                *((mean_text(likeness.get("lpips")),) if perceptual else ()),
                mean_text(likeness.get("latent_l1")),
                *((fmt.significant(worst),) if errors is not None else ()),
            )
        )
    heads = columns(
        *("<schedule", "samples", "PSNR, dB", "interval", "SSIM"),
        *(["LPIPS"] if perceptual else []),
        "latent L1",
        *(["worst segment"] if errors is not None else []),
    )
    notes = [
        LIKENESS_NOTE,
        f"What {', '.join(other_passes(report))} did is part of the difference." if other_passes(report) else None,
        f"Figures of a video are over all of its {frames(report)} frames." if frames(report) else None,
        _worst_note(errors, found) if errors is not None else None,
        *same_notes(likenesses),
        *lpips_notes(likenesses),
    ]
    return Table("Likeness to all steps", heads, tuple(made), unique(notes))


def _worst_note(errors: ErrorMap, found: Sequence[Result]) -> str:
    note = "worst segment: the largest error on the schedule's path through the error map"
    if any(result.reuse != errors.reuse for result in found):
        note += f", which was measured with {reuse_text(errors.reuse, found[0].mode)}"
    return f"{note}."


def same_notes(likenesses: Sequence[Report]) -> list[str]:
    """Say that a PSNR is absent because nothing differs, where that is so."""
    same = any(
        likeness and spread(likeness.get("psnr_db")) is None and _no_difference(likeness) for likeness in likenesses
    )
    return ["PSNR —: every picture is the same to the bit."] if same else []


def _no_difference(likeness: Report) -> bool:
    found = spread(likeness.get("latent_l1"))
    return found is not None and found.mean == 0


def lpips_notes(likenesses: Sequence[Report]) -> list[str]:
    """Return why there is no LPIPS, each reason once."""
    return [
        f"No LPIPS: {printable(likeness['lpips_reason']).rstrip('.')}."
        for likeness in likenesses
        if likeness.get("lpips_reason") and spread(likeness.get("lpips")) is None
    ]


def comparison_section(report: Report, errors: ErrorMap | None) -> Section:
    """Show every way to skip steps at each budget, side by side."""
    found = rows(report)
    title = "Against other ways to skip steps"
    if not found:
        return Section("comparison", title, ("Nothing else was run beside it.",), ())
    budgets = list(dict.fromkeys(row.budget for row in found))
    lead = ["Each way gets the same number of full denoiser calls, as far as it can be set, and the same samples."]
    if any(row.method in ("uniform", "greedy", "shortest-sum") for row in found):
        reused = reuse_text("last", mode_of(report))
        lead.append(f"Uniform spacing, greedy threshold and shortest sum reuse {reused}.")
    told = set(lpips_notes([mapping(result.data.get("likeness")) for result in results(report)]))
    blocks: list[Block] = []
    for budget in budgets:
        at = [row for row in found if row.budget == budget]
        missing = [note for note in lpips_notes([row.likeness for row in at]) if note not in told]
        blocks.append(_at(report, at, errors, missing))
        told.update(missing)
    if len(budgets) > 1:
        blocks.append(Chart("psnr"))
    return Section("comparison", title, tuple(lead), tuple(blocks))


def _at(report: Report, found: Sequence[Row], errors: ErrorMap | None, missing: Sequence[str]) -> Table:
    perceptual = any(spread(row.likeness.get("lpips")) for row in found)
    timed = any(row.run_seconds is not None for row in found)
    made = tuple(
        (
            f"{row.label} (chosen)" if row.chosen else row.label,
            fmt.short(row.full_calls) if row.full_calls is not None else fmt.MISSING,
            fmt.significant(row.psnr.mean if row.psnr is not None else None),
            interval_text(row.psnr),
            mean_text(row.likeness.get("ssim")),
            *((mean_text(row.likeness.get("lpips")),) if perceptual else ()),
            mean_text(row.likeness.get("latent_l1")),
            *((fmt.seconds(row.run_seconds),) if timed else ()),
        )
        for row in found
    )
    heads = columns(
        *("<way", "full", "PSNR, dB", "interval", "SSIM"),
        *(["LPIPS"] if perceptual else []),
        "lat. L1",
        *(["run"] if timed else []),
    )
    steps = whole(report.get("steps"))
    of = f" of {steps}" if steps is not None else ""
    notes = [
        *(f"{row.label}: {row.reason.rstrip('.')}." for row in found if row.reason),
        "full: cost of one run in full steps, mean over samples; a block that runs at a skipped step counts.",
        _minimax_note({row.method: row for row in found}, errors) if errors is not None else None,
        *same_notes([row.likeness for row in found]),
        *missing,
    ]
    return Table(f"{found[0].budget}{of} steps in full", heads, made, unique(notes))


def _minimax_note(by_method: Mapping[str, Row], errors: ErrorMap) -> str | None:
    """Say what the minimax path gains over the shortest sum, and what their segments' errors are."""
    ours, theirs = by_method.get("lemica"), by_method.get("shortest-sum")
    if ours is None or theirs is None or not ours.full or not theirs.full or ours.psnr is None or theirs.psnr is None:
        return None
    if ours.full == theirs.full:
        return "LeMiCa's minimax and the shortest sum choose the same steps here."
    mine, other = errors.segments(ours.full), errors.segments(theirs.full)
    if mine is None or other is None:
        return None
    gain = ours.psnr.mean - theirs.psnr.mean
    note = (
        f"LeMiCa's minimax against the shortest sum: {gain:+.1f} dB; worst segment {fmt.significant(max(mine))} "
        f"against {fmt.significant(max(other))}, all segments {fmt.significant(sum(mine))} against "
        f"{fmt.significant(sum(other))}."
    )
    if abs(gain) > CLEAR_GAIN_DB:
        return note
    return f"{note} What it saves in the worst segment it spends on the others, and here that comes to about the same."
