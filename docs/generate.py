"""Write the generated docs: the CLI reference from the app, the JSON Schemas from what reads and writes the files.

``python docs/generate.py --check`` writes nothing and fails if a file is out of date.
"""

from __future__ import annotations

import html
import subprocess
import sys
from functools import partial
from pathlib import Path

from effcli.reports.schema import SCHEMA_MAKERS, schema_text

DOCS = Path(__file__).resolve().parent


def cli_reference() -> str:
    """Return the CLI reference as Markdown, made by typer from the app itself."""
    made = subprocess.run(
        [sys.executable, "-m", "typer", "effcli.cli.main", "utils", "docs", "--name", "effcli"],
        check=True,
        capture_output=True,
        text=True,
        cwd=DOCS.parent,
    )
    return html.unescape(made.stdout).rstrip() + "\n"


def schema(report: str) -> str:
    """Return the JSON Schema of a saved report, or of the jobs file."""
    return schema_text(report)


GENERATED = {
    DOCS / "cli.md": cli_reference,
    **{DOCS / "schema" / f"effcli.{report}-1.schema.json": partial(schema, report) for report in SCHEMA_MAKERS},
}


def main() -> int:
    """Write or check every generated file."""
    stale = []
    for path, make in GENERATED.items():
        text = make()
        if "--check" not in sys.argv:
            path.write_text(text, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            stale.append(path.relative_to(DOCS.parent))
    for path in stale:
        print(f"{path} is out of date; run: make docs", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
