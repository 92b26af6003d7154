"""Compares logits with those that another program wrote for the same random models.

``compare_family.py DIR [NAME …]`` opens every DIR/models/NAME.gguf, computes the logits of the token ids in
DIR/logits/NAME.ids and compares them with DIR/logits/NAME.f32, float32 (tokens, vocabulary). For each model
it prints the largest difference over the standard deviation of the logits, of the C engine and of the float64
reference, or why the model is refused. A family agrees where they are below 0.002 and 0.001. Exit status 1
where a model opens and differs, or NAME is given and refused.
"""

import argparse
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / part) for part in (".", "formats", "kernels")]

from powerinfer_formats.errors import FormatError  # noqa: E402
from powerinfer_tools.engine import Engine  # noqa: E402
from powerinfer_tools.errors import ModelError  # noqa: E402
from powerinfer_tools.model.loading import Model, load_model  # noqa: E402
from powerinfer_tools.model.reference import forward  # noqa: E402

#: Largest difference, over the deviation of the logits, of a family that agrees: the engine's cache holds
#: half precision.
BOUNDS = {"engine": 2e-3, "reference": 1e-3}


@dataclass(frozen=True)
class Row:
    """What came of one model."""

    name: str
    state: str  # agrees, differs, opens or refused
    text: str


def compare(folder: Path, name: str) -> Row:
    """Compare one model."""
    try:
        model = load_model(folder / "models" / f"{name}.gguf")
    except (ModelError, FormatError) as error:
        return Row(name, "refused", str(error).split(".gguf: ", 1)[-1])
    if not (folder / "logits" / f"{name}.f32").exists():
        return Row(name, "opens", "there are no logits to compare with")
    tokens = [int(part) for part in (folder / "logits" / f"{name}.ids").read_text().replace(",", " ").split()]
    expected = np.fromfile(folder / "logits" / f"{name}.f32", np.float32).reshape(len(tokens), -1)
    parts = {"engine": _engine(model, tokens), "reference": forward(model, tokens)}
    deviation = float(expected.std())
    errors = {key: float(np.abs(got - expected).max()) / deviation for key, got in parts.items()}
    agrees = all(error < BOUNDS[key] for key, error in errors.items())  # a NaN is no agreement
    text = ", ".join(f"{key} {error:.6f}" for key, error in errors.items())
    return Row(name, "agrees" if agrees else "differs", text)


def _engine(model: Model, tokens: list[int]) -> npt.NDArray[np.float64]:
    """Half of the tokens as one batch, the others one by one."""
    engine = Engine(model, threads=1, context=len(tokens))
    first = len(tokens) // 2
    rows = [row.copy() for logits in engine.score(tokens[:first]) for row in logits]
    rows += [engine.decode(token).copy() for token in tokens[first:]]
    engine.close()
    return np.stack(rows).astype(np.float64)


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*")
    options = parser.parse_args()
    names = options.names or sorted(path.stem for path in (options.folder / "models").glob("*.gguf"))
    counts = Counter[str]()
    for name in names:
        row = compare(options.folder, name)
        counts[row.state] += 1
        print(f"{row.name:24} {row.state:8} {row.text}", flush=True)
    print(", ".join(f"{count} {state}" for state, count in sorted(counts.items())))
    return int(bool(counts["differs"] or (options.names and counts["refused"])))


if __name__ == "__main__":
    sys.exit(main())
