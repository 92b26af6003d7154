"""Unfinished work of relufy: parameters, optimiser state and the course so far, as safetensors."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from powerinfer_formats.atomic import write_atomic
from powerinfer_formats.errors import BadSafetensors
from powerinfer_tools.stages.relufy.options import Reading

Tensor = torch.Tensor


@dataclass(frozen=True)
class Checkpoint:
    """``work`` is a hash of model, corpus and options; ``tensors`` holds all that training changes, by
    name."""

    work: str
    layers_done: int
    step: int
    pressure: float
    first_density: float
    dense_perplexity: float
    seconds: float
    history: tuple[Reading, ...]
    tensors: dict[str, Tensor]

    def save(self, path: Path) -> None:
        """Write ``path`` atomically."""
        from safetensors.torch import save

        state = {key: value for key, value in vars(self).items() if key != "tensors"}
        state["history"] = [vars(reading) for reading in self.history]
        data = save(
            {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()},
            metadata={"powerinfer": json.dumps(state)},
        )
        with write_atomic(path) as stream:
            stream.write(data)

    @staticmethod
    def load(path: Path) -> "Checkpoint":
        """Read ``path``; raises BadSafetensors for anything that :meth:`save` has not written."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                state = json.loads((file.metadata() or {})["powerinfer"])
                state["history"] = tuple(Reading(**reading) for reading in state["history"])
                tensors = {name: file.get_tensor(name) for name in list(file.keys())}
                return Checkpoint(**state, tensors=tensors)
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise BadSafetensors(path, f"is not a checkpoint of relufy: {error}") from None
