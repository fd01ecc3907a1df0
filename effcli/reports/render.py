"""One saved report, four renderings. Nothing here imports torch; rich and jinja2 are imported when they are needed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from effcli.errors import BadInputError, did_you_mean
from effcli.reports.blocks import Report

if TYPE_CHECKING:
    from rich.console import Console

FORMATS = ("human", "json", "markdown", "html", "csv")


def render(data: Report, format: str = "human", console: Console | None = None) -> str:
    """Return a saved report as text.

    Parameters
    ----------
    data : dict
        As :func:`effcli.reports.model.read_report` or ``ProfileReport.to_dict`` returns it.
    format : str
        ``human`` (terminal), ``json``, ``markdown``, ``html`` (one self-contained file), or ``csv`` (of a comparison of
        several reports).
    console : rich.console.Console, optional
        For ``human``: decides width and colour, and the text is written to it. Without one, 80 columns without colour.

    Returns
    -------
    str
        Ends with a newline. ``human`` text holds terminal colours only if ``console`` is a terminal.

    Raises
    ------
    BadInputError
        If there is no such format, or the report has none of it.
    """
    if format == "human":
        from effcli.reports.terminal import to_terminal

        text = to_terminal(data, console)
        if console is not None:
            # A terminal that cannot show a character gets a question mark, not a traceback.
            console.file.write(text.encode(console.encoding, "replace").decode(console.encoding))
            console.file.flush()
        return text
    if format == "json":
        return json.dumps(data, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    if format == "markdown":
        from effcli.reports.markdown import to_markdown

        return to_markdown(data)
    if format == "html":
        from effcli.reports.html import to_html

        return to_html(data)
    if format == "csv":
        from effcli.fronts import to_csv
        from effcli.reports.model import FRONT_SCHEMA

        if data.get("schema") != FRONT_SCHEMA:
            raise BadInputError("only a comparison of several reports is a table for .csv; choose .json")
        return to_csv(data)
    raise BadInputError(f"no report format '{format}'{did_you_mean(format, FORMATS)}; known: {', '.join(FORMATS)}")
