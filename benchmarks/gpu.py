"""Everything about a GPU in one run of less than eight minutes: compiles, checks, times, prints a table.

    python benchmarks/gpu.py                                  # on a CUDA machine
    python benchmarks/gpu.py -m MODEL.powerinfer.gguf --vram 4GiB --peer MODEL.gguf
    python benchmarks/gpu.py --device cpu                     # without a GPU: what can be measured there

Kernels are compared with float64 and timed beside a copy of memory. The whole engine is timed hybrid and on
the CPU alone, in turn; and llama.cpp with as many layers in VRAM as our hot side takes bytes, where
``llama-cpp-python`` and the dense model (--peer) are there. What was not measured is said in the last lines.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
from worker_process import Worker, WorkerError

from powerinfer_kernels import RowType, dequantize
from powerinfer_kernels.triton_layout import PLANAR_TYPES, SPLIT_ROWS, to_planar
from powerinfer_tools.engine import Engine
from powerinfer_tools.hardware import detect
from powerinfer_tools.hot.devices import cuda_problem
from powerinfer_tools.hot.ffn import FileRows
from powerinfer_tools.hot.fusing import fusing_problem
from powerinfer_tools.model import load_model
from powerinfer_tools.synthetic.random_blocks import random_rows

LIMIT_SECONDS = 450.0
#: Different rows of a matrix; more would only take longer to make.
PATTERN_ROWS = 61
PEER = Path(__file__).resolve().parent / "worker_llama_cpp.py"


@dataclass(frozen=True)
class Row:
    """One line of the table: what, its speed in ``unit``, its share of the copy's speed (kernels) or multiple
    of the CPU alone (engines), and the largest error over its bound (kernels: at most 1 is right)."""

    name: str
    speed: float
    unit: str
    relative: float | None
    error: float | None


class Run:
    """The rows so far, what could not be measured, and how much time is left."""

    def __init__(self, device: str, limit: float) -> None:
        self.device, self.rows, self.missing = device, list[Row](), list[str]()
        self._deadline = time.perf_counter() + limit

    @property
    def seconds_left(self) -> float:
        """Until the limit."""
        return self._deadline - time.perf_counter()

    def has_time_for(self, what: str, seconds: float) -> bool:
        """Whether ``seconds`` are left; otherwise notes that ``what`` is missing."""
        if self.seconds_left >= seconds:
            return True
        self.missing.append(f"{what}: the time was up")
        return False

    def timed(self, work: Callable[[], object], repetitions: int = 9) -> float:
        """Median seconds of ``work``, which must only queue; the first two runs compile and warm up."""
        times = []
        for _ in range(repetitions + 2):
            self.synchronize()
            started = time.perf_counter()
            work()
            self.synchronize()
            times.append(time.perf_counter() - started)
        return median(times[2:])

    def synchronize(self) -> None:
        """Wait for the GPU."""
        if self.device == "cuda":
            torch.cuda.synchronize()


def measure_kernels(run: Run, neurons: int, width: int) -> None:
    """A copy, then for each row type the hidden values and the sum of ``neurons`` rows."""
    size = 3 * neurons * width
    source = torch.ones(size, dtype=torch.uint8, device=run.device)
    target = torch.empty_like(source)
    copy = 2 * size / run.timed(lambda: target.copy_(source))
    run.rows.append(Row(f"copy of {size >> 20} MiB", copy / 1e9, "GB/s", 1.0, None))
    problem = fusing_problem() if run.device == "cuda" else "they run on CUDA only"
    if problem is not None:
        run.missing.append(f"fused kernels: {problem}; plain torch operations were timed in their place")
    for row_type in PLANAR_TYPES:
        if run.has_time_for(f"{row_type.name} kernels", 20):
            measure_row_type(run, row_type, neurons, width, copy, fused=problem is None)


def measure_row_type(
    run: Run, row_type: RowType, neurons: int, width: int, copy: float, *, fused: bool
) -> None:
    """One matrix serves as gate, up and down: what matters is how many bytes are read."""
    rng = np.random.default_rng(int(row_type))
    pattern = random_rows(rng, row_type.name, PATTERN_ROWS, width).view(np.uint8).reshape(PATTERN_ROWS, -1)
    raw = np.resize(pattern, (neurons, pattern.shape[1]))
    exact = dequantize(pattern, row_type, PATTERN_ROWS, width).astype(np.float64)
    values = np.resize(exact, (neurons, width))
    x = rng.standard_normal((1, width), dtype=np.float32)
    products = values @ x[0].astype(np.float64)
    expected = np.maximum(products, 0) * products
    bound = (width + 4) * np.finfo(np.float32).eps * (np.abs(values) @ np.abs(x[0]).astype(np.float64))
    hidden, sums = (fused_kernels if fused else plain_kernels)(run.device, raw, row_type, x)
    got = hidden().reshape(-1)
    error = float((np.abs(got.cpu().numpy() - expected) / (3 * bound * np.abs(products) + bound**2)).max())
    h = got.cpu().numpy().astype(np.float64)
    total = h @ values
    allowed = (neurons + 4) * np.finfo(np.float32).eps * (np.abs(h) @ np.abs(values))
    sum_error = float((np.abs(sums().cpu().numpy().reshape(-1) - total) / allowed).max())
    active = float((products > 0).mean())
    for name, work, nbytes, worst in (
        ("gate, up and ReLU", hidden, raw.nbytes * (1 + active), error),
        ("sum of down rows", sums, raw.nbytes * active, sum_error),
    ):
        if worst > 1:
            run.missing.append(f"{row_type.name} {name}: WRONG, {worst:.1f} times the bound of rounding")
        rate = nbytes / run.timed(work)
        run.rows.append(Row(f"{row_type.name} {name}", rate / 1e9, "GB/s", rate / copy, worst))


Kernels = tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor]]


def fused_kernels(device: str, raw: np.ndarray, row_type: RowType, x: np.ndarray) -> Kernels:
    """The Triton kernels over the rows ``raw``."""
    from powerinfer_kernels import triton_launch as launch

    neurons, width = len(raw), x.shape[1]
    data = torch.from_numpy(to_planar(raw, row_type, width)).to(device)
    rows = launch.PlanarRows(data, row_type, neurons, width)
    there = torch.from_numpy(x).to(device)
    h, out = torch.empty(1, neurons, device=device), torch.empty(1, width, device=device)
    partial = torch.empty(-(-neurons // SPLIT_ROWS) * width, device=device)

    def hidden() -> torch.Tensor:
        launch.hidden(there, there, rows, rows, ("relu", 0.0), h)
        return h

    def sums() -> torch.Tensor:
        launch.sum_rows(h, rows, partial, out)
        return out

    return hidden, sums


def plain_kernels(device: str, raw: np.ndarray, row_type: RowType, x: np.ndarray) -> Kernels:
    """The same by torch operations over rows as in the file."""
    width = x.shape[1]
    rows = FileRows(row_type, torch.from_numpy(raw).to(device))
    there, space = torch.from_numpy(x).to(device), torch.empty(0, width, device=device)
    kept: list[torch.Tensor] = []

    def hidden() -> torch.Tensor:
        products = there @ rows.chunk(0, len(raw), space).T
        kept[:] = [torch.relu(products) * products]
        return kept[0]

    def sums() -> torch.Tensor:
        return kept[0] @ rows.chunk(0, len(raw), space)

    return hidden, sums


def measure_engines(run: Run, path: Path, vram: int | None, tokens: int) -> int:
    """Decoding, hybrid and on the CPU alone in turn; how many bytes of VRAM the hybrid takes."""
    hybrid = Engine(load_model(path), device=run.device, vram=vram, context=tokens + 16)
    alone = Engine(load_model(path), context=tokens + 16)
    speeds: dict[str, list[float]] = {"hybrid": [], "alone": []}
    try:
        run.missing += hybrid.notices
        for repetition in range(4):
            for name, engine in (("hybrid", hybrid), ("alone", alone)):
                engine.rewind(0)
                engine.prefill([1, 2, 3])
                started = time.perf_counter()
                for _ in range(tokens):
                    engine.decode(5)
                if repetition:
                    speeds[name].append(tokens / (time.perf_counter() - started))
        report = hybrid.report()
        cpu = median(speeds["alone"])
        run.rows.append(Row(f"{path.name}, CPU alone", cpu, "tok/s", 1.0, None))
        ratio = median(a / b for a, b in zip(speeds["hybrid"], speeds["alone"], strict=True))
        shown = f"{path.name}, hybrid ({report.memory.vram >> 20} MiB on {report.device}"
        shown += f", {report.overlap:.0%} overlapped)" if report.overlap is not None else ")"
        run.rows.append(Row(shown, median(speeds["hybrid"]), "tok/s", ratio, None))
        return report.memory.vram
    finally:
        hybrid.close()
        alone.close()


def measure_peer(run: Run, path: Path | None, vram: int, tokens: int, python: str) -> None:
    """llama.cpp with as many whole layers on the GPU as ``vram`` bytes hold."""
    if run.device != "cuda" or path is None:
        run.missing.append("llama.cpp's layer offload: it needs CUDA, and the dense model (--peer FILE)")
        return
    if not Worker.succeeds(python, "import llama_cpp; assert llama_cpp.llama_supports_gpu_offload()"):
        run.missing.append(f"llama.cpp's layer offload: {python} has no llama-cpp-python that uses the GPU")
        return
    model = load_model(path)
    layers, size = model.hyper.layers, path.stat().st_size
    model.close()
    offloaded = min(layers, int(vram // (size / layers)))
    arguments = [str(path), "--threads", str(detect.cores()), "--context", str(tokens + 16)]
    try:
        with Worker(python, PEER, [*arguments, "--gpu-layers", str(offloaded)]) as worker:
            seconds = [worker.ask({"test": "tg", "tokens": tokens, "depth": 0})["seconds"] for _ in range(4)]
    except WorkerError as error:
        run.missing.append(f"llama.cpp's layer offload: {error}")
        return
    cpu = next(row.speed for row in run.rows if row.name.endswith("CPU alone"))
    speed = tokens / median(seconds[1:])
    name = f"llama.cpp, {offloaded} of {layers} layers in the same VRAM"
    run.rows.append(Row(name, speed, "tok/s", speed / cpu, None))


def print_table(run: Run, machine: list[str]) -> None:
    """The machine, the rows, and what is not among them."""
    print("\n".join(machine))
    width = max(len(row.name) for row in run.rows)
    print(f"\n{'':{width}}     speed           relative   error / bound")
    for row in run.rows:
        relative = "" if row.relative is None else f"{row.relative:.2f}"
        error = "" if row.error is None else f"{row.error:.3f}"
        print(f"{row.name:{width}}  {row.speed:8.4g} {row.unit:6}  {relative:>8}   {error:>8}")
    print("\nrelative: kernels to the copy, engines to the CPU alone; medians")
    for text in run.missing:
        print(f"not measured, or not as asked: {text}")


def machine_lines(device: str) -> list[str]:
    """What was measured on."""
    gpu = detect.cuda_device() if device == "cuda" else "none used"
    shown = f"{gpu.name}, compute capability {gpu.capability}" if isinstance(gpu, detect.CudaDevice) else gpu
    processor = f"CPU    {detect.cpu_name()}, {detect.cores()} cores"
    return [processor, f"GPU    {shown}", f"torch  {torch.__version__}"]


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; 1 where a GPU was asked for and cannot be used, or a kernel is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("-m", "--model", type=Path, help="a split file; without it kernels alone")
    parser.add_argument("--peer", type=Path, help="the dense model, for llama.cpp")
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--vram", type=int, help="bytes for the hot side")
    parser.add_argument("--neurons", type=int, default=4096)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("-n", "--tokens", type=int, default=64)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    problem = cuda_problem() if options.device == "cuda" else None
    if problem is not None:
        print(f"{problem}; --device cpu measures what can be measured without", file=sys.stderr)
        return 1
    run = Run(options.device, LIMIT_SECONDS)
    measure_kernels(run, options.neurons, options.width)
    if options.model is None:
        run.missing.append("the whole engine: no split file was named (-m)")
    elif run.has_time_for("the whole engine", 60):
        vram = measure_engines(run, options.model, options.vram, options.tokens)
        if run.has_time_for("llama.cpp's layer offload", 60):
            measure_peer(run, options.peer, vram, options.tokens, options.peer_python)
    print_table(run, machine_lines(options.device))
    if options.json:
        result = {"rows": [asdict(row) for row in run.rows], "missing": run.missing}
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return int(any(row.error is not None and row.error > 1 for row in run.rows))


if __name__ == "__main__":
    sys.exit(main())
