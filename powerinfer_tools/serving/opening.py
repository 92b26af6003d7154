"""From an engine to a served model."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from powerinfer_formats.shard_names import model_name
from powerinfer_tools.engine import Engine
from powerinfer_tools.serving.batcher import Batcher
from powerinfer_tools.serving.disk_cache import DiskCache
from powerinfer_tools.serving.fair_queue import QueueLimits
from powerinfer_tools.serving.own_cores import spread
from powerinfer_tools.serving.prefix_store import PrefixStore
from powerinfer_tools.serving.served_model import ServedModel
from powerinfer_tools.serving.service import Service
from powerinfer_tools.serving.session_slots import SessionSlots, slot_count
from powerinfer_tools.text.chat import chat_template
from powerinfer_tools.text.tokenizer import Tokenizer

#: Size of the prefix cache on disk when nothing else is said.
DEFAULT_CACHE_BYTES = 8 << 30


@dataclass(frozen=True)
class ServeOptions:
    """``alias`` is the model's name for clients, by default the file's. ``parallel`` requests are computed at
    a time. ``kv_memory`` bytes hold the caches of these requests and of conversations that may go on. The
    folder ``cache_dir`` keeps the starts of texts, up to ``cache_bytes``, for the server's next start."""

    alias: str | None = None
    parallel: int = 8
    kv_memory: int | None = None
    limits: QueueLimits = field(default_factory=QueueLimits)
    cache_dir: Path | None = None
    cache_bytes: int = DEFAULT_CACHE_BYTES


def open_service(
    service: Service, engine: Engine, options: ServeOptions, say: Callable[[str], None] = lambda text: None
) -> Callable[[], None]:
    """Let ``service`` serve the model of ``engine``. Returns a function that ends the serving and closes the
    engine. ``say`` receives messages for the user. Raises ModelError and PrefixStoreError."""
    tokenizer = Tokenizer.from_gguf(engine.model.source)
    model = served_model(engine, tokenizer, options.alias)
    count = slot_count(engine.session, engine.weights, options.parallel, options.kv_memory)
    slots = SessionSlots(engine.weights, engine.session, count)
    disk = None if options.cache_dir is None else _disk_cache(model, slots, options, say)
    batcher = Batcher(
        slots,
        tokenizer,
        parallel=options.parallel,
        limits=options.limits,
        disk=disk,
        prepare=lambda: _spread(engine),
    )
    batcher.start()
    service.model, service.batcher = model, batcher
    service.report = lambda: _report(engine, slots)

    def close() -> None:
        batcher.close()
        if disk is not None:
            disk.close()
        engine.close()

    return close


def _spread(engine: Engine) -> None:
    """Give the threads of ``engine`` cores of their own, if no other threads work beside them: neither
    torch's nor those that read from disk. Called by the computing thread before it computes."""
    weights = engine.weights
    if weights.head is not None and not weights.stack.has_hot_side and weights.stack.residency is None:
        weights.head.logits(weights.stack.x[:1])  # a run starts the threads
        spread(engine.threads)


def _disk_cache(
    model: ServedModel, slots: SessionSlots, options: ServeOptions, say: Callable[[str], None]
) -> DiskCache:
    """The prefix cache on disk. Raises PrefixStoreError."""
    assert options.cache_dir is not None

    def identity() -> bytes:
        facts = (model.system_fingerprint, model.identity, model.context, slots.layout)
        return json.dumps(facts).encode()

    store = PrefixStore(options.cache_dir, options.cache_bytes)
    return DiskCache(slots, store, identity, say)


def _report(engine: Engine, slots: SessionSlots) -> dict[str, Any]:
    """The engine's report, with the caches of all slots, and the layers."""
    report = engine.report().as_dict()
    memory = dict(report["memory"])
    memory["total"] += slots.nbytes - memory["kv_cache"]
    memory["kv_cache"] = slots.nbytes
    layers = [vars(layer) for layer in engine.stack.layer_shares()]
    return report | {"memory": memory, "layers": layers}


def served_model(engine: Engine, tokenizer: Tokenizer, alias: str | None) -> ServedModel:
    """The model of ``engine`` as endpoints see it."""
    model, report = engine.model, engine.report()
    source = model.source.metadata.get("tokenizer.chat_template")
    return ServedModel(
        name=alias or _short_name(model.path),
        identity=model.fingerprint,
        mode=report.mode,
        kv_type=report.kv_type,
        context=engine.context,
        tokenizer=tokenizer,
        template=chat_template(model.source, tokenizer),
        template_source=source if isinstance(source, str) else None,
        file=model.path.name,
        facts=_facts(engine),
    )


def _short_name(path: Path) -> str:
    return model_name(path.name).removesuffix(".gguf").removesuffix(".powerinfer")


def _facts(engine: Engine) -> dict[str, Any]:
    model = engine.model
    return {
        "n_vocab": engine.vocabulary,
        "n_ctx_train": model.hyper.trained_context,
        "n_embd": model.hyper.width,
        "n_params": sum(math.prod(tensor.shape) for tensor in model.source.tensors.values()),
        "size": model.source.nbytes,
        "architecture": model.spec.name,
        "name": model.name,
        "split": model.is_split,
    }
