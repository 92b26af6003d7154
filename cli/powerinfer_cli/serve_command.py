"""``powerinfer serve``: the model over HTTP."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from powerinfer_cli import options as opt
from powerinfer_cli.console import emit_json, say
from powerinfer_cli.files import find_model

if TYPE_CHECKING:
    from powerinfer_tools.serving.server import Address
    from powerinfer_tools.serving.service import Settings

HELP = """Serve the model over HTTP, as OpenAI's API does.

Editors, agents and web front ends use http://127.0.0.1:8080/v1; /health, /metrics and /props are for
operators. Requests are computed together, and each answer has the bits that it would have alone. SIGTERM and
Ctrl-C end the server when the requests under way are answered.

\b
Examples:
  powerinfer serve -m model.gguf
  powerinfer serve -m model.powerinfer.gguf -c 8192 --parallel 16 --port 8000
  powerinfer serve --host 0.0.0.0 --api-key-file keys.txt --tls-cert cert.pem --tls-key key.pem
"""

#: Longest body of a request when nothing else is said.
_BODY = 4 << 20
_network = opt.in_panel("Network")
_load = opt.in_panel("Load")


@dataclass(frozen=True)
class Network:
    """Where the server listens, and to whom."""

    host: Annotated[
        str, _network("--host", metavar="ADDRESS", help="Address to listen on; 0.0.0.0: all addresses.")
    ] = "127.0.0.1"
    port: Annotated[int, _network("--port", min=0, max=65535, metavar="N", help="Port; 0: any free one.")] = (
        8080
    )
    api_key: Annotated[
        list[str] | None,
        _network(
            "--api-key",
            metavar="KEY",
            envvar="POWERINFER_API_KEY",
            help="Key that clients must send; may be repeated.",
        ),
    ] = None
    api_key_file: Annotated[
        Path | None, _network("--api-key-file", metavar="FILE", help="File with keys, one on each line.")
    ] = None
    cors: Annotated[
        list[str] | None,
        _network("--cors", metavar="ORIGIN", help="Allow web pages of this origin; may be repeated; *: all."),
    ] = None
    tls_cert: Annotated[
        Path | None, _network("--tls-cert", metavar="FILE", help="Certificate chain, for HTTPS.")
    ] = None
    tls_key: Annotated[
        Path | None, _network("--tls-key", metavar="FILE", help="Private key of the certificate.")
    ] = None
    drain: Annotated[
        float,
        _network(
            "--drain", min=0.0, metavar="S", help="Longest time to finish requests at the end, in seconds."
        ),
    ] = 30.0


@dataclass(frozen=True)
class Load:
    """How much the server takes on."""

    ctx: Annotated[
        int | None,
        _load("--ctx", "-c", min=1, metavar="N", help="Context of each request in tokens. Without it: the "
              "model's, up to 4096."),
    ] = None  # fmt: skip
    parallel: Annotated[
        int, _load("--parallel", min=1, max=1024, metavar="N", help="Requests computed at a time.")
    ] = 8
    kv_memory: Annotated[
        int | None,
        opt.size_option(
            "--kv-memory",
            "Memory for the KV caches of requests and of earlier conversations. Without it: enough "
            "for twice --parallel requests.",
            "Load",
        ),
    ] = None
    cache_dir: Annotated[
        Path | None,
        _load("--cache-dir", metavar="DIR", help="Also keep the prefix cache in this folder, so that "
                                                 "it survives a restart of the server."),
    ] = None  # fmt: skip
    cache_size: Annotated[
        int | None,
        opt.size_option("--cache-size", "Largest size of the --cache-dir folder. Without it: 8 GiB.", "Load"),
    ] = None
    queue: Annotated[
        int,
        _load("--queue", min=1, metavar="N", help="Requests that may wait; further ones are refused (503)."),
    ] = 256
    per_client: Annotated[
        int,
        _load(
            "--per-client",
            min=1,
            metavar="N",
            help="Waiting requests of one client; further ones are refused (429).",
        ),
    ] = 64
    max_body: Annotated[
        int | None, opt.size_option("--max-body", "Longest request body. Without it: 4 MiB.", "Load")
    ] = None
    alias: Annotated[str | None, _load("--alias", metavar="NAME", help="The model's name for clients.")] = (
        None
    )


def command(
    *,
    model: opt.ModelChoice,
    network: Network,
    load: Load,
    placement: opt.Placement,
    common: opt.Common,
) -> None:
    """Serve the model over HTTP."""
    settings = settings_of(network, load)
    address = address_of(network)
    path = find_model(model)
    require_packages()
    from powerinfer_tools.serving.server import Serving
    from powerinfer_tools.serving.service import Service

    service = Service(settings, logger(as_json=common.json))
    load_model = opener(service, path, load, placement, common.threads)

    def listening(port: int) -> None:
        say(f"listening on {address.url(port)}, loading {path}")

    Serving(service, address, load_model, listening).run()


def require_packages() -> None:
    """Refuse, with what to install, where the packages for serving are missing."""
    from importlib.util import find_spec

    from powerinfer_tools.errors import PowerInferError

    needed = ("starlette", "uvicorn", "pydantic", "prometheus_client", "llguidance")
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise PowerInferError(
            f"serving needs packages that are not installed ({', '.join(missing)}): in the folder of "
            "powerinfer's sources, pip install '.[serve]'"
        )


def opener(
    service: Any, path: Path, load: Load, placement: opt.Placement, threads: int | None
) -> Callable[[], Callable[[], None]]:
    """What loads the model, in a thread."""

    def open_model() -> Callable[[], None]:
        from contextlib import ExitStack

        from powerinfer_cli.engines import opened_engine
        from powerinfer_tools.serving.fair_queue import QueueLimits
        from powerinfer_tools.serving.opening import DEFAULT_CACHE_BYTES, ServeOptions, open_service

        limits = QueueLimits(load.queue, load.per_client)
        size = DEFAULT_CACHE_BYTES if load.cache_size is None else load.cache_size
        options = ServeOptions(load.alias, load.parallel, load.kv_memory, limits, load.cache_dir, size)
        with ExitStack() as stack:
            engine = stack.enter_context(opened_engine(path, placement, threads=threads, context=load.ctx))
            stack.callback(open_service(service, engine, options, say))
            served = service.model
            assert served is not None
            for notice in (*served.tokenizer.notices, served.template.notice):
                if notice is not None:
                    say(notice)
            say(f"ready: {served.name}, {served.context} tokens of context, mode {served.mode}")
            return stack.pop_all().close

    return open_model


def settings_of(network: Network, load: Load) -> "Settings":
    """How the server speaks to clients. Contradictions are usage errors."""
    keys = set(network.api_key or ())
    if network.api_key_file is not None:
        lines = network.api_key_file.read_text(encoding="utf-8").splitlines()
        keys |= {line.strip() for line in lines if line.strip()}
        if not keys:
            raise typer.BadParameter(f"{network.api_key_file} has no key", param_hint="--api-key-file")
    if "" in keys:
        raise typer.BadParameter("a key is empty", param_hint="--api-key")
    require_packages()
    from powerinfer_tools.serving.service import Settings

    return Settings(frozenset(keys), tuple(network.cors or ()), load.max_body or _BODY)


def address_of(network: Network) -> "Address":
    """Where to listen. A certificate without a key, or the other way round, is a usage error."""
    if (network.tls_cert is None) != (network.tls_key is None):
        raise typer.BadParameter("give both --tls-cert and --tls-key", param_hint="--tls-cert")
    for file in (network.tls_cert, network.tls_key):
        if file is not None and not file.is_file():
            raise typer.BadParameter(f"{file} is no file", param_hint="--tls-cert")
    from powerinfer_tools.serving.server import Address

    return Address(network.host, network.port, network.tls_cert, network.tls_key, network.drain)


def logger(*, as_json: bool) -> Callable[[dict[str, Any]], None]:
    """What writes one line a request: for people on standard error, as JSON on standard output."""
    return emit_json if as_json else lambda entry: say(log_line(entry))


def log_line(entry: dict[str, Any]) -> str:
    """One request in words."""
    line = "{client} {method} {path} {status} {seconds:.3f} s".format_map(entry)
    if entry.get("completion_tokens"):
        line += " {prompt_tokens} ({cached_tokens} cached) + {completion_tokens} tokens".format_map(entry)
        line += f", {entry['tokens_per_second']} tok/s"
    return f"{line} {entry['error']}" if "error" in entry else line
