"""The web application: which endpoint answers which request."""

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from powerinfer_tools.serving import chat, completions, messages, metrics, openapi, page_files, responses
from powerinfer_tools.serving.http import Gate
from powerinfer_tools.serving.information import Information
from powerinfer_tools.serving.service import Service


def create_app(service: Service) -> Starlette:
    """All endpoints on ``service``, whose model may be loaded later."""
    info = Information(service)
    chatting, completing = chat.endpoint(service), completions.endpoint(service)
    routes = [
        Route("/health", info.health),
        Route("/v1/health", info.health),
        Route("/v1/models", info.models),
        Route("/v1/models/{name:path}", info.model),
        Route("/v1/chat/completions", chatting, methods=["POST"]),
        Route("/v1/completions", completing, methods=["POST"]),
        # The same paths as llama.cpp's, for clients whose base URL lacks /v1.
        Route("/models", info.models),
        Route("/chat/completions", chatting, methods=["POST"]),
        Route("/completions", completing, methods=["POST"]),
        Route("/v1/responses", responses.endpoint(service), methods=["POST"]),
        Route("/v1/messages", messages.endpoint(service), methods=["POST"]),
        Route("/v1/messages/count_tokens", messages.counting(service), methods=["POST"]),
        Route("/tokenize", info.tokenize, methods=["POST"]),
        Route("/detokenize", info.detokenize, methods=["POST"]),
        Route("/apply-template", info.apply_template, methods=["POST"]),
        Route("/props", info.props),
        Route("/slots", info.slots),
        Route("/machine", info.machine),
        Route("/tokenizer_info", info.tokenizer_info),
        Route("/openapi.json", openapi.endpoint()),
        Route("/metrics", metrics.endpoint(service)),
    ]
    if service.settings.page:
        routes += page_files.routes()
    middleware = [Middleware(Gate, service=service)]
    if service.settings.origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=list(service.settings.origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
        )
        middleware.insert(0, cors)
    return Starlette(routes=routes, middleware=middleware, exception_handlers={HTTPException: _raise})


def _raise(request: Request, error: Exception) -> Response:
    """Leave faults to the gate, which answers all of them in the same way."""
    del request
    raise error
