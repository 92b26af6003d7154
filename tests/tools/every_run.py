"""One small file of each way to run a model, for tests of what must not change a bit."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from powerinfer_formats.profile import Profile
from powerinfer_tools.measure.synthetic.shapes import Shape
from powerinfer_tools.measure.synthetic.sparse import Sparsity, write_sparse
from powerinfer_tools.stages.convert.conversion import ConvertOptions, convert
from powerinfer_tools.stages.threshold import ThresholdOptions, run_threshold
from predicted_models import TEXT, profiled
from small_plans import plan_for
from split_models import GROUP, Prepared
from tiny_models import CASES, FAMILY_CASES, make_tiny_model

SPARSE = Shape("llama", 2, 128, 2, 1, 64, 384, 512, 1e4, tied=True)


def sparse(folder: Path) -> Path:
    """A synthetic model that every mode runs, with heads that a q8_0 cache can hold."""
    path = folder / "sparse.gguf"
    write_sparse(path, "small", SPARSE, "Q4_0", Sparsity(0.2))
    return path


def source(case: str) -> Callable[[Path], Path]:
    return lambda folder: make_tiny_model(folder, FAMILY_CASES[case]).path


def split(*, attention: tuple[int, ...] = ()) -> Callable[[Path], Path]:
    return lambda folder: Prepared(folder, "llama-relu").split([GROUP] * 3, "gate-first", attention=attention)


def thresholded(folder: Path) -> Path:
    tiny = make_tiny_model(folder, replace(CASES["llama"], neurons=192, layers=2))
    profile, plan = profiled(folder, tiny), folder / "plan.json"
    report = run_threshold(
        ThresholdOptions(tiny.path, profile, TEXT, folder / "tiny.thresholds.safetensors", 0.05, 64, 4, 1)
    )
    plan_for(Profile.load(profile), [GROUP] * 2, group=GROUP, width=tiny.spec.width).save(plan)
    output = folder / "tiny.powerinfer.gguf"
    convert(ConvertOptions(tiny.path, profile, plan, output, quant="F32", thresholds=Path(report.output)))
    return output


#: What is run: how its file is made, with which options, and the types of its caches.
RUNS: dict[str, tuple[Callable[[Path], Path], dict[str, object], tuple[str, ...]]] = {
    "dense": (sparse, {"mode": "dense"}, ("f16", "q8_0")),
    "gate-first": (sparse, {"mode": "gate-first"}, ("f16", "q8_0")),
    "predicted": (sparse, {"mode": "predicted"}, ("f16", "q8_0")),
    "thresholded": (thresholded, {"mode": "thresholded"}, ("f16",)),
    "windows": (source("gemma3"), {}, ("f16",)),
    "learnt positions": (source("opt"), {}, ("f16",)),
    "parallel blocks": (source("falcon"), {}, ("f16",)),
    "experts": (source("qwen3moe"), {}, ("f16",)),
    "split": (split(), {}, ("f16",)),
    "hot neurons": (split(), {"device": "cpu"}, ("f16",)),
}
