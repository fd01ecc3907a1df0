"""Pictures side by side."""

from __future__ import annotations

from effcli.formatting import printable
from effcli.reports.blocks import Block, Picture, Report, Section, items
from effcli.reports.changes import mapping
from effcli.reports.pipeline_reading import other_passes, png_size, short_label, whole

MOST_CELLS = 400


def section(report: Report) -> Section | None:
    """Return the sheets of a report, or None where it has none."""
    found = items(report, "sheets")
    made = [sheet(mapping(entry)) for entry in found]
    blocks: list[Block] = [picture for picture in made if picture is not None]
    if not found:
        return None
    lost = len(found) - len(blocks)
    lead = [f"{lost} {'sheet' if lost == 1 else 'sheets'} of pictures cannot be read."] if lost else []
    if blocks:
        causes = " and ".join(("skipped steps", *other_passes(report)))
        lead.insert(0, f"All rows start from the same noise: what differs between them comes from {causes}.")
    return Section("pictures", "Pictures", tuple(lead), tuple(blocks))


def sheet(data: Report) -> Picture | None:
    """Return one saved sheet, or None where it is damaged."""
    rows = tuple(short_label(label) for label in items(data, "rows"))
    columns = tuple(short_label(label) for label in items(data, "columns"))
    pixels = png_size(data.get("png_base64"))
    cell = [whole(side) for side in items(data, "cell_pixels")]
    if pixels is None or not 0 < len(rows) * len(columns) <= MOST_CELLS:
        return None
    if cell != [pixels[0] // len(columns), pixels[1] // len(rows)] or 0 in cell:
        return None
    return Picture(
        printable(data.get("title") or ""),
        rows,
        columns,
        (pixels[0] // len(columns), pixels[1] // len(rows)),
        str(data["png_base64"]),
    )
