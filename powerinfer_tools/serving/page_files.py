"""GET / and /static/…: the page. Its files are read once and sent with a policy that allows nothing else."""

from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from powerinfer_tools.serving.faults import RequestFault

_FOLDER = Path(__file__).with_name("page")
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
    "trusted-types 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def routes() -> list[Route]:
    """The page and its files."""
    files = {path.name: path.read_bytes() for path in _FOLDER.iterdir() if path.suffix in _TYPES}

    def respond(name: str) -> Response:
        return Response(files[name], headers=_HEADERS, media_type=_TYPES[Path(name).suffix])

    async def index(request: Request) -> Response:
        del request
        return respond("index.html")

    async def static(request: Request) -> Response:
        name: Any = request.path_params["name"]
        if name not in files:
            raise RequestFault("there is no such file", status=404, code="not_found")
        return respond(name)

    return [Route("/", index), Route("/static/{name}", static)]
