"""What inspect says of models' files: those that run, those that are refused, and those that are damaged."""

import json
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from typer.testing import CliRunner

from powerinfer_cli.app import create_app
from powerinfer_formats.errors import TensorPastEnd
from powerinfer_tools.errors import TokenizerError
from powerinfer_tools.inspect import describe
from powerinfer_tools.text.vocabulary import require_supported
from shards import write_shards
from tiny_folders import FOLDER_CASES, FolderCase, make_folder


def written(path: Path, family: str, *, pre: str = "qwen2", kind: int | None = None) -> Path:
    """A file with two tensors of a family, which is not a whole model."""
    writer = GGUFWriter(path, family)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_tensor("token_embd.weight", np.zeros((64, 256), np.float32))
    if kind is None:
        writer.add_tensor("blk.0.ffn_up_exps.weight", np.zeros((2, 8, 256), np.float32))
    else:
        writer.add_tensor(
            "blk.0.ffn_up.weight", np.zeros((8, 66), np.uint8), raw_dtype=GGMLQuantizationType(kind)
        )
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()
    return path


def test_a_model_that_runs(smollm2: Path) -> None:
    verdict = describe(smollm2).facts["verdict"]
    assert (verdict["family"], verdict["runs"], verdict["activation"]) == ("llama", True, "silu")
    assert verdict["true_zeros"] is False
    assert set(verdict["parts"]) == {"FFN", "embedding", "attention", "norms and others"}
    # Row types stay what they are; the tied head is packed beside the rows of the embedding.
    assert verdict["memory_bytes"] == sum(verdict["parts"].values()) + verdict["parts"]["embedding"]
    assert verdict["cache_bytes"] == 4096 * 30 * 2 * 192 * 2


def test_a_directory_with_true_zeros(tmp_path: Path) -> None:
    made = make_folder(tmp_path / "m", FolderCase("Llama", "llama2", {"hidden_act": "relu"}))
    verdict = describe(made.path).facts["verdict"]
    assert (verdict["runs"], verdict["activation"], verdict["true_zeros"]) == (True, "relu", True)


@pytest.mark.parametrize(
    ("family", "reason"),
    [("mamba3", "architecture 'mamba3' is not supported"), ("llama", "has no metadata 'llama.")],
)
def test_a_family_that_is_refused_is_described(tmp_path: Path, family: str, reason: str) -> None:
    description = describe(written(tmp_path / "m.gguf", family))
    verdict = description.facts["verdict"]
    assert (description.kind, verdict["family"], verdict["runs"]) == ("model", family, False)
    assert verdict["reason"].startswith(reason)
    assert "(supported:" not in verdict["reason"]
    assert verdict["parts"] == {"embedding": 64 * 256 * 4, "experts": 2 * 8 * 256 * 4}
    assert [tensor.name for tensor in description.tensors] == [
        "token_embd.weight",
        "blk.0.ffn_up_exps.weight",
    ]


def test_rows_that_take_more_in_memory_say_how_much(tmp_path: Path) -> None:
    """IQ2_XXS: 66 bytes for 256 values in the file, 4.375 bits a value in memory."""
    verdict = describe(written(tmp_path / "m.gguf", "llama", kind=16)).facts["verdict"]
    assert verdict["parts"]["FFN"] == 8 * 66
    assert verdict["memory_bytes"] == 64 * 256 * 4 + 8 * 256 * 35 // 64


def test_a_file_that_is_cut_off_is_described_by_its_header(smollm2: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    with smollm2.open("rb") as file:
        path.write_bytes(file.read(2_000_000))
    description = describe(path)
    assert description.kind == "damaged model"
    assert isinstance(description.fault, TensorPastEnd)
    assert len(description.tensors) == 272
    assert "the file is incomplete: fetch or copy it again" in description.facts["verdict"]["reason"]
    path.write_bytes(path.read_bytes()[:500])  # inside the metadata
    assert describe(path).facts["architecture"] == "llama"
    assert describe(path).tensors == ()


def test_a_shard_whose_others_are_missing(tmp_path: Path) -> None:
    first, second = write_shards(written(tmp_path / "m.gguf", "llama"), tmp_path, [1, 1])
    second.unlink()
    description = describe(first)
    assert "m-00002-of-00002.gguf is missing" in description.facts["verdict"]["reason"]
    assert description.facts["architecture"] == "llama"


def test_a_directory_that_is_refused_is_described(tmp_path: Path) -> None:
    made = make_folder(tmp_path / "m", FOLDER_CASES["llama-sharded"])
    config = json.loads((made.path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (made.path / "config.json").write_text(json.dumps(config))
    description = describe(made.path)
    verdict = description.facts["verdict"]
    assert (verdict["family"], verdict["runs"]) == ("llama", False)
    assert "gptq" in verdict["reason"]
    assert description.facts["bytes"] == sum(file.stat().st_size for file in made.path.glob("*.safetensors"))


def test_a_vocabulary_that_is_not_supported(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(metadata: object) -> None:
        raise TokenizerError("vocabulary type 'bert' is not supported")

    monkeypatch.setattr("powerinfer_tools.inspect.verdict.require_supported", refuse)
    verdict = describe(smollm2).facts["verdict"]
    assert not verdict["runs"]
    assert verdict["reason"].startswith("its weights can be computed with, but no text read or written: voc")


def test_kinds_of_vocabularies_are_judged_without_reading_tokens() -> None:
    require_supported({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2"})
    require_supported({"tokenizer.ggml.model": "gemma4"})
    with pytest.raises(TokenizerError, match="'t5'"):
        require_supported({"tokenizer.ggml.model": "t5"})
    with pytest.raises(TokenizerError, match="'whitespace'"):
        require_supported({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "whitespace"})


def test_the_command_ends_with_1_for_a_damaged_file(smollm2: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    with smollm2.open("rb") as file:
        path.write_bytes(file.read(2_000_000))
    app = create_app(("inspect",))
    ended = CliRunner().invoke(app, ["inspect", str(path)])
    assert ended.exit_code == 1
    assert ended.stdout == ""
    assert "the file is incomplete" in ended.stderr
    assert (
        json.loads(CliRunner().invoke(app, ["inspect", str(path), "--json"]).stdout)["verdict"]["runs"]
        is False
    )
