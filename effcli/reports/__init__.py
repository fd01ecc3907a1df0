"""Reports: one saved result, rendered as terminal text, JSON, Markdown or a self-contained HTML page."""
