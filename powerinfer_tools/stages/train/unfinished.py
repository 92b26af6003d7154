"""Layers that are tuned already, kept beside the predictors to be made, so that interrupted work goes on."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np

from powerinfer_formats.errors import FormatError
from powerinfer_formats.predictors import LowRank
from powerinfer_formats.records import dump_json
from powerinfer_formats.safetensors_file import open_safetensors, write_safetensors
from powerinfer_tools.stages.train.layer_data import LayerData
from powerinfer_tools.stages.train.naming import Fit, Floats
from powerinfer_tools.stages.train.options import TrainOptions


def unfinished_layers(output: Path) -> Path:
    """The folder of finished layers of unfinished work."""
    return output.with_name(output.name + ".unfinished")


def forget(output: Path) -> None:
    """Remove what was kept."""
    shutil.rmtree(unfinished_layers(output), ignore_errors=True)


class FinishedLayer:
    """The file of one layer. ``start`` is what tuning begins with: another one is other work."""

    def __init__(self, start: Fit, data: LayerData, recall: float, options: TrainOptions) -> None:
        self.path = unfinished_layers(options.output) / f"layer-{data.index}.safetensors"
        assert isinstance(start.made, LowRank)
        self._shapes = {"in": start.made.inward.shape, "out": start.made.outward.shape}
        settings = (data.model.fingerprint, data.trace.header.corpus_hashes, options.seed, options.device)
        digest = hashlib.sha256(json.dumps([*settings, recall, data.index]).encode())
        for array in (start.made.inward, start.made.outward, start.mean, start.deviation):
            digest.update(np.ascontiguousarray(array).tobytes())
        self._work = digest.hexdigest()

    def load(self) -> Fit | None:
        """What was kept, or None where nothing of this work was."""
        if not self.path.exists():
            return None
        try:
            with open_safetensors(self.path) as reader:
                if json.loads(reader.document()) != {"work": self._work}:
                    return None
                inward, outward = (reader.take(name, "F32", shape) for name, shape in self._shapes.items())
                neurons = (self._shapes["out"][0],)
                scale, mean, deviation = (
                    reader.take(name, "F32", neurons) for name in ("scale", "mean", "deviation")
                )
        except (FormatError, ValueError):
            return None
        return Fit(LowRank(inward, outward, np.zeros(neurons, np.float32)), scale, mean, deviation)

    def keep(self, made: Fit) -> None:
        """Write the file."""
        assert isinstance(made.made, LowRank)
        self.path.parent.mkdir(exist_ok=True)
        tensors: dict[str, Floats] = {"in": made.made.inward, "out": made.made.outward}
        tensors |= {"scale": made.scale, "mean": made.mean, "deviation": made.deviation}
        write_safetensors(self.path, dump_json({"work": self._work}, indent=None), tensors)
