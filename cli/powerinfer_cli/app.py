"""The command line as a whole. Only the command asked for is imported; its stage when it runs."""

import sys
from importlib import import_module

import typer

from powerinfer_cli.boundary import INTERRUPTED, NoOutput, end_after_loss, guarded
from powerinfer_cli.grouped import flattened
from powerinfer_cli.help import HelpfulCommand, HelpfulGroup, first_line

# In the order in which they are used; command NAME is in the module NAME_command.
COMMANDS = (
    "pull",
    "list",
    "rm",
    "advise",
    "profile",
    "train",
    "threshold",
    "plan",
    "convert",
    "run",
    "serve",
    "eval",
    "bench",
    "inspect",
    "doctor",
    "relufy",
    "quantize",
)

ABOUT = """Fast, exact and measured inference of local language models on a CPU and an accelerator.

Most models need no preparation: run them. To prepare a model, find out which neurons it really uses
(profile), decide what goes where (plan), and write a split file (convert). Each stage reads files, writes one
file, and finds the previous stage's file beside the model. advise says whether this pays.

\b
Examples:
  powerinfer run -p "Why is the sky blue?"
  powerinfer advise -m model.gguf
  powerinfer profile -m model.gguf --corpus book.txt
  powerinfer plan -m model.gguf --vram 4GiB
  powerinfer convert -m model.gguf
  powerinfer run -m model.powerinfer.gguf -i
"""


def create_app(names: tuple[str, ...] = COMMANDS) -> typer.Typer:
    """The application with these commands."""
    app = typer.Typer(
        name="powerinfer",
        cls=HelpfulGroup,
        help=ABOUT,
        no_args_is_help=True,
        add_completion=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    )
    app.callback()(_global_options)
    for name in names:
        module = import_module(f"powerinfer_cli.{name}_command")
        if hasattr(module, "subcommands"):
            app.add_typer(module.subcommands(), name=name)
        else:
            settings = {"short_help": first_line(module.command.__doc__), "help": module.HELP}
            app.command(name, cls=getattr(module, "CLASS", HelpfulCommand), **settings)(
                guarded(flattened(module.command))
            )
    return app


def _show_version(show: bool) -> None:
    if show:
        from powerinfer_tools import __version__

        typer.echo(f"powerinfer {__version__}")
        raise typer.Exit


def _global_options(
    version: bool = typer.Option(
        False, "--version", help="Show the version and exit.", callback=_show_version, is_eager=True
    ),
) -> None:
    del version


def main() -> int:
    """Entry point of the ``powerinfer`` command."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if sys.stdout is None:
        sys.stdout = NoOutput()
    try:
        create_app((name,) if name in COMMANDS else COMMANDS)(prog_name="powerinfer")
    except KeyboardInterrupt:  # before the command began, or while it ended
        return INTERRUPTED
    except SystemExit as ended:
        end_after_loss(ended.code)
        raise
    return 0
