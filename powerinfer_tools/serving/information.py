"""The small endpoints: health, models, tokens, templates, properties, slots."""

import time
from dataclasses import asdict
from typing import Any

import anyio.to_thread
from starlette.requests import Request
from starlette.responses import Response

from powerinfer_tools import __version__
from powerinfer_tools.generate.sampling import SamplingOptions
from powerinfer_tools.serving.faults import RequestFault
from powerinfer_tools.serving.http import answer, read
from powerinfer_tools.serving.prompting import prompt_text
from powerinfer_tools.serving.schemas import DetokenizeRequest, TemplateRequest, TokenizeRequest
from powerinfer_tools.serving.service import Service
from powerinfer_tools.serving.translation import require_short


class Information:
    """Endpoints that generate nothing."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def health(self, request: Request) -> Response:
        """200 if requests are accepted; 503 while loading and while ending."""
        del request
        self.service.ready()
        return answer({"status": "ok"})

    async def models(self, request: Request) -> Response:
        """The one model."""
        del request
        model, _ = self.service.ready()
        return answer({"object": "list", "data": [model.card()]})

    async def model(self, request: Request) -> Response:
        """The model by its name."""
        model, _ = self.service.ready()
        if request.path_params["name"] != model.name:
            raise RequestFault(
                f"no model is called {request.path_params['name']!r}; {model.name!r} is served",
                status=404,
                code="model_not_found",
            )
        return answer(model.card())

    async def tokenize(self, request: Request) -> Response:
        """Text → ids."""
        body = await read(request, TokenizeRequest, self.service)
        model, _ = self.service.ready()
        require_short(body.content, model)
        add_bos = None if body.add_special else False

        def encode() -> list[int]:
            return model.tokenizer.encode(body.content, add_bos=add_bos, parse_special=body.parse_special)

        ids = await anyio.to_thread.run_sync(encode)
        if body.with_pieces:
            pieces = [{"id": token, "piece": model.tokenizer.token_text(token)} for token in ids]
            return answer({"tokens": pieces, "count": len(ids)})
        return answer({"tokens": ids, "count": len(ids), "max_model_len": model.context})

    async def detokenize(self, request: Request) -> Response:
        """Ids → text."""
        body = await read(request, DetokenizeRequest, self.service)
        model, _ = self.service.ready()
        text = model.tokenizer.decode(body.tokens, show_special=True)
        return answer({"content": text, "prompt": text})

    async def tokenizer_info(self, request: Request) -> Response:
        """The answer that lm-eval asks for before it tokenises through this server."""
        del request
        model, _ = self.service.ready()
        tokens = model.tokenizer.tokens
        return answer(
            {
                "tokenizer_class": tokens.kind,
                "vocab_size": model.tokenizer.vocabulary,
                "bos_token": None if tokens.bos_id is None else tokens.texts[tokens.bos_id],
                "eos_token": None if tokens.eos_id is None else tokens.texts[tokens.eos_id],
                "pad_token": None,
                "chat_template": model.template_source,
                "add_bos_token": model.tokenizer.adds_bos,
                "max_model_len": model.context,
            }
        )

    async def apply_template(self, request: Request) -> Response:
        """Messages → the prompt as text."""
        body = await read(request, TemplateRequest, self.service)
        model, _ = self.service.ready()

        def render() -> str:
            return prompt_text(body.messages, model, body.tools, body.chat_template_kwargs)

        return answer({"prompt": await anyio.to_thread.run_sync(render)})

    async def props(self, request: Request) -> Response:
        """The served model, and the settings of the server."""
        del request
        model, batcher = self.service.ready()
        tokens = model.tokenizer.tokens
        return answer(
            {
                "model_alias": model.name,
                "system_fingerprint": model.system_fingerprint,
                "total_slots": batcher.parallel,
                "chat_template": model.template_source or "",
                "bos_token": "" if tokens.bos_id is None else tokens.texts[tokens.bos_id],
                "eos_token": "" if tokens.eos_id is None else tokens.texts[tokens.eos_id],
                "default_generation_settings": {
                    "n_ctx": model.context,
                    "params": {"n_predict": -1, **asdict(SamplingOptions())},
                },
                "model_path": model.file,
                "mode": model.mode,
                "kv_type": model.kv_type,
                "modalities": {"vision": False, "audio": False, "video": False},
                "endpoint_slots": True,
                "endpoint_props": False,
                "endpoint_metrics": True,
                "build_info": f"powerinfer {__version__}",
                "meta": model.facts,
            }
        )

    async def slots(self, request: Request) -> Response:
        """Which request has which place."""
        del request
        model, batcher = self.service.ready()
        return answer([_slot(place, model.context) for place in batcher.places.all])

    async def machine(self, request: Request) -> Response:
        """The machine at work, for the page: the engine's report, and the queue."""
        del request
        model, batcher = self.service.ready()
        report = await self.service.reported()
        figures = batcher.figures
        return answer(
            {
                "model": model.card(),
                "engine": report,
                "processing": batcher.processing,
                "waiting": batcher.waiting,
                "parallel": batcher.parallel,
                "slots": [_slot(place, model.context) for place in batcher.places.all],
                "prompt_tokens": figures.prompt_tokens,
                "cached_tokens": figures.cached_tokens,
                "tokens": figures.tokens,
                "requests": figures.requests,
                "uptime": time.time() - self.service.started,
                "now": time.time(),
            }
        )


def _slot(place: Any, context: int) -> dict[str, Any]:
    return {
        "id": place.slot,
        "n_ctx": context,
        "speculative": False,
        "is_processing": place.busy,
        "n_tokens": place.length,
    }
