"""Kills every stage at random moments, and looks at what is left.

    python scripts/kill_test.py --kills 100 [--seed 1] [--only convert]

A stage runs to its end first. Then it is killed (SIGKILL) again and again, at any moment or while it
writes. What must hold each time: a file under a final name is the one from before or the complete new one,
inputs are untouched, and nothing else is there but unfinished files, by their documented names; the text of
a model is a beginning of the whole one. Every few kills the same command runs to its end: it must work,
write what it wrote the first time, and leave nothing unfinished. Equal seeds choose equal moments; what a
moment hits depends on the machine.
"""

import argparse
import fnmatch
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEXT = "the cat sat on the mat and the dog sat on the log; a quick brown fox jumps over the lazy dog. " * 60
#: Names of unfinished work: what is being written, and what a stage goes on from.
_UNFINISHED = (".*.partial", "*.unfinished", "*.unfinished.safetensors", "*.incomplete")
#: What is being written; the second by the cache of the hub.
_BEING_WRITTEN = (".*.partial", "*.incomplete")
#: The repository of the hub that pull fetches, and its place in the hub's cache.
_REPOSITORY = "o/relu-GGUF"
_COMMIT = "0123456789abcdef0123456789abcdef01234567"
_CACHE = "cache/hub/models--o--relu-GGUF"
#: Memory of a run of sparse.powerinfer.gguf with half of its neurons.
NEURONS_RAM = 62 << 20
#: Kills between two runs to the end.
_RERUN = 5
#: Share of kills that wait until something is being written.
_WRITING = 0.5


@dataclass(frozen=True)
class Stage:
    """One command, and what it writes."""

    words: str
    outputs: tuple[str, ...]
    #: Outputs that say when or how fast something was: compared by their being read, not by their bytes.
    timed: tuple[str, ...] = ()
    #: Patterns of what the command keeps for its own order, and may be there at any time.
    beside: tuple[str, ...] = ()
    #: Words that a run to the end says on one of its lines.
    says: str = ""
    #: Whether standard output is the text of a model, of which a kill may leave a beginning alone.
    text: bool = False


STAGES: dict[str, Stage] = {
    "profile": Stage(
        "profile -m relu.gguf --corpus text.txt --ctx 64 --trace 900 -t 1",
        ("relu.profile.safetensors", "relu.trace.zst"),
    ),
    "train": Stage("train -m relu.gguf --budget 0.9 --recall 0.8 -t 1", ("relu.predictors.safetensors",)),
    "threshold": Stage(
        "threshold -m silu.gguf --text text.txt --max-ppl-increase 5% --ctx 64 -t 1",
        ("silu.thresholds.safetensors",),
    ),
    "plan": Stage("plan -m relu.gguf --hardware pc-low --vram 33MiB --ctx 64", ("relu.plan.json",)),
    "convert": Stage("convert -m relu.gguf", ("relu.powerinfer.gguf",)),
    "quantize": Stage("quantize -m relu.gguf --type Q8_0 -o quantized.gguf", ("quantized.gguf",)),
    "relufy": Stage(
        "relufy -m silu.gguf --corpus text.txt --steps 4 --fit-windows 2 --batch 1 -c 32 -t 1"
        " --save-delta silu.delta.zst",
        ("silu.relu.gguf", "silu.delta.zst"),
    ),
    "delta": Stage("relufy -m silu.gguf --delta made.delta.zst -o again.gguf", ("again.gguf",)),
    "trace": Stage(
        "run --raw -m relu.gguf -p the -n 8 --temp 0 -t 1 --trace run.json",
        ("run.json",),
        timed=("run.json",),
    ),
    "pull": Stage(
        f"pull {_REPOSITORY}",
        (f"{_CACHE}/snapshots/{_COMMIT}/relu-Q8_0.gguf", f"{_CACHE}/refs/main"),
        beside=("cache/hub/.locks/*", "cache/hub/CACHEDIR.TAG", f"{_CACHE}/blobs/*"),
    ),
    "disk": Stage(
        "run --raw -m moe.gguf -p the -n 12 --temp 0 -t 1 --ram {ram} --learn moe.learnt.safetensors",
        ("moe.learnt.safetensors",),
        timed=("moe.learnt.safetensors",),
        says="read from disk",
        text=True,
    ),
    "neurons": Stage(
        "run --raw -m sparse.powerinfer.gguf -p the -n 24 --temp 0 -t 1 -c 64 --ram {neurons}",
        (),
        says="read from disk",
        text=True,
    ),
}


@dataclass
class Place:
    """The folder of one stage, and what it held before and after a run to the end."""

    folder: Path
    inputs: dict[str, bytes] = field(default_factory=dict)
    results: dict[str, bytes] = field(default_factory=dict)
    #: What a run to the end printed.
    printed: bytes = b""

    @property
    def output(self) -> Path:
        """Standard output of the last command."""
        return self.folder.parent / f"{self.folder.name}.out"


class Fault(Exception):
    """What a kill or a run has left that must not be."""


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, by its path there."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def forked(folder: Path, work: Callable[[], int]) -> int:
    """The id of a child that does `work` in `folder`, in a group of its own, without a word."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setpgid(0, 0)
        os.chdir(folder)
        (folder / "tmp").mkdir(exist_ok=True)
        os.environ["TMPDIR"] = tempfile.tempdir = str(folder / "tmp")
        for number, kind in ((1, "out"), (2, "log")):
            path = folder.parent / f"{folder.name}.{kind}"
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
        code = work()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    finally:
        os._exit(code)


def command(words: str) -> Callable[[], int]:
    """The command line with these words, in this process: everything is imported already."""

    def work() -> int:
        from powerinfer_cli.app import create_app
        from powerinfer_tools.detect import resident_bytes

        # What this process has already, and half of the experts of moe.gguf (27 MiB), or of the neurons.
        ram = resident_bytes() + (48 << 20)
        arguments = words.format(ram=ram, neurons=resident_bytes() + NEURONS_RAM).split()
        create_app((arguments[0],))(arguments, prog_name="powerinfer")
        return 0

    return work


def wait(child: int) -> int:
    """Its exit code."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run_to_the_end(place: Place, stage: Stage) -> float:
    """Seconds that the command took. Raises Fault where it fails or leaves anything unfinished."""
    began = time.monotonic()
    code = wait(forked(place.folder, command(stage.words)))
    seconds = time.monotonic() - began
    if code != 0:
        log = (place.folder.parent / f"{place.folder.name}.log").read_text()
        raise Fault(f"ended with {code}:\n{log[-2000:]}")
    printed = place.output.read_bytes()
    said = (place.folder.parent / f"{place.folder.name}.log").read_text() + printed.decode()
    if stage.says not in said:
        raise Fault(f"a run to the end did not say {stage.says!r}:\n{said[-2000:]}")
    if stage.text and (not printed or printed != (place.printed or printed)):
        raise Fault(f"printed {printed!r}, and before {place.printed!r}")
    place.printed = printed
    now = contents(place.folder)
    for name in stage.outputs:
        if name not in now:
            raise Fault(f"{name} is not there after a run to the end")
    left = {name for name in set(now) - set(place.inputs) - set(stage.outputs) if not is_beside(name, stage)}
    if left:
        raise Fault(f"a run to the end left {', '.join(sorted(left))}")
    return seconds


def is_unfinished(name: str) -> bool:
    """Whether the path, or a folder on it, has such a name."""
    return any(fnmatch.fnmatch(part, pattern) for part in Path(name).parts for pattern in _UNFINISHED)


def is_beside(name: str, stage: Stage) -> bool:
    """Whether the command keeps such a file beside its outputs, complete."""
    return not is_unfinished(name) and any(fnmatch.fnmatch(name, pattern) for pattern in stage.beside)


def is_being_written(folder: Path) -> bool:
    """Whether anything is, at this moment."""
    return any(
        fnmatch.fnmatch(name, pattern)
        for _, _, names in os.walk(folder)
        for name in names
        for pattern in _BEING_WRITTEN
    )


def judge(place: Place, stage: Stage) -> list[str]:
    """The unfinished files after a kill. Raises Fault."""
    if stage.text and not place.printed.startswith(place.output.read_bytes()):
        raise Fault(f"printed {place.output.read_bytes()!r}, which is no beginning of {place.printed!r}")
    now = contents(place.folder)
    for name, data in place.inputs.items():
        if now.pop(name, None) != data:
            raise Fault(f"the input {name} is changed")
    left = []
    for name, data in now.items():
        if name in stage.outputs:
            if name not in stage.timed and data != place.results[name]:
                raise Fault(f"{name} is there and is not the complete file")
        elif name.startswith("tmp/") or is_unfinished(name):
            left.append(name)
        elif not is_beside(name, stage) or data != place.results.get(name, data):
            raise Fault(f"{name} is left, by a name that no document has")
    return left


def kill_once(place: Place, stage: Stage, rng: random.Random, seconds: float) -> bool:
    """Start the command and kill it; False where it had ended before."""
    child = forked(place.folder, command(stage.words))
    if stage.outputs and rng.random() < _WRITING:
        end = time.monotonic() + 2 * seconds + 5
        while time.monotonic() < end and not is_being_written(place.folder):
            if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                break
            time.sleep(0.0005)
        time.sleep(rng.random() ** 4 * 0.1)
    else:
        time.sleep(rng.random() * seconds * 1.1)
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:  # it has not made its group yet
        os.kill(child, signal.SIGKILL)
    return wait(child) == -signal.SIGKILL


def kill_stage(place: Place, stage: Stage, kills: int, rng: random.Random) -> tuple[int, int]:
    """Kills that hit, and how often something unfinished was left. Raises Fault."""
    place.inputs = contents(place.folder)
    seconds = run_to_the_end(place, stage)
    place.results = {
        name: data
        for name, data in contents(place.folder).items()
        if name in stage.outputs or is_beside(name, stage)
    }
    hit = left = 0
    for count in range(kills):
        if rng.random() < 0.7:  # else what was there before stays, whole
            for name in place.results:
                (place.folder / name).unlink(missing_ok=True)
        hit += kill_once(place, stage, rng, seconds)
        left += bool(judge(place, stage))
        if (count + 1) % _RERUN and count + 1 < kills:
            continue
        run_to_the_end(place, stage)
        judge(place, stage)
    return hit, left


def prepare(folder: Path) -> None:
    """Models, a text and a delta; what later stages read is made by earlier ones."""
    from dataclasses import replace

    from tiny_models import CASES, FAMILY_CASES, make_tiny_model

    relu = replace(FAMILY_CASES["llama-relu"], neurons=512)
    make_tiny_model(folder, relu, "relu")
    make_tiny_model(folder, replace(relu, activation="silu"), "silu")
    experts = replace(CASES["qwen3moe"], experts=32, neurons=384, width=128, row_type="F16")
    make_tiny_model(folder, experts, "moe")
    make_sparse(folder / "sparse.powerinfer.gguf")
    (folder / "text.txt").write_text(TEXT)


def make_sparse(path: Path) -> None:
    """A split file of which a tenth of the neurons fires, with the vocabulary of the tiny models."""
    from dataclasses import replace

    from powerinfer_tools.measure.synthetic.shapes import SHAPES
    from powerinfer_tools.measure.synthetic.sparse import Sparsity, write_sparse

    sizes = {"layers": 6, "width": 512, "heads": 8, "kv_heads": 2, "head_dim": 64, "neurons": 4096}
    shape = replace(SHAPES["mistral-7b"], **sizes, vocabulary=2048)
    write_sparse(path, "sparse", shape, "Q4_0", Sparsity(0.1, 0.3))


def make_inputs(folder: Path) -> None:
    """One folder with everything that some stage reads."""
    place = Place(folder)
    if wait(forked(folder, lambda: prepare(folder) or 0)) != 0:
        raise Fault((folder.parent / f"{folder.name}.log").read_text())
    for words in (
        "profile -m relu.gguf --corpus text.txt --ctx 64 --trace 900 -t 1",
        "profile -m silu.gguf --corpus text.txt --ctx 64 -t 1",
        "train -m relu.gguf --budget 0.9 --recall 0.8 -t 1",
        "plan -m relu.gguf --hardware pc-low --vram 33MiB --ctx 64",
        "relufy -m silu.gguf --corpus text.txt --steps 4 --fit-windows 2 --batch 1 -c 32 -t 1"
        " --save-delta made.delta.zst -o made.gguf",
    ):
        if wait(forked(folder, command(words))) != 0:
            raise Fault(f"{words}:\n{(folder.parent / f'{folder.name}.log').read_text()}")
    shutil.rmtree(folder / "tmp", ignore_errors=True)
    del place


@contextmanager
def small_hub(inputs: Path) -> Iterator[None]:
    """A hub on the loopback that has one of the models, in the variables that say where the hub is."""
    from small_hub import SmallHub

    model = (inputs / "relu.gguf").read_bytes()
    hub = SmallHub({_REPOSITORY: {"relu-Q8_0.gguf": model}}, pause=0.02)
    with hub.serving():
        os.environ |= {"HF_HOME": "cache", "HF_ENDPOINT": hub.endpoint, "NO_PROXY": "127.0.0.1"}
        yield


def import_everything() -> None:
    """Once, here: a child begins with its work."""
    from powerinfer_cli.app import COMMANDS, create_app

    create_app(COMMANDS)
    for folder in ("stages", "generate", "engine", "quality"):
        for path in sorted((ROOT / "powerinfer_tools" / folder).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            if "harness" not in name and "ray" not in name:
                with suppress(ImportError):
                    import_module(name)
    for name in ("torch", "highspy", "zstandard", "safetensors.numpy", "jinja2", "huggingface_hub"):
        with suppress(ImportError):
            import_module(name)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="of all stages together")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=list(STAGES))
    options = parser.parse_args()
    for name in ("tools", "formats"):
        sys.path.insert(0, str(ROOT / "tests" / name))
    os.environ |= {"XDG_CONFIG_HOME": os.devnull, "OMP_NUM_THREADS": "1"}
    names = [options.only] if options.only else list(STAGES)
    with tempfile.TemporaryDirectory(prefix="powerinfer-kills-") as root, ExitStack() as held:
        inputs = Path(root) / "inputs"
        inputs.mkdir()
        make_inputs(inputs)
        held.enter_context(small_hub(inputs))
        import_everything()
        total = 0
        for index, name in enumerate(names):
            stage, folder = STAGES[name], Path(root) / name
            shutil.copytree(inputs, folder)
            for output in stage.outputs:
                (folder / output).unlink(missing_ok=True)
            kills = options.kills // len(names) + (index < options.kills % len(names))
            try:
                hit, left = kill_stage(Place(folder), stage, kills, random.Random(f"{options.seed} {name}"))  # noqa: S311
            except Fault as fault:
                sys.exit(f"{name}: {fault}")
            print(f"{name:>10} {hit:>6} kills, {left} with an unfinished file", flush=True)
            total += hit
    print(f"{'all':>10} {total:>6} kills, nothing wrong")


if __name__ == "__main__":
    main()
