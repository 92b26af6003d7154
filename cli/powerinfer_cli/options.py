"""Options that several commands share, and the groups that they come in."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from powerinfer_cli.sizes import parse_size
from powerinfer_formats import modes


def size_value(text: str) -> int:
    """A memory size given on the command line; a malformed one is a usage error."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def size_option(name: str, text: str, panel: str | None = None) -> Any:
    """An option for an amount of memory, in bytes."""
    return typer.Option(name, parser=size_value, metavar="SIZE", help=text, rich_help_panel=panel)


Device = Literal["none", "cpu", "cuda"]
Mode = Literal["auto", modes.Mode]
Placing = Literal["static", "adaptive"]
KVType = Literal["f16", "q8_0"]

Model = Annotated[
    Path | None,
    typer.Option(
        "--model",
        "-m",
        metavar="PATH",
        help="Model: a GGUF file, a split file or a Hugging Face directory. Without it: $POWERINFER_MODEL, "
        "else the demo model.",
        show_default=False,
    ),
]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FILE", help="File to write. Without it: beside the model."),
]
Profile = Annotated[
    Path | None,
    typer.Option("--profile", metavar="FILE", help="Profile. Without it: the one beside the model."),
]
Predictors = Annotated[
    Path | None,
    typer.Option(
        "--predictors",
        metavar="FILE",
        help="Predictors. Without it: those beside the model, if there are any.",
    ),
]
Thresholds = Annotated[
    Path | None,
    typer.Option(
        "--thresholds",
        metavar="FILE",
        help="Thresholds. Without it: those beside the model, if there are any.",
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON value, and nothing else, on standard output.")
]
Debug = Annotated[
    bool, typer.Option("--debug", help="Show the traceback of an error.", envvar="POWERINFER_DEBUG")
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads", "-t", min=1, max=1024, metavar="N", help="CPU threads. Without it: one for each core."
    ),
]
Window = Annotated[
    int, typer.Option("--ctx", "-c", min=8, metavar="N", help="Tokens in one window of the text.")
]


@dataclass(frozen=True)
class ModelChoice:
    """Which model: a file or directory here, or one of the hub."""

    model: Model = None
    hf: Annotated[
        str | None,
        typer.Option(
            "-hf",
            "--hf-repo",
            metavar="OWNER/NAME[:QUANT]",
            help="Model of the Hugging Face hub, instead of -m; fetched if it is not in the hub's cache.",
            show_default=False,
        ),
    ] = None

    @property
    def given(self) -> bool:
        """Whether one is named."""
        return self.model is not None or self.hf is not None


@dataclass(frozen=True)
class Common:
    """What every command takes."""

    threads: Threads = None
    json: Json = False
    debug: Debug = False


Summary = Literal["none", "line", "all"]
Reasoning = Literal["show", "hide"]


@dataclass(frozen=True)
class Verbosity:
    """What is printed beside the answer: what the model thinks before it, and a summary after it."""

    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Print all figures of the run after the text.")
    ] = False
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print no summary after the text.")] = False
    reasoning: Annotated[
        Reasoning,
        typer.Option(
            "--reasoning",
            help="Show or hide the model's reasoning before its answer. It is dimmed in a terminal; "
            "elsewhere, it stands between the model's own markers.",
        ),
    ] = "show"

    @property
    def summary(self) -> Summary:
        """Which summary that asks for."""
        return "all" if self.verbose else "none" if self.quiet else "line"


@dataclass(frozen=True)
class Placement:
    """Where a model runs, for commands that run one."""

    device: Annotated[
        Device,
        typer.Option(
            "--device",
            help="Where the hot side of a split file runs: cuda or cpu (both through torch), or none:"
            " everything in C.",
            rich_help_panel="Placement",
        ),
    ] = "none"
    vram: Annotated[
        int | None,
        size_option(
            "--vram",
            "Memory of the device to use. With less than planned, fewer neurons are hot.",
            "Placement",
        ),
    ] = None
    mode: Annotated[
        Mode,
        typer.Option(
            "--mode",
            help="How FFN layers are computed; auto: the modes of the file's plan. dense and "
            "gate-first are exact; predicted leaves out neurons that the file's predictors do "
            "not name; thresholded leaves out neurons with a small factor.",
            rich_help_panel="Placement",
        ),
    ] = "auto"
    kv_type: Annotated[
        KVType,
        typer.Option(
            "--kv-type",
            help="Type of the KV cache; q8_0 takes half the memory and is not exact.",
            rich_help_panel="Placement",
        ),
    ] = "f16"

    ram: Annotated[
        int | None,
        size_option(
            "--ram",
            "Memory that the process may take; experts and FFNs that do not fit are read from disk "
            "when needed. Without it: the free memory.",
            "Placement",
        ),
    ] = None
    placing: Annotated[
        Placing,
        typer.Option(
            "--placement",
            help="Which experts stay in memory if not all fit: adaptive keeps the recently used ones,"
            " static those that the profile counted most.",
            rich_help_panel="Placement",
        ),
    ] = "adaptive"

    @property
    def engine_mode(self) -> str | None:
        """The mode as the engine takes it: None for what the file says."""
        return None if self.mode == "auto" else self.mode


@dataclass(frozen=True)
class Synthetic:
    """A model that is made up, for bench."""

    shape: Annotated[
        str | None,
        typer.Option(
            "--shape",
            metavar="NAME",
            help="Measure random weights of a real shape, such as mistral-7b; an unknown name lists "
            "all shapes.",
            rich_help_panel="Synthetic models",
        ),
    ] = None
    ffn: Annotated[
        str | None,
        typer.Option(
            "--ffn",
            metavar="WxN",
            help="Measure only one FFN of width W with N neurons, by density.",
            rich_help_panel="Synthetic models",
        ),
    ] = None
    row_type: Annotated[
        str | None,
        typer.Option(
            "--type",
            metavar="TYPE",
            help="Row type of the weights. Without it: q4_0.",
            rich_help_panel="Synthetic models",
        ),
    ] = None
    density: Annotated[
        str | None,
        typer.Option(
            "--density",
            metavar="SHARE",
            help="Share of neurons that fire; with --ffn, a list of shares. Without it, --shape makes"
            " the dense model.",
            rich_help_panel="Synthetic models",
        ),
    ] = None
    skew: Annotated[
        float | None,
        typer.Option(
            "--skew",
            min=0.0,
            metavar="S",
            help="How unequally often neurons fire, or experts are chosen; 0: equally. Without it: 0,"
            " or 0.5 with --locality.",
            rich_help_panel="Synthetic models",
        ),
    ] = None
    locality: Annotated[
        float | None,
        typer.Option(
            "--locality",
            min=1.0,
            metavar="N",
            help="Number of tokens, such as 64, for which a text stays with a topic that prefers "
            "certain experts. Without it: all experts are chosen equally often.",
            rich_help_panel="Synthetic models",
        ),
    ] = None
    layers: Annotated[
        int | None,
        typer.Option(
            "--layers",
            min=1,
            metavar="N",
            help="Fewer layers, if there is no room for all.",
            rich_help_panel="Synthetic models",
        ),
    ] = None
    cache_dir: Annotated[
        Path | None,
        typer.Option(
            "--cache-dir",
            metavar="DIR",
            help="Folder for the models of --shape. Without it: $POWERINFER_CACHE, else the user's cache.",
            rich_help_panel="Synthetic models",
        ),
    ] = None
    keep: Annotated[
        Path | None,
        typer.Option(
            "--keep",
            metavar="FILE",
            help="Write the model of --shape to this file instead; llama.cpp loads the dense form.",
            rich_help_panel="Synthetic models",
        ),
    ] = None
    clear_cache: Annotated[
        bool,
        typer.Option(
            "--clear-cache",
            help="Remove all cached synthetic models and end.",
            rich_help_panel="Synthetic models",
        ),
    ] = False


def finite(value: float) -> float:
    """``value``, as a typer callback. Raises BadParameter for what is no number, or infinite."""
    if not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number")
    return value


def in_panel(panel: str) -> Callable[..., Any]:
    """``typer.Option`` for options listed under the heading ``panel``."""

    def option(*names: str, **settings: Any) -> Any:
        return typer.Option(*names, rich_help_panel=panel, **settings)

    return option


def is_given(ctx: typer.Context, name: str) -> bool:
    """Whether the parameter ``name`` stands on the command line."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def refuse_beside(ctx: typer.Context, option: str, *others: str) -> None:
    """Wrong usage where any of the parameters ``others`` was given: ``option`` leaves it without effect."""
    for parameter in ctx.command.params:
        if parameter.name in others and is_given(ctx, parameter.name):
            raise typer.BadParameter(f"has no effect with {option}", param_hint=parameter.opts[0])
