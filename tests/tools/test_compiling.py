"""What a first start says of the kernels that it compiles, with a compiler that tests make up."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_flatten
from triton import knobs

from fake_cuda import FakeCuda
from powerinfer_kernels import triton_launch
from powerinfer_tools.engine import Engine
from powerinfer_tools.engine.hot import opening
from powerinfer_tools.model.loading import load_model
from split_models import GROUP, Prepared
from strict_device import OUTPUTS


class FakeCompiler:
    """Compiles a kernel when it is first launched, and keeps it on ``disk``, as Triton does; kernels are not
    run: all their results are one."""

    def __init__(self) -> None:
        self.disk, self.loaded = set[object](), set[object]()
        self.compiled, self.launched = list[str](), 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Be behind every launch."""
        for name in OUTPUTS:
            monkeypatch.setattr(triton_launch, name, self._wrapped(name))

    def _wrapped(self, name: str) -> Callable[..., None]:
        def run(*args: Any, **kwargs: Any) -> None:
            planes = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, triton_launch.PlanarRows)]
            if not self._there(name, (name, *((x.row_type, x.columns) for x in planes))):
                return
            self.launched += 1
            for x in tree_flatten([args[index] for index in OUTPUTS[name]])[0]:
                if x is not None:
                    x.fill_(1.0)

        return run

    def _there(self, name: str, key: object) -> bool:
        """Whether the kernel can be launched now."""
        if key in self.loaded:
            return True
        hook, listener = knobs.runtime.jit_cache_hook, knobs.compilation.listener
        function = SimpleNamespace(module="kernels", name=name, jit_function=None)
        more: dict[str, Any] = {"compile": {}, "is_manual_warmup": False, "already_compiled": False}
        if hook is not None and hook(key=str(key), repr="", fn=function, **more):
            return False
        hit = key in self.disk
        if not hit:
            self.compiled.append(name)
            self.disk.add(key)
        if listener is not None:
            listener(src=None, metadata={}, metadata_group={}, times=None, cache_hit=hit)
        self.loaded.add(key)
        return True


class Heard:
    """Progress that notes what it hears."""

    def __init__(self) -> None:
        self.begun, self.notes, self.done, self.ended = list[tuple[str, int | None, str]](), list[str](), 0, 0

    def start(self, description: str, total: int | None, unit: str) -> None:
        self.begun.append((description, total, unit))

    def advance(self, n: int) -> None:
        self.done += n

    def note(self, text: str) -> None:
        self.notes.append(text)

    def finish(self) -> None:
        self.ended += 1


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return Prepared(tmp_path_factory.mktemp("quantised"), "llama-Q4_1")


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> FakeCompiler:
    FakeCuda().install(monkeypatch)
    compiler = FakeCompiler()
    compiler.install(monkeypatch)
    monkeypatch.setattr(opening, "fusing_problem", lambda: None)
    return compiler


def test_a_first_start_says_how_many_kernels_it_compiles(
    quantised: Prepared, compiler: FakeCompiler, tmp_path: Path
) -> None:
    """How many is known before the first; none is compiled once tokens come. The next start says nothing."""
    path = quantised.split([GROUP, quantised.neurons, GROUP], attention=range(3), head=True)
    heard, tokens = Heard(), quantised.tiny.tokens(9)
    with Engine(load_model(path), threads=1, batch=5, device="cuda", progress=heard) as engine:
        count = len(compiler.compiled)
        assert count > 5
        assert heard.begun == [("compiling GPU kernels, once for this model and GPU", count, "kernels")]
        assert (heard.done, heard.ended) == (count, 1)
        (note,) = heard.notes
        assert note.startswith(f"{count} GPU kernels compiled in 0.")
        assert note.endswith(f" s; the next start takes them from {knobs.cache.dir}")
        engine.prefill(tokens[:7])
        engine.decode(tokens[7])
        assert len(compiler.compiled) == count
    compiler.loaded.clear()
    again = Heard()
    with Engine(load_model(path), threads=1, batch=5, device="cuda", progress=again) as engine:
        engine.decode(tokens[7])
    assert len(compiler.compiled) == count
    assert (again.begun, again.notes, again.done) == ([], [], 0)
    assert (knobs.runtime.jit_cache_hook, knobs.compilation.listener) == (None, None)


def test_some_of_the_kernels_are_on_disk(quantised: Prepared, compiler: FakeCompiler) -> None:
    """Their number is that of all, and only those that are compiled are said to be."""
    path, heard = quantised.split([GROUP] * 3), Heard()
    with Engine(load_model(path), threads=1, batch=5, device="cuda"):
        kinds = list(compiler.compiled)
    more = quantised.split([GROUP] * 3, attention=range(3), head=True)
    compiler.loaded.clear()
    with Engine(load_model(more), threads=1, batch=5, device="cuda", progress=heard):
        new = len(compiler.compiled) - len(kinds)
    assert new > 0
    ((_, total, _),) = heard.begun
    assert total == len(compiler.loaded) == heard.done
    assert heard.notes[0].startswith(f"{new} GPU kernels compiled")


def test_a_start_that_fails_ends_what_it_began(
    quantised: Prepared, compiler: FakeCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = Heard()
    path = quantised.split([GROUP] * 3)
    full = torch.OutOfMemoryError("CUDA out of memory.")

    def short(*_: object, **__: object) -> None:
        raise full

    monkeypatch.setattr(triton_launch, "sum_rows", short)
    with Engine(load_model(path), threads=1, batch=5, device="cuda", progress=heard) as engine:
        assert "out of VRAM at the start" in engine.notices[0]
    assert heard.ended == len(heard.begun)
    assert (knobs.runtime.jit_cache_hook, knobs.compilation.listener) == (None, None)
