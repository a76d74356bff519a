"""Tables of layers and roles for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["print_grid", "table_frame"]


def table_frame() -> Table:
    """Make an empty table in the house style.

    Returns:
        The table.
    """
    tight = (0, 1, 0, 0)
    return Table(box=box.SIMPLE_HEAD, padding=tight, show_edge=False, pad_edge=False, header_style="bold")


def print_grid(cells: Mapping[tuple[int | None, str], Sequence[str]], console: Console) -> None:
    """Print one number per layer and role; roles that do not fit side by side go into further tables below.

    Args:
        cells: Layer (None outside blocks) and role to what stands there; two stacks of blocks may share a cell.
        console: Where to print.
    """
    roles = list(dict.fromkeys(role for _, role in cells))
    layers = sorted({layer for layer, _ in cells}, key=lambda layer: -1 if layer is None else layer)
    texts = {key: " / ".join(values) for key, values in cells.items()}
    widths = {role: max(len(role), *(len(texts.get((layer, role), "")) for layer in layers)) + 2 for role in roles}
    for part, group in enumerate(_fitting(roles, widths, console.width - 6)):
        if part:
            console.print()
        table = table_frame()
        for head in ("layer", *group):
            table.add_column(head, justify="right", no_wrap=True)
        for layer in layers:
            name = "–" if layer is None or layer < 0 else str(layer)
            table.add_row(*(Text(text) for text in (name, *(texts.get((layer, role), "") for role in group))))
        console.print(table)


def _fitting(roles: Sequence[str], widths: Mapping[str, int], room: int) -> list[list[str]]:
    groups: list[list[str]] = []
    used = 0
    for role in roles:
        if not groups or used + widths[role] > room:
            groups.append([])
            used = 0
        groups[-1].append(role)
        used += widths[role]
    return groups
