"""The document of ``effcli plan``: what each pass would buy on this device, before any runs."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from functools import partial

from effcli import formatting as fmt
from effcli.formatting import printable
from effcli.reports.blocks import Block, Chart, Code, Report, Section, Table, columns, items, texts, unique
from effcli.reports.change_charts import Bars, grouped_bars
from effcli.reports.changes import mapping, number
from effcli.reports.documents.base import Document, Figure, Tile
from effcli.reports.documents.profile import subtitle
from effcli.reports.sections import setup
from effcli.reports.sections.change import figure, signed_percent, times

LEAST_SPEEDUP = 1.03
"""A predicted speed-up below this is not told apart from none."""
MOST_BARS = 8
COLUMNS = (
    ("weight_bytes", "weights", "bytes"),
    ("kv_bytes_per_token", "KV a token", "bytes"),
    ("ttft_seconds", "first token", "seconds"),
    ("tpot_seconds", "per token", "seconds"),
    ("peak_memory_bytes", "peak memory", "bytes"),
)


@dataclass(frozen=True)
class Choice:
    """One planned pass with the figures that a choice is made by."""

    label: str
    figures: Report
    prediction: Report
    reason: str | None

    @property
    def applies(self) -> bool:
        """Whether there is a prediction."""
        return bool(self.prediction)

    @property
    def fits(self) -> bool:
        """Whether nothing says that the pass does not fit this device."""
        return self.applies and self.prediction.get("fits") is not False


def choices(report: Report) -> list[Choice]:
    """Return the planned passes."""
    return [
        Choice(
            printable(entry.get("label") or entry.get("name") or "a pass"),
            mapping(mapping(entry.get("prediction")).get("figures")),
            mapping(entry.get("prediction")),
            printable(entry["reason"]) if entry.get("reason") else None,
        )
        for entry in items(report, "passes")
        if isinstance(entry, dict)
    ]


def document(report: Report) -> Document:
    """Build the document."""
    found = choices(report)
    model = mapping(report.get("model"))
    sections = [_table_section(report, found)]
    if mapping(report.get("environment")) or model:
        sections += [setup.model(report), setup.environment(report)]
    draw = partial(_bars, report, found)
    return Document(
        command="effcli plan",
        heading="Plan for",
        name=printable(model.get("source") or "a model"),
        subtitle=subtitle(report),
        verdict=tuple(plan_verdict(report)),
        tiles=_tiles(report, found),
        sections=tuple(sections),
        setup=("model", "environment"),
        figures={
            "plan": Figure(
                draw,
                "Predicted, from the measured ceilings of this device; nothing was changed yet.",
                "No bars: the plan holds no predicted figure.",
            )
        },
    )


def _measured(report: Report, key: str) -> float | None:
    return number(mapping(report.get("measured")).get(key))


def _speedup(report: Report, choice: Choice) -> float | None:
    before, after = _measured(report, "tpot_seconds"), number(choice.figures.get("tpot_seconds"))
    return before / after if before and after else None


def best(report: Report, found: list[Choice]) -> Choice | None:
    """Return the choice to try first, of those that fit and are not slower.

    The fastest decode if any gains speed, and the smaller of equally fast ones; else the smallest.
    """
    able = [choice for choice in found if choice.fits and choice.prediction.get("slower") is not True]
    faster = [choice for choice in able if (_speedup(report, choice) or 0.0) >= LEAST_SPEEDUP]

    def size(choice: Choice) -> float:
        weight_bytes = number(choice.figures.get("weight_bytes"))
        return weight_bytes if weight_bytes is not None else float("inf")

    if faster:
        return min(faster, key=lambda choice: (-(_speedup(report, choice) or 0.0), size(choice)))
    return min(able, key=size, default=None)


def plan_verdict(report: Report) -> list[str]:
    """Return the sentences of a plan: the best choice and why, what is slower, what does not fit."""
    found = choices(report)
    if not found:
        return ["The plan holds no pass."]
    sentences = [_headline(report, found)]
    slower = [choice.label for choice in found if choice.prediction.get("slower") is True]
    if slower:
        sentences.append(f"Slower on this device than the model as it is: {_list(slower)}.")
    unfit = [choice.label for choice in found if choice.applies and not choice.fits]
    if unfit:
        sentences.append(f"The pass itself does not fit this device: {_list(unfit)}.")
    unsuited = [choice.label for choice in found if not choice.applies]
    if unsuited:
        sentences.append(f"Does not apply to this model, for reasons below the table: {_list(unsuited)}.")
    return sentences


def _list(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _headline(report: Report, found: list[Choice]) -> str:
    if report.get("alternatives") is False:
        return _chain_headline(report, found)
    chosen = best(report, found)
    if chosen is None:
        able = [choice for choice in found if choice.fits]
        if not able:
            return "None of these passes can run on this device as it is."
        smallest = min(able, key=lambda choice: number(choice.figures.get("weight_bytes")) or float("inf"))
        return (
            f"No pass is predicted to make decode faster on this device: keep the model as it is for speed; "
            f"{smallest.label} makes it smallest ({_size(report, smallest)})."
        )
    speedup = _speedup(report, chosen)
    if speedup is None:
        return f"Try {chosen.label} first: the smallest ({_size(report, chosen)}); decode time is not predicted."
    if speedup < LEAST_SPEEDUP:
        if (number(chosen.figures.get("weight_bytes")) or 0.0) >= (_measured(report, "weight_bytes") or 0.0):
            return "No pass is predicted to gain speed or size on this device: keep the model as it is."
        saved = _size(report, chosen)
        return f"No pass is predicted to gain speed here; {chosen.label} saves most at no cost in time ({saved})."
    return (
        f"Try {chosen.label} first: decode {times(speedup)} as fast ({_pace(report, chosen)}), "
        f"{_size(report, chosen)}. "
        "Quality is not predicted: it is measured by the run, and a gate can hold it."
    )


def _chain_headline(report: Report, found: list[Choice]) -> str:
    done = [choice for choice in found if choice.applies]
    if len(done) < len(found) or not done:
        return "This recipe cannot run as it is."
    last = done[-1]
    if not all(choice.fits for choice in done):
        return "This recipe does not fit this device."
    speedup = _speedup(report, last)
    size = _size(report, last)
    if last.prediction.get("slower") is True or (speedup is not None and speedup < 1 / LEAST_SPEEDUP):
        return f"Slower on this device: the recipe would take decode from {_pace(report, last)}, for {size}."
    if speedup is None:
        return f"The recipe would give {size}; decode time is not predicted."
    if speedup < LEAST_SPEEDUP:
        return f"The recipe would gain no speed here, but {size}."
    return f"The recipe would make decode {times(speedup)} as fast ({_pace(report, last)}), {size}."


def _pace(report: Report, choice: Choice) -> str:
    before, after = _measured(report, "tpot_seconds"), number(choice.figures.get("tpot_seconds"))
    return f"{fmt.seconds(before)} → {fmt.seconds(after)} a token"


def _size(report: Report, choice: Choice) -> str:
    before, after = _measured(report, "weight_bytes"), number(choice.figures.get("weight_bytes"))
    if after is None:
        return "size not predicted"
    bits = number(choice.prediction.get("bits_per_parameter"))
    at = f" at {fmt.significant(bits)} bits a parameter" if bits is not None else ""
    weights = f"weights {fmt.data_size(before)} → {fmt.data_size(after)}{at}"
    cached, cached_after = _measured(report, "kv_bytes_per_token"), number(choice.figures.get("kv_bytes_per_token"))
    if cached is None or cached_after is None or cached_after >= cached:
        return weights
    cache = f"KV cache {fmt.data_size(cached)} → {fmt.data_size(cached_after)} a token"
    return cache if after == before else f"{weights}, {cache}"


def _table_section(report: Report, found: list[Choice]) -> Section:
    batch, context = number(report.get("batch")), number(report.get("context"))
    at = f", batch {fmt.integer(batch)}, context {fmt.integer(context)}" if batch is not None else ""
    one = report.get("alternatives") is not False
    lead = (
        "Each pass alone, from the model as it is." if one else "Each pass after the ones above it, as a run does it.",
        "Predicted from this device's measured ceilings and the profile; the first row was measured.",
    )
    shown = [column for column in COLUMNS if column[0] != "kv_bytes_per_token"]
    rows = [
        (
            "as it is (measured)",
            fmt.MISSING,
            *(figure(_measured(report, key), unit) for key, _, unit in shown),
        )
    ]
    for choice in found:
        rows.append(
            (
                choice.label,
                fmt.significant(number(choice.prediction.get("bits_per_parameter"))),
                *(figure(number(choice.figures.get(key)), unit) for key, _, unit in shown),
            )
        )
    heads = columns("<pass", "bits", *(label for _, label, _ in shown))
    run = tuple(
        (
            choice.label,
            _decode(report, choice),
            fmt.data_size(number(choice.figures.get("kv_bytes_per_token"))),
            fmt.seconds(number(choice.prediction.get("pass_seconds"))),
            fmt.data_size(number(choice.prediction.get("pass_memory_bytes"))),
            _fits(choice),
        )
        for choice in found
    )
    needs = columns("<pass", "<decode here", "KV a token", "its time", "memory", "<fits")
    notes = unique(f"{choice.label}: {note}" for choice in found for note in texts(choice.prediction, "notes"))
    reasons = unique(
        f"{choice.label} does not apply: {choice.reason or 'no reason given'}" for choice in found if not choice.applies
    )
    blocks: list[Block] = [
        Chart("plan"),
        Table(f"After each pass{at}", heads, tuple(rows), reasons),
        Table("What it means here, and what the pass itself needs", needs, run, notes),
    ]
    chosen = best(report, found)
    if chosen is not None:
        blocks.append(Code("To run it", "bash", _command(report, chosen if one else None, found)))
    return Section("plan", "What each pass would buy here", lead, tuple(blocks))


def _command(report: Report, chosen: Choice | None, found: list[Choice]) -> str:
    source = printable(mapping(report.get("model")).get("source") or "MODEL")
    words = ["effcli", "optimize", source]
    for choice in found if chosen is None else [chosen]:
        words += ["--pass", choice.label]
    return shlex.join([*words, "--gate", "ppl<=+5%", "-o", "out"])


def _decode(report: Report, choice: Choice) -> str:
    if not choice.applies:
        return "does not apply"
    speedup = _speedup(report, choice)
    if choice.prediction.get("slower") is True:
        return "slower on this device" + (f" ({signed_percent(1 / speedup - 1)})" if speedup else "")
    if speedup is None:
        return "not predicted"
    return f"{times(speedup)} as fast" if speedup >= LEAST_SPEEDUP else "no gain in speed"


def _fits(choice: Choice) -> str:
    fits = choice.prediction.get("fits")
    if not choice.applies:
        return fmt.MISSING
    return "not known" if fits is None else ("yes" if fits else "no")


def _tiles(report: Report, found: list[Choice]) -> tuple[Tile, ...]:
    chosen = best(report, found) if report.get("alternatives") is not False else (found[-1] if found else None)
    if chosen is None or not chosen.applies:
        return ()
    tiles = []
    for key, label, unit in (
        ("weight_bytes", "Weights", "bytes"),
        ("tpot_seconds", "Time per token", "seconds"),
        ("ttft_seconds", "Time to first token", "seconds"),
        ("peak_memory_bytes", "Peak memory", "bytes"),
    ):
        value = number(choice_figure) if (choice_figure := chosen.figures.get(key)) is not None else None
        if value is not None:
            tiles.append(Tile(label, figure(value, unit), f"predicted; now {figure(_measured(report, key), unit)}"))
    return tuple(tiles)


def _bars(report: Report, found: list[Choice]) -> str | None:
    shown = [choice for choice in found if choice.applies][:MOST_BARS]
    groups = [
        Bars(
            label,
            unit,
            (
                ("as it is", _measured(report, key), "attainable"),
                *((choice.label, number(choice.figures.get(key)), "measured") for choice in shown),
            ),
        )
        for key, label, unit in COLUMNS
        if {number(choice.figures.get(key)) for choice in shown} - {None, _measured(report, key)}
    ]
    return grouped_bars(
        "plan",
        "Predicted figures of each pass",
        groups,
        [("as it is", "attainable"), ("after the pass", "measured")],
        named=True,
    )
