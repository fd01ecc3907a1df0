"""What lies on disk and how it runs: the audit, the kernels and how far they agree with plain weights."""

from __future__ import annotations

from effcli import formatting as fmt
from effcli.formatting import printable
from effcli.reports.blocks import Block, Facts, Report, Section, Table, columns, items, texts, unique
from effcli.reports.changes import mapping, number
from effcli.reports.sections.change import times
from effcli.reports.sections.generic import named


def audit_section(report: Report) -> Section:
    """Show every class of tensor as it was found in the written files."""
    size = mapping(report.get("size"))
    rows = []
    for entry in items(report, "audit"):
        if not isinstance(entry, dict):
            continue
        why = "" if entry.get("quantized") else printable(entry.get("reason") or "no pass changes it")
        rows.append(
            (
                named(entry.get("tensor_class")),
                named(entry.get("dtype")),
                fmt.significant(number(entry.get("bits"))),
                fmt.integer(number(entry.get("modules"))),
                fmt.parameters(number(entry.get("parameters"))),
                fmt.data_size(number(entry.get("stored_bytes"))),
                why,
            )
        )
    heads = columns("<class", "<dtype", "bits", "modules", "param.", "bytes", "<why not quantized")
    table = Table("", heads, tuple(rows), texts(report, "audit_notes"))
    lead = ["Read back from the bytes on disk, not from what the passes said. Bits: stored, scales included."]
    bits = number(size.get("bits_per_parameter"))
    if bits is not None:
        lead.append(
            f"Together {fmt.data_size(number(size.get('after_bytes')))} for "
            f"{fmt.parameters(number(size.get('parameters')))} parameters: {fmt.significant(bits)} bits a parameter; "
            f"the files hold {fmt.data_size(number(size.get('after_file_bytes')))}."
        )
    source = source_sentence(report)
    if source:
        lead.append(source)
    if not rows:
        lead.append("The report holds no audit.")
    return Section("audit", "What was written", tuple(lead), (table,) if rows else ())


def source_sentence(report: Report) -> str | None:
    """Say that the source was already quantized, where it was."""
    size = mapping(report.get("size"))
    how = size.get("source_quantized") or mapping(report.get("source")).get("quantized")
    if not how:
        return None
    bits = number(size.get("source_bits_per_parameter"))
    at = f" at {fmt.significant(bits)} bits a parameter" if bits is not None else ""
    named = "" if how is True else f" ({printable(how)})"
    return f"The source was already quantized{at}{named}."


def kernel_table(report: Report) -> Table:
    """Name the kernel of each class of layers, and why it fell back where it did."""
    rows = tuple(
        (
            named(use.get("layer_class")),
            fmt.integer(number(use.get("layers"))),
            named(use.get("kernel")),
            printable(use.get("fallback_reason") or fmt.MISSING),
        )
        for use in items(report, "kernels")
        if isinstance(use, dict)
    )
    return Table("", columns("<layers of", "count", "<kernel", "<fell back because"), rows)


def kernels_section(report: Report) -> Section:
    """Name the kernels, how far they agree with plain weights, and what compiling decode brings."""
    blocks: list[Block] = []
    lead = []
    table = kernel_table(report)
    if table.rows:
        blocks.append(table)
    else:
        lead.append("No kernel is recorded: every layer ran as transformers runs it.")
    blocks.append(_agreement(mapping(report.get("kernel_agreement"))))
    compiled = report.get("compiled")
    if isinstance(compiled, dict):
        blocks.append(_compiled(compiled))
    return Section("kernels", "Kernels that ran", tuple(lead), tuple(blocks))


def _agreement(agreement: Report) -> Facts:
    title = "Fast kernels against plain weights, same text"
    if not agreement:
        return Facts(title, (("agreement", "not measured"),))
    pairs = (
        ("relative error of logits", fmt.significant(number(agreement.get("relative_error")))),
        ("largest difference of a logit", fmt.significant(number(agreement.get("max_absolute_error")))),
        ("same top token", fmt.percent(number(agreement.get("top1_agreement")))),
        ("tokens", fmt.integer(number(agreement.get("tokens")))),
    )
    return Facts(title, pairs, ("Relative error: ‖fast − plain‖ / ‖plain‖ over all logits.",))


def _compiled(compiled: Report) -> Facts:
    eager, fast = number(compiled.get("eager_tpot_seconds")), number(compiled.get("compiled_tpot_seconds"))
    context = fmt.integer(number(compiled.get("context")))
    pairs = [("time per token, as loaded", fmt.seconds(eager)), ("time per token, compiled", fmt.seconds(fast))]
    if eager and fast:
        pairs.append(("compiling brings", times(eager / fast)))
    pairs.append(("compiling took", fmt.seconds(number(compiled.get("compile_seconds")))))
    reason = compiled.get("reason")
    notes = unique([f"Not compiled: {printable(reason)}" if reason else None])
    return Facts(f"Decode with torch.compile, context {context}", tuple(pairs), notes)
