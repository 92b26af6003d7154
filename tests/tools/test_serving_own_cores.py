"""Engine threads on cores of their own: only where every core has one, and with the same results."""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from powerinfer_tools.engine import Engine
from powerinfer_tools.model.loading import load_model
from powerinfer_tools.serving.own_cores import spread
from tiny_models import TinySpec, make_tiny_model

CORES = sorted(os.sched_getaffinity(0))[:2] if hasattr(os, "sched_getaffinity") else []
pytestmark = pytest.mark.skipif(len(CORES) < 2, reason="one core, or a system that does not name them")


@pytest.fixture
def caller() -> Iterator[ThreadPoolExecutor]:
    """A thread that may use two cores."""
    with ThreadPoolExecutor(1, initializer=lambda: os.sched_setaffinity(0, CORES)) as caller:
        yield caller


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    model = load_model(make_tiny_model(tmp_path, TinySpec(context=64)).path)
    engine = Engine(model, threads=2)
    yield engine
    engine.close()
    model.close()


def cores_of_threads() -> dict[int, set[int]]:
    return {
        int(task.name): os.sched_getaffinity(int(task.name)) for task in Path("/proc/self/task").iterdir()
    }


def test_each_thread_has_a_core_and_results_stay(engine: Engine, caller: ThreadPoolExecutor) -> None:
    def logits() -> np.ndarray:
        engine.rewind(0)
        engine.prefill([1, 2, 3])
        return engine.decode(4).view(np.uint32).copy()

    expected = caller.submit(logits).result()
    before = cores_of_threads()
    assert caller.submit(spread, 2).result()
    after = cores_of_threads()
    own = caller.submit(threading.get_native_id).result()
    changed = {thread: cores for thread, cores in after.items() if before.get(thread) != cores}
    assert changed.pop(own) == {CORES[0]}
    assert list(changed.values()) == [{CORES[1]}]
    assert np.array_equal(caller.submit(logits).result(), expected)


@pytest.mark.parametrize("threads", [1, 3])
def test_nothing_changes_where_there_are_more_or_fewer_cores(
    engine: Engine, caller: ThreadPoolExecutor, threads: int
) -> None:
    caller.submit(engine.prefill, [1]).result()
    before = cores_of_threads()
    assert not caller.submit(spread, threads).result()
    assert cores_of_threads() == before


def test_nothing_changes_where_a_process_has_two_engines(engine: Engine, caller: ThreadPoolExecutor) -> None:
    with Engine(engine.model, threads=2) as other:
        for one in (engine, other):
            caller.submit(one.prefill, [1]).result()
        before = cores_of_threads()
        assert not caller.submit(spread, 2).result()
        assert cores_of_threads() == before
