"""GET /metrics, in Prometheus' text form: llama.cpp's metrics by its names, and further ones."""

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response

from powerinfer_tools.serving.service import Service


class _Figures(Collector):
    """The batcher's figures, and the engine's report."""

    def __init__(self, service: Service, report: dict[str, Any]) -> None:
        self.service, self.report = service, report

    def collect(self) -> Iterator[Metric]:
        """The current values of all metrics."""
        _, batcher = self.service.ready()
        figures = batcher.figures
        for name, text, value in (
            (
                "prompt_tokens",
                "Prompt tokens processed, without those from the cache.",
                figures.prompt_tokens,
            ),
            ("prompt_tokens_cached", "Prompt tokens taken from the cache.", figures.cached_tokens),
            ("prompt_seconds", "Seconds spent on prompts.", figures.prompt_seconds),
            ("tokens_predicted", "Tokens generated.", figures.tokens),
            ("tokens_predicted_seconds", "Seconds spent on generated tokens.", figures.token_seconds),
            ("n_decode", "Passes over the model.", figures.passes),
        ):
            yield CounterMetricFamily(f"llamacpp:{name}", text, value)
        for name, text, value in (
            ("n_tokens_max", "Longest sequence so far, in tokens.", figures.longest),
            ("prompt_tokens_seconds", "Mean prompt speed, in tokens/s.",
             _rate(figures.prompt_tokens, figures.prompt_seconds)),
            ("predicted_tokens_seconds", "Mean speed of generated tokens, in tokens/s.",
             _rate(figures.tokens, figures.token_seconds)),
            ("requests_processing", "Requests being computed.", batcher.processing),
            ("requests_deferred", "Requests waiting in the queue.", batcher.waiting),
            ("n_busy_slots_per_decode", "Mean number of requests in a pass.",
             figures.busy_slots / max(1, figures.passes)),
        ):  # fmt: skip
            yield GaugeMetricFamily(f"llamacpp:{name}", text, value)
        yield from self._own()

    def _own(self) -> Iterator[Metric]:
        _, batcher = self.service.ready()
        figures = batcher.figures
        yield CounterMetricFamily("powerinfer:requests", "Requests that were computed.", figures.requests)
        yield CounterMetricFamily(
            "powerinfer:requests_interrupted", "Requests whose client left.", figures.interrupted
        )
        held = sum(place.length for place in batcher.places.all)
        yield GaugeMetricFamily("powerinfer:kv_tokens", "Tokens in the KV caches.", held)
        report = self.report
        memory = GaugeMetricFamily("powerinfer:memory_bytes", "Memory by purpose.", labels=["purpose"])
        for purpose, nbytes in (report.get("memory") or {}).items():
            if isinstance(nbytes, int):
                memory.add_metric([purpose], nbytes)
        yield memory
        density: Any = report.get("density")
        if isinstance(density, int | float):
            yield GaugeMetricFamily("powerinfer:density", "Share of FFN neurons that were computed.", density)
        yield from self._layers()

    def _layers(self) -> Iterator[Metric]:
        labels = ["layer", "mode"]
        density = GaugeMetricFamily(
            "powerinfer:layer_density",
            "Share of a layer's neurons, or experts, that were computed.",
            labels=labels,
        )
        hot = GaugeMetricFamily(
            "powerinfer:layer_hot_share",
            "Share of the computed neurons that the hot device computed.",
            labels=labels,
        )
        for index, layer in enumerate(self.report.get("layers", ())):
            for metric, value in ((density, layer["density"]), (hot, layer["hot_share"])):
                if value is not None:
                    metric.add_metric([str(index), layer["mode"]], value)
        yield density
        yield hot


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds else 0.0


def endpoint(service: Service) -> Any:
    """The endpoint."""

    async def metrics(request: Request) -> Response:
        del request
        report = await service.reported()
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Figures(service, report))
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    return metrics
