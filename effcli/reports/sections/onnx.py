"""The result as an export on ONNX Runtime, beside the original and the result in torch."""

from __future__ import annotations

from collections.abc import Sequence

from effcli import formatting as fmt
from effcli.formatting import printable
from effcli.reports.blocks import Facts, Report, Section, Table, columns, texts, unique
from effcli.reports.changes import Change, mapping, number, onnx_changes
from effcli.reports.sections.change import NOISE_NOTE, TIMES, difference, figure
from effcli.reports.sections.generic import named

PROVIDERS = {"CUDAExecutionProvider": "CUDA", "CPUExecutionProvider": "CPU"}
LEAD = (
    "The export in the folder {folder}, held against torch and read back in a fresh process: the same text, batch, "
    "context and clock as before and after. Nothing that looks into layers is measured there."
)


def provider(about: Report) -> str:
    """Return what of ONNX Runtime ran an export, in a word."""
    name = printable(about.get("provider") or "provider not recorded")
    return PROVIDERS.get(name, name)


def sections(report: Report, found: Sequence[Change]) -> tuple[Section, ...]:
    """Return the section of a report that has an export, none of another.

    Parameters
    ----------
    report : dict
        ``effcli.optimize/1``.
    found : sequence of Change
        Its changes in torch.
    """
    about = mapping(report.get("after_onnx"))
    if not about:
        return ()
    folder = printable(about.get("folder") or "onnx")
    return (Section("onnx", "On ONNX Runtime", (LEAD.format(folder=folder),), (_table(report, found), _facts(about))),)


def _table(report: Report, found: Sequence[Change]) -> Table:
    before = {change.metric: change.before for change in found}
    exported = onnx_changes(report)
    rows = tuple(
        (
            printable(change.label),
            figure(before.get(change.metric), change.unit),
            figure(change.before, change.unit),
            figure(change.after, change.unit),
            difference(change),
            _words(change),
        )
        for change in exported
    )
    reasons = [f"{change.label}: {change.reason}".rstrip(".") + "." for change in exported if change.after is None]
    heads = columns("<figure", "before", "after (torch)", "after (ONNX Runtime)", "ONNX to torch", "<in words")
    return Table("", heads, rows, unique([NOISE_NOTE, *(printable(reason) for reason in reasons)]))


def _words(change: Change) -> str:
    """Say of a time whether it is another; of all else the figures say it."""
    if change.metric not in TIMES:
        return ""
    words = {"better": "faster than torch", "worse": "slower than torch", "noise": "no difference outside noise"}
    return words.get(change.status, "noise not known")


def _facts(about: Report) -> Facts:
    quantization = about.get("quantization")
    pairs = (
        ("ran on", f"{provider(about)} ({named(about.get('provider_reason'))})"),
        (
            "largest difference of a logit from torch",
            f"{fmt.significant(number(about.get('max_absolute_error')))} at "
            f"{fmt.integer(number(about.get('positions')))} positions, "
            f"{fmt.significant(number(about.get('tolerance')))} is let pass",
        ),
        ("mean difference", fmt.significant(number(about.get("mean_absolute_error")))),
        ("graphs and weights on disk", fmt.data_size(number(about.get("file_bytes")))),
        ("dtype", f"{named(about.get('dtype'))} ({named(about.get('dtype_reason'))})"),
        ("opset", named(about.get("opset"))),
        *((("integers kept", named(quantization)),) if quantization else ()),
    )
    return Facts("", pairs, texts(about, "notes"))
