"""Tables and lines of text on the terminal, in one style."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TypeVar

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

T = TypeVar("T")


def table_frame() -> Table:
    """Returns an empty table in the shared style."""
    tight = (0, 1, 0, 0)
    return Table(box=box.SIMPLE_HEAD, padding=tight, show_edge=False, pad_edge=False, header_style="bold")


def table(
    heads: Sequence[str], rows: Iterable[Sequence[str]], left: Collection[str] = (), *, wrap: bool = True
) -> Table:
    """Returns a table of texts, in which markup means nothing; columns not in ``left`` are aligned to the right."""
    frame = table_frame()
    for head in heads:
        frame.add_column(Text(head), justify="left" if head in left else "right", no_wrap=not wrap)
    for row in rows:
        frame.add_row(*map(Text, row))
    return frame


def say(console: Console, text: str) -> None:
    """Prints a line of plain text, which the terminal wraps."""
    console.print(Text(text), soft_wrap=True)


def print_grid(cells: Mapping[tuple[int | None, str], Sequence[str]], console: Console) -> None:
    """Prints the texts of targets by layer and role; roles that do not fit side by side go into further tables below.

    A layer that is None or negative is outside any block.
    """
    roles = list(dict.fromkeys(role for _, role in cells))
    layers = sorted({layer for layer, _ in cells}, key=lambda layer: -1 if layer is None else layer)
    texts = {key: " / ".join(values) for key, values in cells.items()}
    widths = [max(len(role), *(len(texts.get((layer, role), "")) for layer in layers)) + 2 for role in roles]
    for part, group in enumerate(fitting(roles, widths, console.width - 6)):
        if part:
            console.print()
        names = ["–" if layer is None or layer < 0 else str(layer) for layer in layers]
        rows = [
            [name, *(texts.get((layer, role), "") for role in group)] for name, layer in zip(names, layers, strict=True)
        ]
        console.print(table(["layer", *group], rows, wrap=False))


def fitting(items: Sequence[T], widths: Sequence[int], room: int) -> list[list[T]]:
    """Returns items in groups that fit side by side in ``room`` characters, at least one in each."""
    groups: list[list[T]] = []
    used = 0
    for item, width in zip(items, widths, strict=True):
        if not groups or used + width > room:
            groups.append([])
            used = 0
        groups[-1].append(item)
        used += width
    return groups
