"""``effcli doctor``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from effcli.cli.options import QuietOption

if TYPE_CHECKING:
    from rich.console import Console

    from effcli.doctor import Diagnosis


def command(
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
    peaks: Annotated[bool, typer.Option("--peaks/--no-peaks", help="Measure this device's ceilings.")] = True,
    quiet: QuietOption = False,
) -> None:
    """Say what this machine offers: device, driver, measured peaks, versions, what is missing and how to get it."""
    from effcli.cli.progress import progress_bars
    from effcli.doctor import examine

    with progress_bars(quiet=quiet) as progress:
        diagnosis = examine(measure_peaks=peaks, progress=progress)
    if as_json:
        import json

        from effcli.reports.model import plain

        typer.echo(json.dumps(plain(diagnosis), indent=1))
        return
    from rich.console import Console

    _show(diagnosis, Console())


def _show(diagnosis: Diagnosis, console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    from effcli import formatting

    def section(title: str, rows: list[tuple[str, str]]) -> None:
        if not rows:
            return
        console.print(Text(title, style="bold"))
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in rows:
            table.add_row(Text("  " + name), Text(value))
        console.print(table)

    section("Problems", [(item.problem, item.remedy) for item in diagnosis.problems])
    if not diagnosis.problems:
        console.print(Text("No problems found", style="bold"))
    for device in diagnosis.devices:
        rows = [("name", device.name)]
        if device.memory_total_bytes is not None:
            total = formatting.data_size(device.memory_total_bytes)
            rows.append(("memory", f"{formatting.data_size(device.memory_available_bytes)} free of {total}"))
        if device.threads is not None:
            rows.append(("threads", str(device.threads)))
        rows.append(("native dtypes", ", ".join(device.native_dtypes)))
        if device.peaks is not None:
            rows.append(("copy", formatting.bandwidth(device.peaks.copy_bytes_per_second)))
            rows.append(("read", formatting.bandwidth(device.peaks.read_bytes_per_second)))
            rows += [
                (f"matmul {dtype}", formatting.flop_rate(rate)) for dtype, rate in device.peaks.flops_per_second.items()
            ]
        elif device.peaks_reason:
            rows.append(("peaks", device.peaks_reason))
        section(f"Device {device.device}" + (" (chosen)" if device.chosen else ""), rows)
    section(
        "Software",
        [
            ("python", f"{diagnosis.python} on {diagnosis.platform}"),
            ("torch build", diagnosis.torch_build),
            ("ONNX Runtime", diagnosis.onnx_runtime or "not installed"),
            ("NVIDIA driver", diagnosis.cuda_driver or "none found"),
            *((name, version or "missing") for name, version in diagnosis.versions.items()),
        ],
    )
    section(
        "Extras",
        [
            (extra.name, f"present: {extra.purpose}" if extra.present else f"missing: {extra.purpose}; {extra.install}")
            for extra in diagnosis.extras
        ],
    )
    section(
        "Built-in models",
        [
            (
                model.name,
                "cached" if model.cached else f"not cached, {formatting.data_size(model.download_bytes)} to fetch",
            )
            for model in diagnosis.builtin_models
        ],
    )
    section("Cache", [("folder", diagnosis.cache_folder), ("hub cache", diagnosis.hub_cache_folder)])
