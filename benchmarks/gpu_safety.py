"""What must hold before anything is timed: no kernel touches memory that is not its own, a budget is kept,
and the calling program's setting of TF32 changes no bit."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from gpu_run import Row, Run

from powerinfer_tools.engine import Engine
from powerinfer_tools.model.loading import load_model

PROMPT = [1, 2, 3, 4, 5]
#: What the sanitizer's own exit code is where it finds something.
FOUND = 97
PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")


def check_safety(run: Run, split: Path, budget: int | None) -> None:
    """All three, on the split file; ``budget``: bytes of the GPU's memory."""
    run.attempt("one token under memcheck", 60, lambda: check_accesses(run, split))
    run.attempt("VRAM taken", 20, lambda: check_budget(run, split, budget or split.stat().st_size // 2))
    run.attempt("logits with TF32 on and off", 20, lambda: check_precision(run, split))


def check_accesses(run: Run, split: Path) -> None:
    """One token of ``split`` under compute-sanitizer's memcheck, where that is there."""
    tool = shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *PLACES]))
    if tool is None or run.kind != "cuda":
        run.missing.append(
            "memcheck: it needs a GPU and compute-sanitizer, which comes with the CUDA toolkit"
        )
        return
    command = [tool, "--tool", "memcheck", "--error-exitcode", str(FOUND), sys.executable, "-m",
               "powerinfer_cli", "run", "-m", str(split), "--raw", "-p", "a", "-n", "2", "--temp", "0",
               "--device", "cuda"]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=max(1.0, run.seconds_left)
    )
    if done.returncode:
        said = [
            line for line in (done.stdout + done.stderr).splitlines() if "Invalid" in line or "Error" in line
        ]
        run.wrong.append(f"memcheck: exit code {done.returncode}: {(said or ['no message'])[0]}")


def check_budget(run: Run, split: Path, budget: int) -> None:
    """What is gone of the GPU's memory, beside the ``budget`` that was promised."""
    with Engine(load_model(split), device=run.kind, vram=budget, context=64) as engine:
        engine.prefill(PROMPT)
        taken = engine.report().memory.vram_peak
    if taken is None:
        run.missing.append(f"VRAM taken: {run.kind} does not count it")
        return
    run.add(Row(f"VRAM taken, of {budget >> 20} MiB promised", taken / 2**20, "MiB"))
    if taken > budget:
        run.wrong.append(f"--vram is exceeded by {(taken - budget) / 2**20:.1f} MiB")


def check_precision(run: Run, split: Path) -> None:
    """The calling program may allow TF32; products stay those of float32."""
    matmul, rows = torch.backends.cuda.matmul, []
    before = matmul.allow_tf32
    try:
        for allowed in (False, True):
            matmul.allow_tf32 = allowed
            with Engine(load_model(split), device=run.kind, context=64) as engine:
                rows.append(engine.prefill(PROMPT * 8).copy())
    finally:
        matmul.allow_tf32 = before
    if not np.array_equal(rows[0], rows[1]):
        run.wrong.append(f"TF32 changes logits by up to {np.abs(rows[0] - rows[1]).max():.2g}")
