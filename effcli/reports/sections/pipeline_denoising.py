"""What a sampling step costs: the parts of a run, and one call of the denoiser on the roofline."""

from __future__ import annotations

from effcli import formatting as fmt
from effcli.formatting import printable
from effcli.reports.blocks import Block, Chart, Facts, Report, Section, Table, columns, items, ratio, texts, unique
from effcli.reports.changes import mapping, number
from effcli.reports.sections.generic import named

TITLE = "What a step costs"


def denoising(report: Report) -> Report:
    """Return :class:`profilers.denoising.DenoisingResult` as data, empty where there is none."""
    return mapping(report.get("denoising"))


def median_run(found: Report) -> float | None:
    """Return the median time of a run in seconds."""
    return number(mapping(found.get("run_seconds")).get("p50"))


def denoiser_name(report: Report) -> str:
    """Return what the pipeline calls its denoiser."""
    return printable(mapping(report.get("pipeline")).get("denoiser") or "denoiser")


def sentences(report: Report) -> list[str]:
    """Say where the time of a run goes and what bounds it, the most important first; nothing where it is not known."""
    found = denoising(report)
    run, share = median_run(found), number(found.get("denoiser_share"))
    if run is None or share is None:
        return []
    steps = number(found.get("steps"))
    of_steps = f"{fmt.integer(steps)}-step " if steps is not None else ""
    batch = number(report.get("batch"))
    each = f" of {fmt.integer(batch)} samples at once" if batch is not None and batch > 1 else ""
    first = f"A {of_steps}run{each} takes {fmt.seconds(run)}; the {denoiser_name(report)} is {fmt.percent(share)} of it"
    cost = mapping(found.get("cost"))
    bound, reached = cost.get("bound"), number(cost.get("attained_fraction"))
    if bound and reached is not None:
        first += f", {printable(bound)}-bound at {fmt.percent(reached)} of what the roofline allows"
    told = [f"{first}."]
    blocks = ratio(number(found.get("blocks_seconds")), run)
    if blocks is not None:
        told.append(f"Reuse can skip its blocks, {fmt.percent(blocks)} of a run.")
    return told


def section(report: Report) -> Section:
    """Build the section."""
    found = denoising(report)
    if not found:
        return Section("denoising", TITLE, ("The report holds no times of a run in full.",), ())
    blocks: list[Block] = [_parts(found, report), Chart("denoiser-roofline")]
    if mapping(found.get("cost")):
        blocks.append(_call(found))
    return Section("denoising", TITLE, texts(found, "warnings"), tuple(blocks))


def _parts(found: Report, report: Report) -> Table:
    run, denoiser = median_run(found), number(found.get("denoiser_seconds"))
    inside = number(found.get("blocks_seconds"))
    calls = fmt.integer(number(found.get("denoiser_calls")))
    rows = [(denoiser_name(report), calls, denoiser)]
    if inside is not None and denoiser is not None:
        rows += [("– its blocks", calls, inside), ("– embedders and heads", calls, denoiser - inside)]
    for entry in items(found, "components"):
        data = mapping(entry)
        method = data.get("method")
        name = named(data.get("name")) + (f", {printable(method)}" if method and method != "forward" else "")
        rows.append((name, fmt.integer(number(data.get("calls"))), number(data.get("seconds"))))
    rows += [("scheduler, loops, the rest", "", number(found.get("other_seconds"))), ("whole run", "", run)]
    made = tuple((name, count, fmt.seconds(seconds), fmt.percent(ratio(seconds, run))) for name, count, seconds in rows)
    step = number(found.get("step_seconds"))
    notes = [
        f"A step of the denoiser takes {fmt.seconds(step)}." if step is not None else None,
        "Medians over whole runs with every step in full.",
    ]
    return Table("Where the time of a run goes", columns("<part", "calls", "time", "of the run"), made, unique(notes))


def _call(found: Report) -> Facts:
    cost, calls = mapping(found.get("cost")), mapping(found.get("call_seconds"))

    def of(key: str) -> float | None:
        return number(cost.get(key))

    p90 = number(calls.get("p90"))
    peak = number(found.get("peak_memory_bytes"))
    pairs = [
        ("time", fmt.seconds(of("seconds")) + (f", p90 {fmt.seconds(p90)}" if p90 is not None else "")),
        ("work", f"{fmt.flops(of('flops'))}, at {fmt.flop_rate(of('flops_per_second'))}"),
        (
            "bytes moved",
            f"{fmt.data_size(of('bytes'))} (weights {fmt.data_size(of('weight_bytes'))}, activations "
            f"{fmt.data_size(of('activation_bytes'))}), at {fmt.bandwidth(of('bytes_per_second'))}",
        ),
        ("FLOP/byte", f"{fmt.significant(of('flops_per_byte'))}{_ridge(of('ridge_flops_per_byte'))}"),
        ("bound by", printable(cost.get("bound") or fmt.MISSING)),
        ("roofline time", f"{fmt.seconds(of('attainable_seconds'))}, {fmt.percent(of('attained_fraction'))} of roof"),
        ("dtype", named(cost.get("dtype"))),
        ("peak memory", fmt.data_size(peak)),
    ]
    uncounted = texts(cost, "uncounted_ops")
    reason = found.get("peak_memory_reason")
    notes = [
        f"Arithmetic without a FLOP formula, not counted: {', '.join(uncounted)}." if uncounted else None,
        f"No peak memory: {printable(reason)}." if peak is None and reason else None,
        *texts(cost, "notes"),
    ]
    shown = tuple((name, value) for name, value in pairs if fmt.MISSING not in value)
    return Facts("One call of the denoiser", shown, unique(notes))


def _ridge(value: float | None) -> str:
    return f"; compute takes over from memory at {fmt.short(value)}" if value is not None else ""
