"""Everything about a GPU in one run of less than eight minutes: compiles, checks, times, prints a table.

    python benchmarks/gpu.py                                   # on a CUDA machine
    python benchmarks/gpu.py --source MODEL.gguf               # makes the split file by the command's stages
    python benchmarks/gpu.py -m MODEL.powerinfer.gguf --peer MODEL.gguf
    python benchmarks/gpu.py --device cpu                      # without a GPU: what can be measured there

First comes what must hold: one token under memcheck, the VRAM that was promised, no bit changed by TF32. Then
kernels are compared with float64 and timed beside a plain read of memory. The whole engine is checked against
the CPU alone and timed beside it, with all of the plan in the GPU's memory and with half; and llama.cpp with
as many layers in as much memory, where ``llama-cpp-python`` and the dense model (--source or --peer) are
there.
A check that fails is a line at the end, and so is what was not measured; the run goes on.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from gpu_engines import Speeds, make_split, measure_engines, measure_host, measure_peer
from gpu_kernels import Sizes, measure_attention, measure_exchange, measure_read, measure_row_types
from gpu_run import Run
from gpu_safety import check_safety

from powerinfer_tools import detect
from powerinfer_tools.engine.hot.cuda_checks import cuda_problem
from powerinfer_tools.engine.hot.devices import CpuDevice, CudaDevice, Device
from powerinfer_tools.engine.hot.fusing import fusing_problem

LIMIT_SECONDS = 450.0


def open_device(name: str) -> tuple[Device, str | None]:
    """The device, and why its fused kernels cannot be used."""
    if name == "cpu":
        return CpuDevice(), "they run on CUDA only"
    return CudaDevice(), fusing_problem()


def measure_kernels(run: Run, sizes: Sizes, problem: str | None) -> float | None:
    """All kernels; the speed of a plain read, None where there is none."""
    found: list[float] = []
    run.attempt("a read of the device's memory", 5, lambda: found.append(measure_read(run, sizes.nbytes)))
    run.attempt("handing over", 5, lambda: measure_exchange(run, sizes.width))
    if problem is not None:
        run.missing.append(f"fused kernels: {problem}; plain torch operations were timed in their place")
    if not found:
        return None
    measure_row_types(run, sizes, found[0], fused=problem is None)
    measure_attention(run, sizes, found[0], fused=problem is None)
    return found[0]


def prepared_split(run: Run, options: argparse.Namespace, folder: Path) -> Path | None:
    """The split file that was named, or one of the source, in ``folder``; None without either."""
    split: Path | None = options.model
    if split is None and options.source is not None:
        split = make_split(run, options.source, folder)
    if split is None:
        run.missing.append("the whole engine: no model was named (--source, or -m), or none could be split")
    return split


def measure_models(run: Run, options: argparse.Namespace, split: Path, limit: float) -> None:
    """The whole engine, and llama.cpp."""
    peer = options.peer or options.source
    hosts: list[float] = []
    if not run.attempt("the CPU's memory", 5, lambda: hosts.append(measure_host(run))):
        return
    taken: list[int] = []
    budgets = [options.vram, (options.vram or split.stat().st_size) // 2]
    speeds = Speeds(limit, hosts[0])
    run.attempt(
        f"{split.name}",
        60,
        lambda: taken.extend(measure_engines(run, split, budgets, options.tokens, speeds)),
    )
    measure_peer(run, peer, taken, options.tokens, options.peer_python)


def print_table(run: Run, machine: list[str]) -> None:
    """The machine, the rows, what is wrong, and what is not among them."""
    print("\n".join(machine))
    width = max((len(row.name) for row in run.rows), default=0)
    print(f"\n{'':{width}}     speed           of limit    of CPU   error / bound")
    for row in run.rows:
        parts = ["" if value is None else f"{value:.3f}" for value in (row.of_limit, row.of_cpu, row.error)]
        print(
            f"{row.name:{width}}  {row.speed:8.4g} {row.unit:6}  {parts[0]:>9} {parts[1]:>9}   {parts[2]:>9}"
        )
    print(
        "\nof limit: kernels, of a plain read of the device's memory; engines, of what both memories allow; "
        "medians"
    )
    for text in run.wrong:
        print(f"WRONG: {text}")
    for text in run.missing:
        print(f"not measured, or not as asked: {text}")


def machine_lines(device: str) -> list[str]:
    """What was measured on."""
    gpu = detect.cuda_device() if device == "cuda" else "none used"
    shown = f"{gpu.name}, compute capability {gpu.capability}" if isinstance(gpu, detect.CudaDevice) else gpu
    processor = f"CPU    {detect.cpu_name()}, {detect.cores()} cores"
    return [processor, f"GPU    {shown}", f"torch  {torch.__version__}"]


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; 1 where a GPU was asked for and cannot be used, or something is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("-m", "--model", type=Path, help="a split file")
    parser.add_argument("--source", type=Path, help="a dense model to make a split file of")
    parser.add_argument("--peer", type=Path, help="the dense model, for llama.cpp (default: --source)")
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--vram", type=int, help="bytes for the hot side (default: what the plan takes)")
    parser.add_argument("--megabytes", type=int, default=256, help="of each matrix")
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--positions", type=int, default=4096, help="of attention")
    parser.add_argument("-n", "--tokens", type=int, default=64)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    problem = cuda_problem() if options.device == "cuda" else None
    if problem is not None:
        print(f"{problem}; --device cpu measures what can be measured without", file=sys.stderr)
        return 1
    device, unfused = open_device(options.device)
    run = Run(device, options.device, LIMIT_SECONDS)
    sizes = Sizes(options.megabytes << 20, options.width, options.positions)
    with tempfile.TemporaryDirectory() as folder:
        split = prepared_split(run, options, Path(folder))
        if split is not None:
            check_safety(run, split, options.vram)
        limit = measure_kernels(run, sizes, unfused)
        if limit is not None and split is not None:
            measure_models(run, options, split, limit)
    run.missing += getattr(device, "notices", [])
    print_table(run, machine_lines(options.device))
    if options.json:
        result = {"rows": [asdict(row) for row in run.rows], "wrong": run.wrong, "missing": run.missing}
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    device.close()
    return int(bool(run.wrong))


if __name__ == "__main__":
    sys.exit(main())
