"""Tables for people: plain columns, numbers to the right."""

from collections.abc import Iterable, Sequence

from powerinfer_cli.console import printable, result_console


def print_table(headings: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> None:
    """Print ``rows`` under ``headings``; columns of numbers are set to the right."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    cells = [[printable(cell) for cell in row] for row in rows]
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column, heading in enumerate(headings):
        numeric = bool(cells) and all(row[column][:1].isdigit() or row[column][:1] in "-–" for row in cells)
        table.add_column(heading, justify="right" if numeric else "left", overflow="fold")
    for row in cells:
        table.add_row(*(Text(cell) for cell in row))
    result_console().print(table)


def print_facts(facts: Iterable[tuple[str, str]]) -> None:
    """Print ``name  value`` lines with the values aligned."""
    lines = [(printable(name), printable(value)) for name, value in facts]
    width = max((len(name) for name, _ in lines), default=0)
    console = result_console()
    for name, value in lines:
        console.print(f"{name:<{width}}  {value}", markup=False, soft_wrap=True)
