"""Hugging Face directories against ``transformers``: the same logits and greedy text, from every family."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from powerinfer_formats.errors import FormatError, MissingTensor
from powerinfer_formats.fingerprint import model_fingerprint
from powerinfer_formats.gguf_reader import GGUFFile
from powerinfer_formats.gguf_writer import GGUFWriter
from powerinfer_tools.engine import Engine
from powerinfer_tools.model.huggingface import ModelFolder
from powerinfer_tools.model.loading import load_model
from powerinfer_tools.model.reference import forward
from powerinfer_tools.text import Tokenizer
from tiny_folders import FOLDER_CASES, FolderCase, TinyFolder, make_folder, save_tokenizer
from tiny_models import FAMILY_CASES, make_tiny_model

TOKENS = 24
HALF = 2.0**-11  # unit roundoff of half precision, which keys and values are cached in


@pytest.fixture(params=sorted(FOLDER_CASES), scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyFolder:
    """One directory of each family and trait."""
    return make_folder(tmp_path_factory.mktemp("folder") / "model", FOLDER_CASES[request.param])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> TinyFolder:
    """A small llama."""
    return make_folder(tmp_path_factory.mktemp("plain") / "model", FOLDER_CASES["llama"])


def test_reference_agrees_with_transformers(folder: TinyFolder) -> None:
    """Float64 against float32: a few hundred roundings of the largest logit."""
    tokens = folder.tokens(TOKENS)
    expected = folder.logits(tokens)
    got = forward(load_model(folder.path), tokens)
    assert np.abs(got - expected).max() <= 100 * np.finfo(np.float32).eps * np.abs(expected).max()


def test_engine_and_greedy_text_agree_with_transformers(folder: TinyFolder) -> None:
    """The cache rounds to half precision: keys and values of each layer by one unit roundoff."""
    tokens = folder.tokens(TOKENS)
    expected = folder.logits(tokens)
    model = load_model(folder.path)
    engine = Engine(model, threads=1)
    got = np.concatenate([rows.copy() for rows in engine.score(tokens)])
    assert np.abs(got - expected).max() <= 2 * model.hyper.layers * HALF * np.abs(expected).max()
    engine.rewind(0)
    logits = engine.prefill(tokens[:5])
    chosen = []
    for _ in range(5):
        chosen.append(int(logits.argmax()))
        logits = engine.decode(chosen[-1])
    engine.close()
    assert chosen == folder.greedy(tokens[:5], 5)


#: What directories of models are called that the transformers package has not, by family.
RENAMED = {
    "bamboo": {"model_type": "bamboo", "architectures": ["BambooForCausalLM"]},
    "llama-fatrelu": {
        "model_type": "sparsellama",
        "architectures": ["SparseLlamaForCausalLM"],
        "hidden_act": "fatrelu",
        "hidden_act_param": FAMILY_CASES["llama-fatrelu"].cut,
    },
}


@pytest.mark.parametrize("name", sorted(FAMILY_CASES))
def test_a_gguf_file_of_the_same_values_is_the_same_model(tmp_path: Path, name: str) -> None:
    """Every tensor under the name and in the row order that converters give it, every size and constant."""
    tiny = make_tiny_model(tmp_path, FAMILY_CASES[name], name)
    tiny.module.save_pretrained(tmp_path / name)
    config = json.loads((tmp_path / name / "config.json").read_text())
    (tmp_path / name / "config.json").write_text(json.dumps(config | RENAMED.get(name, {})))
    with GGUFFile.open(tiny.path) as gguf, ModelFolder.open(tmp_path / name) as model:
        assert set(model.tensors) == set(gguf.tensors)
        for tensor in gguf.tensors:
            made, stored = model.tensor(tensor, shape=gguf.info(tensor).shape), gguf.tensor(tensor)
            if tensor == "rope_freqs.weight" or (
                tensor.endswith("norm.weight") and name.startswith(("gem", "nem"))
            ):
                # Frequencies are there from float32, here from the formula; (w − 1) + 1 is rounded twice.
                assert np.allclose(made.view(np.float32), stored.view(np.float32), rtol=5e-7, atol=3e-7)
            else:
                assert np.array_equal(made, stored), tensor
    folder, file = load_model(tmp_path / name), load_model(tiny.path)
    assert folder.spec == file.spec
    for field, value in vars(file.hyper).items():
        expected = pytest.approx(value, rel=1e-6) if isinstance(value, float) else value
        assert getattr(folder.hyper, field) == expected, field


def test_weights_are_mapped_not_copied(plain: TinyFolder) -> None:
    with ModelFolder.open(plain.path) as model:
        for name in model.tensors:
            kept = not name.endswith(("attn_q.weight", "attn_k.weight"))
            assert (model.tensor(name).base is not None and not model.tensor(name).flags.owndata) or not kept
            assert not model.tensor(name).flags.writeable


def test_vocabulary_special_ids_and_template(plain: TinyFolder) -> None:
    with ModelFolder.open(plain.path) as model:
        tokenizer = Tokenizer.from_gguf(model)
        text = "The harbour, naïve 世 <tool> done"
        assert tokenizer.encode(text) == plain.tokenizer.encode(text).ids
        assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, {2})
        assert tokenizer.vocabulary == plain.tokenizer.get_vocab_size() + 5
        assert "bos_token" in model.get("tokenizer.chat_template", str)


def test_written_as_gguf_it_is_the_same_model(plain: TinyFolder, tmp_path: Path) -> None:
    """What convert and relufy do: metadata and tensors passed on; ids and logits stay."""
    path = tmp_path / "out.gguf"
    with ModelFolder.open(plain.path) as model, GGUFWriter(path) as writer:
        writer.copy_metadata(model)
        for name, info in model.tensors.items():
            writer.declare(name, info.row_type, info.shape)
        for name in model.tensors:
            writer.write(name, model.tensor(name))
    tokens = plain.tokens(TOKENS)
    assert np.array_equal(forward(load_model(path), tokens), forward(load_model(plain.path), tokens))
    with GGUFFile.open(path) as gguf, ModelFolder.open(plain.path) as model:
        text = " two  spaces <|im_start|>"
        ids = [Tokenizer.from_gguf(source).encode(text, parse_special=True) for source in (gguf, model)]
        assert ids[0] == ids[1]


def test_shards_are_joined(tmp_path: Path) -> None:
    sharded = make_folder(tmp_path / "sharded", FOLDER_CASES["llama-sharded"])
    whole = make_folder(tmp_path / "whole", FolderCase("Llama", "llama2", {"tie_word_embeddings": True}))
    assert len(list(sharded.path.glob("*.safetensors"))) > 3
    with ModelFolder.open(sharded.path) as one, ModelFolder.open(whole.path) as other:
        assert set(one.tensors) == set(other.tensors)
        assert all(np.array_equal(one.tensor(name), other.tensor(name)) for name in one.tensors)


def test_the_fingerprint_changes_with_weights_and_files(plain: TinyFolder, tmp_path: Path) -> None:
    def fingerprint(folder: Path) -> str:
        with ModelFolder.open(folder) as model:
            return model_fingerprint(model)

    copy = tmp_path / "copy"
    copy.mkdir()
    for file in plain.path.iterdir():
        (copy / file.name).symlink_to(file)  # as in the hub's cache
    first = fingerprint(plain.path)
    assert fingerprint(copy) == first
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").unlink()
    (copy / "config.json").write_text(json.dumps(config | {"rope_theta": 20000.0}))
    second = fingerprint(copy)
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 2
    (copy / "model.safetensors").unlink()
    save_file(weights, copy / "model.safetensors")
    assert len({first, second, fingerprint(copy)}) == 3


def test_the_text_model_inside_of_an_image_model(tmp_path: Path) -> None:
    """Both orders of names, with towers that are passed over."""
    text = make_folder(tmp_path / "text", FOLDER_CASES["gemma3"])
    tokens = text.tokens(9)
    expected = forward(load_model(text.path), tokens)
    config = json.loads((text.path / "config.json").read_text())
    weights = load_file(text.path / "model.safetensors")
    outer = {
        "model_type": "gemma3",
        "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": config,
    }
    for index, start in enumerate(("language_model.model.", "model.language_model.")):
        path = tmp_path / f"image{index}"
        path.mkdir()
        (path / "config.json").write_text(json.dumps(outer))
        renamed = {start + name.removeprefix("model."): value for name, value in weights.items()}
        renamed["vision_tower.patch.weight"] = np.zeros((3, 3), np.float32)
        save_file(renamed, path / "model.safetensors")
        assert np.array_equal(forward(load_model(path), tokens), expected)


def test_old_spellings_of_rotary_settings(tmp_path: Path) -> None:
    """``rope_theta`` and ``rope_scaling``, as files had them before ``rope_parameters``."""
    for name in ("llama-3.1", "llama-linear", "gemma3"):
        made = make_folder(tmp_path / name, FOLDER_CASES[name])
        tokens = made.tokens(9)
        expected = forward(load_model(made.path), tokens)
        config = json.loads((made.path / "config.json").read_text())
        rope = config.pop("rope_parameters")
        if "full_attention" in rope:
            config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
            del config["layer_types"]
            rope = rope["full_attention"]
        config["rope_theta"] = rope.pop("rope_theta")
        config["rope_scaling"] = rope
        (made.path / "config.json").write_text(json.dumps(config))
        assert np.array_equal(forward(load_model(made.path), tokens), expected)


def test_a_folder_that_is_closed_gives_nothing_more(plain: TinyFolder) -> None:
    model = ModelFolder.open(plain.path)
    model.close()
    with pytest.raises(ValueError, match="has been closed"):
        model.tensor("token_embd.weight")


def test_errors_name_the_tensor_as_it_is_stored(plain: TinyFolder, tmp_path: Path) -> None:
    for file in plain.path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] = np.zeros((7, 48), np.float32)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(
        FormatError, match=r"'model.layers.1.mlp.up_proj.weight' in model.safetensors has .* 7 × 48"
    ):
        load_model(tmp_path)


def test_a_head_beside_the_embedding_is_taken_and_said(tmp_path: Path) -> None:
    """A directory that says "tied" and brings another head: transformers takes the head, and so do we."""
    folder = tmp_path / "whole"
    make_folder(folder, FolderCase("Llama", "llama2", {"tie_word_embeddings": True}))
    weights = load_file(folder / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    for head, taken in ((embedding, False), (embedding[::-1].copy(), True)):
        save_file({**weights, "lm_head.weight": head}, folder / "model.safetensors")
        with ModelFolder.open(folder) as source:
            assert ("output.weight" in source.tensors) == taken
            assert [("of its own" in notice) for notice in source.notices] == [True] * taken


TIED = FolderCase("Llama", "llama2", {"tie_word_embeddings": True})


def test_a_model_without_head_is_one_where_the_head_is_the_embedding(tmp_path: Path) -> None:
    """Saved as LlamaModel, with names that begin with nothing: what transformers makes of it, we do."""
    made = make_folder(tmp_path / "whole", TIED)
    bare = tmp_path / "bare"
    made.module.base_model.save_pretrained(bare)
    save_tokenizer(bare, made.tokenizer)
    config = json.loads((bare / "config.json").read_text())
    assert config["architectures"] == ["LlamaModel"]
    assert "embed_tokens.weight" in load_file(bare / "model.safetensors")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(bare, dtype=torch.float32)
    tokens = made.tokens(20)
    with torch.no_grad():
        expected = theirs(torch.tensor([tokens])).logits[0].numpy()
    assert np.abs(expected - made.logits(tokens)).max() < 1e-5  # it has found all weights
    assert np.abs(forward(load_model(bare), tokens) - expected).max() < 2e-4
    (bare / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(MissingTensor, match=r"has no tensor 'lm_head\.weight', which is needed here"):
        load_model(bare)  # transformers draws a random head


@pytest.mark.parametrize("start", ["base_model.model.", "model.", "_orig_mod.", "module."])
@pytest.mark.parametrize("tied", [True, False])
def test_whatever_stands_before_all_names(tmp_path: Path, start: str, tied: bool) -> None:
    made = make_folder(tmp_path / "whole", replace(TIED, config={"tie_word_embeddings": tied}))
    tokens = made.tokens(20)
    expected = forward(load_model(made.path), tokens)
    weights = load_file(made.path / "model.safetensors")
    save_file({start + name: value for name, value in weights.items()}, made.path / "model.safetensors")
    assert np.array_equal(forward(load_model(made.path), tokens), expected)
