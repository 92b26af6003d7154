"""Small valid files of every kind, as bytes: what scripts/fuzz.py damages."""

import json
import struct
import tempfile
from pathlib import Path

from gguf_bytes import VALID
from powerinfer_formats.gguf_layout import ValueType
from powerinfer_formats.records import dump_json
from powerinfer_formats.trace import encode_frame, write_trace
from profiles import make_expert_profile, make_profile
from sentencepiece_bytes import sentencepiece_bytes
from test_delta import make as make_delta
from test_hardware import TEXT
from test_plan import PLAN
from test_predictors import make as make_predictors
from test_trace import header, records

_TOKENIZER = {
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"], "unk_token": None},
    "added_tokens": [{"id": 3, "content": "<x>", "special": True, "lstrip": True, "normalized": False}],
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
    "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<x>"}}]},
}
_ROPE = {
    "rope_theta": 1e6,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4},
}


#: Rows of the table of architectures, and families whose files differ in more: one of each kind of block.
_ROWS = ("llama", "gemma3", "qwen2moe", "falcon", "phi2")
_HYBRID = ("mamba2", "qwen3next", "deepseek2")


def _models(folder: Path) -> list[bytes]:
    """Small models with random weights."""
    from hybrid_families import FAMILIES, write_random_family
    from powerinfer_tools.model.architectures import ARCHITECTURES
    from random_families import write_random

    paths = [write_random(folder / name, ARCHITECTURES[name]) for name in _ROWS if name in ARCHITECTURES]
    for key, family in FAMILIES.items():
        if family.name in _HYBRID:
            paths.append(write_random_family(folder / key, family))
    return [path.read_bytes() for path in paths]


def _vocabularies(folder: Path) -> list[bytes]:
    """Files of nothing but a vocabulary."""
    from powerinfer_formats.gguf_writer import GGUFWriter
    from small_vocabularies import byte_level, spm

    for name, made in (("bpe", byte_level()), ("spm", spm())):
        with GGUFWriter(folder / name) as writer:
            for key, value in made.metadata.items():
                kind = ValueType.UINT32 if isinstance(value, int) else None
                writer.add(key, value, kind)
    return [(folder / name).read_bytes() for name in ("bpe", "spm")]


def seeds() -> dict[str, list[bytes]]:
    """By the names of the readers."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_delta().save(folder / "delta")
        make_delta(activation="fatrelu", row_type="Q4_1").save(folder / "delta2")
        make_profile().save(folder / "profile")
        make_expert_profile().save(folder / "expert profile")
        make_predictors().save(folder / "predictors")
        PLAN.save(folder / "plan")
        write_trace(folder / "trace", header(), [encode_frame(*record) for record in records()])
        models, vocabularies = folder / "models", folder / "vocabularies"
        models.mkdir()
        vocabularies.mkdir()
        large = {"model": _models(models), "vocabulary": _vocabularies(vocabularies)}
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    row = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
    head = json.dumps({"__metadata__": {"a": "b"}, "x": row}).encode()
    return large | {
        "gguf": [VALID],
        "safetensors": [struct.pack("<Q", len(head)) + head + bytes(16)],
        "sentencepiece": [sentencepiece_bytes([("<unk>", 0.0, 2), ("a", -1.0, 1), ("ab", -2.0, 1)])],
        "tokenizer": [dump_json(_TOKENIZER).encode()],
        "rope": [dump_json(_ROPE).encode(), b'{"rope_scaling": {"type": "linear", "factor": 2}}'],
        "delta": [files["delta"], files["delta2"]],
        "trace": [files["trace"]],
        "profile": [files["profile"], files["expert profile"]],
        "plan": [files["plan"]],
        "hardware": [TEXT.encode()],
        "predictors": [files["predictors"]],
        "kernels": [bytes(range(256)) * 8, b"\xff" * 300, b"\x00\x7c" * 600],
    }
