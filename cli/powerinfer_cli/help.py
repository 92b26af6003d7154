"""Help as plain text with the options under headings. Rich's panels would cost a third of the time budget."""

from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup


def _write_options(command: Any, ctx: Any, formatter: Any) -> None:
    """Write one section per heading (``rich_help_panel``), in order of first use."""
    sections: dict[str, list[tuple[str, str]]] = {}
    for parameter in command.get_params(ctx):
        record = parameter.get_help_record(ctx)
        if record is not None:
            is_option = parameter.param_type_name == "option"
            heading = getattr(parameter, "rich_help_panel", None) or ("Options" if is_option else "Arguments")
            sections.setdefault(heading, []).append(record)
    for heading, records in sections.items():
        with formatter.section(heading):
            formatter.write_dl(records)


def first_line(docstring: str | None) -> str:
    """A docstring's first line: what lists of commands say."""
    return (docstring or "").strip().split("\n")[0]


class HelpfulCommand(TyperCommand):
    """A command whose help lists options under headings."""

    def make_context(self, *arguments: Any, **settings: Any) -> Any:
        """Read the command line; what is wrong with a value is said without the name of its Python class."""
        try:
            return super().make_context(*arguments, **settings)
        except typer.BadParameter as error:
            error.message = error.message.removeprefix("Value error, ")
            raise

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options, grouped."""
        _write_options(self, ctx, formatter)


class HelpfulGroup(TyperGroup):
    """A group of commands whose help lists options under headings, then the commands."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options, grouped, and the commands."""
        _write_options(self, ctx, formatter)
        self.format_commands(ctx, formatter)

    def list_commands(self, ctx: Any) -> list[str]:
        """Names in the order in which a user needs them; typer would put nested groups last."""
        from powerinfer_cli.app import COMMANDS

        order = {name: index for index, name in enumerate(COMMANDS)}
        return sorted(super().list_commands(ctx), key=lambda name: order.get(name, len(order)))
