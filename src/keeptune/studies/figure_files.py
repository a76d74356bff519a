"""What the commands of studies share: checks of their options, a figure as PNG with its numbers beside it as JSON."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from keeptune.core.artefact import write_json
from keeptune.core.errors import RecipeError
from keeptune.pipeline.machine import check_device, check_folder, device_named
from keeptune.report.figures import write_figure
from keeptune.report.pages.charts import Chart


def check_figure_file(output: Path, example: str, device: str) -> str:
    """Checks where a study writes and runs, before anything is computed; returns the device's name.

    Args:
        output: The figure's file.
        example: A name for the error message, such as ``energy.png``.
        device: ``auto``, or a device's name.

    Raises:
        RecipeError: The output is no PNG file in a folder that can be written, or there is no such device.
    """
    if output.suffix.lower() != ".png" or output.is_dir():
        raise RecipeError(
            "--output", got=str(output), wanted="a file that ends in .png", next_step=f"Example: --output {example}"
        )
    check_folder("--output", output.parent)
    check_device(device := device_named(device))
    return device


def write_figure_files(
    output: Path, record: Mapping[str, Any], charts: Sequence[Chart], note: str = "", across: int = 1
) -> None:
    """Writes a study's charts where there is something to draw, and its numbers beside it into ``.json``."""
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output.with_suffix(".json"), record)
    if charts:
        write_figure(charts, output, note, across)
