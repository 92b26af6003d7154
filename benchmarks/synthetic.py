"""Write a model of a real shape with random weights as GGUF, for measuring speed; any GGUF reader takes it.

python benchmarks/synthetic.py mistral-7b Q4_0 FILE [--layers N]
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from powerinfer_tools.measure.synthetic.models import TYPES, write_synthetic
from powerinfer_tools.measure.synthetic.shapes import SHAPES


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Write a model of a real shape with random weights as GGUF.")
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument(
        "type", choices=TYPES, help="row type of the matrices, or a mixture as quantisers make it"
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--layers", type=int, help="fewer layers than the real model, for a quick look")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    shape, name = SHAPES[options.shape], options.shape
    if options.layers is not None:
        if not 1 <= options.layers <= shape.layers:
            parser.error(f"--layers is {options.layers}; {name} has 1 to {shape.layers}")
        shape, name = replace(shape, layers=options.layers), f"{name} cut to {options.layers} layers"
    size = write_synthetic(options.file, name, shape, options.type, options.seed)
    print(f"{options.file}: {size / 2**20:,.0f} MiB, {name} {options.type}, random weights")
    return 0


if __name__ == "__main__":
    sys.exit(main())
