"""Token ids of tokenizer.json and tokenizer.model against the packages that own the formats."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, pre_tokenizers
from tokenizers import Tokenizer as PackageTokenizer

from powerinfer_formats.errors import FormatError
from powerinfer_formats.metadata import Metadata
from powerinfer_tools.errors import TokenizerError
from powerinfer_tools.model.huggingface.config import Config
from powerinfer_tools.model.huggingface.vocabulary import add_vocabulary
from powerinfer_tools.text import Tokenizer
from sentencepiece_bytes import sentencepiece_bytes
from tiny_folders import TOKENIZERS, make_tokenizer, save_tokenizer
from tiny_vocabularies import spm_vocabulary

NASTY = [
    "",
    " ",
    "  two  spaces  ",
    "The harbour's 1234567 boats, she'd said.\n\n\tAnd  more\r\n",
    "▁low line▁ ▁▁ end▁",
    "naïve café: 世界 🙂 \u200d e\u0301 ﬁ",
    "<s>begins</s> and <unk> ends<mask>  with  <mask>tools<tool> <tool>x",
    "<|im_start|>user\nhi<|im_start|>",
    "\x00\x7f\ufeff\u00a0\u3000",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa'LL 'tis I'M",
]
#: Characters that Unicode had when the tables of all packages here were made; no surrogates.
TEXT = st.text(st.characters(exclude_categories=("Cs", "Cn", "Co")), max_size=40)
PARTS = st.lists(
    st.sampled_from([*" \n'abethTs1902", "the ", " harbour", "▁", "é", "<s>", "<tool>", "<mask>", "世"])
)


def opened(folder: Path, rows: int) -> Tokenizer:
    """The tokeniser of a directory without weights."""
    metadata = Metadata(folder)
    add_vocabulary(metadata, folder, Config(folder / "config.json", {}), rows)
    return Tokenizer.from_gguf(SimpleNamespace(metadata={k: e.value for k, e in metadata.entries.items()}))


@pytest.fixture(params=TOKENIZERS, scope="module")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    """Ours and theirs."""
    theirs = make_tokenizer(request.param)
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder, theirs)
    return opened(folder, theirs.get_vocab_size()), theirs


@pytest.mark.parametrize("text", NASTY)
def test_nasty_texts(pair: tuple[Tokenizer, Any], text: str) -> None:
    ours, theirs = pair
    assert ours.encode(text, parse_special=True) == theirs.encode(text).ids


@settings(derandomize=True, deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
@given(text=TEXT | PARTS.map("".join))
def test_any_text(pair: tuple[Tokenizer, Any], text: str) -> None:
    ours, theirs = pair
    ids = theirs.encode(text).ids
    assert ours.encode(text, parse_special=True) == ids


def test_what_is_read_comes_back(pair: tuple[Tokenizer, Any]) -> None:
    ours, _ = pair
    text = "The old road, and the harbour."
    assert ours.decode(ours.encode(text)).removeprefix(" ") == text  # a byte-level prefix stays


def save_vocab_and_merges(folder: Path, **settings: Any) -> Path:
    """A directory of GPT-2's kind, with the special tokens that OPT has."""
    folder.mkdir(exist_ok=True)
    make_tokenizer("gpt2").model.save(str(folder))
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "bos_token": {"content": "</s>", "lstrip": False, "rstrip": False, "normalized": True},
        "eos_token": "</s>",
        "unk_token": "</s>",
        "added_tokens_decoder": {
            "331": {"content": "<tool>", "special": False, "normalized": False},
            "332": {"content": "<mask>", "special": True, "lstrip": True, "rstrip": True},
        },
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config | settings))
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<unk>", "eos_token": "<s>"}))
    return folder


@pytest.fixture(params=[False, True], ids=["plain", "prefix"], scope="module")
def two_files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vocab_and_merges(tmp_path_factory.mktemp("two"), add_prefix_space=request.param)


@pytest.mark.parametrize("text", [*NASTY, "</s>ends</s> <unk>"])
def test_vocab_and_merges(two_files: Path, text: str) -> None:
    """Against the package's own byte-level BPE over the same two files, with the same added tokens."""
    theirs = PackageTokenizer(
        models.BPE.from_file(str(two_files / "vocab.json"), str(two_files / "merges.txt"))
    )
    prefix = json.loads((two_files / "tokenizer_config.json").read_text())["add_prefix_space"]
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    theirs.add_special_tokens(["</s>", "<unk>"])
    theirs.add_tokens([AddedToken("<tool>", normalized=False)])
    theirs.add_special_tokens([AddedToken("<mask>", lstrip=True, rstrip=True)])
    assert theirs.token_to_id("<mask>") == 331
    expected = [{330: 331, 331: 332}.get(token, token) for token in theirs.encode(text).ids]
    assert opened(two_files, 340).encode(text, parse_special=True) == expected


def test_special_tokens_of_vocab_and_merges(tmp_path: Path) -> None:
    """Roles of tokenizer_config.json come before those of special_tokens_map.json."""
    metadata = Metadata(tmp_path)
    save_vocab_and_merges(tmp_path, add_bos_token=True)
    add_vocabulary(metadata, tmp_path, Config(tmp_path / "config.json", {}), 340)
    values = {key: entry.value for key, entry in metadata.entries.items()}
    roles = ("bos", "eos", "unknown", "padding")
    assert [values[f"tokenizer.ggml.{role}_token_id"] for role in roles] == [2, 2, 2, 0]
    assert values["tokenizer.ggml.add_bos_token"]
    assert values["tokenizer.ggml.pre"] == "gpt2"


@pytest.mark.parametrize(
    ("settings", "missing", "model_type", "message"),
    [
        ({"tokenizer_class": "CLIPTokenizer"}, "", "opt", "of a CLIPTokenizer are not supported"),
        ({"tokenizer_class": None}, "", "llama", "whose class no file names"),
        ({}, "merges.txt", "opt", "merges.txt: is missing: vocab.json and merges.txt are read together"),
        ({}, "vocab.json", "opt", "vocab.json: is missing: vocab.json and merges.txt are read together"),
    ],
)
def test_vocab_and_merges_of_another_kind_are_named(
    tmp_path: Path, settings: dict[str, Any], missing: str, model_type: str, message: str
) -> None:
    save_vocab_and_merges(tmp_path, **settings)
    if missing:
        (tmp_path / missing).unlink()
    config = Config(tmp_path / "config.json", {"model_type": model_type})
    with pytest.raises((TokenizerError, FormatError), match=message):
        add_vocabulary(Metadata(tmp_path), tmp_path, config, 340)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("#version: 0.2\nT h\nT h e\n", "no two parts without spaces at 1"),
        ("#version: 0.2\n", "merges is missing or empty"),
        ("T \n", "no two parts without spaces at 0"),
    ],
)
def test_damaged_merges_are_named(tmp_path: Path, text: str, message: str) -> None:
    save_vocab_and_merges(tmp_path)
    (tmp_path / "merges.txt").write_text(text)
    with pytest.raises(FormatError, match=message):
        opened(tmp_path, 340)


def test_an_opt_directory_names_no_class(tmp_path: Path) -> None:
    save_vocab_and_merges(tmp_path, tokenizer_class=None)
    config = Config(tmp_path / "config.json", {"model_type": "opt"})
    add_vocabulary(metadata := Metadata(tmp_path), tmp_path, config, 340)
    assert metadata.entries["tokenizer.ggml.model"].value == "gpt2"


def changed(folder: Path, change: Any) -> Path:
    """A directory whose tokenizer.json was changed by ``change``."""
    save_tokenizer(folder, make_tokenizer("gpt2"))
    document = json.loads((folder / "tokenizer.json").read_text())
    change(document)
    (folder / "tokenizer.json").write_text(json.dumps(document))
    return folder


def _set(*path: Any, value: Any) -> Any:
    def change(document: Any) -> None:
        for name in path[:-1]:
            document = document[name]
        document[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("model", "type", value="Unigram"), "type 'Unigram' is not supported"),
        (_set("model", "type", value="WordPiece"), "type 'WordPiece' is not supported"),
        (_set("model", "dropout", value=0.1), "model.dropout is not supported"),
        (_set("model", "end_of_word_suffix", value="</w>"), "end_of_word_suffix is not supported"),
        (_set("model", "ignore_merges", value=True), "ByteLevel True with ignore_merges is not supported"),
        (_set("normalizer", value={"type": "Lowercase"}), "the normaliser Lowercase is not supported"),
        (_set("pre_tokenizer", value={"type": "Whitespace"}), r"the way from text to words \(Whitespace\)"),
        (_set("pre_tokenizer", value=None), r"the way from text to words \(none\)"),
        (
            _set("pre_tokenizer", value={"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": "x+"}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]}),
            r"pre-tokeniser Split x\+ Isolated \+ ByteLevel False is not supported",
        ),
        (_set("added_tokens", 0, "content", value="other"), "token 0 'other', the vocabulary '<unk>'"),
        (_set("model", "vocab", "<s>", value=-1), "no number below"),
        (_set("model", "vocab", "<s>", value=0), "two tokens of id 0"),
        (_set("model", "vocab", "<s>", value=True), "no number below"),
        (_set("model", "vocab", value=[]), "model.vocab is not an object"),
        (_set("model", "merges", value=[]), "merges is missing or empty"),
        (_set("model", "merges", 0, value=["a", ""]), "no two parts without spaces at 0"),
        (_set("model", value=None), "model.merges is missing or empty"),
        (_set("pre_tokenizer", value={"type": 3}), "pre_tokenizer.type is 3"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_named(tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(Exception, match=message) as error:
        opened(changed(tmp_path, change), 400)
    assert type(error.value).__module__.startswith("powerinfer")


def test_a_merge_of_no_tokens_is_named(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, make_tokenizer("llama2"))
    document = json.loads((tmp_path / "tokenizer.json").read_text())
    document["model"]["merges"].append(["zz", "qq"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(TokenizerError, match="needs 'zz', which is no token"):
        opened(tmp_path, 600)


def test_a_tokeniser_of_another_model_is_refused(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("gpt2")
    save_tokenizer(tmp_path, tokenizer)
    rows = tokenizer.get_vocab_size() // 2
    with pytest.raises(TokenizerError, match=rf"has a token \d+, the model's embedding {rows} rows"):
        opened(tmp_path, rows)


def test_beginning_and_end_as_the_files_say(tmp_path: Path) -> None:
    def ids(**settings: Any) -> list[int]:
        save_tokenizer(tmp_path, make_tokenizer(settings.pop("kind", "gpt2")), **settings)
        return opened(tmp_path, 700).encode("")

    assert ids() == []
    assert ids(add_bos_token=True) == [1]
    assert ids(add_bos_token=True, add_eos_token=True) == [1, 2]
    assert ids(kind="llama2") == [1]
    assert ids(kind="llama2", add_bos_token=False) == []
    assert ids(add_bos_token=True, bos_token=None) == []


def test_end_ids_of_generation_and_templates(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, make_tokenizer("gpt2"), chat_template=[
        {"name": "tool", "template": "T"}, {"name": "default", "template": "D"}])  # fmt: skip
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7, 100000]}))
    metadata = Metadata(tmp_path)
    add_vocabulary(metadata, tmp_path, Config(tmp_path / "config.json", {"eos_token_id": 9}), 400)
    assert metadata.entries["tokenizer.chat_template"].value == "D"
    source = SimpleNamespace(metadata={k: e.value for k, e in metadata.entries.items()})
    assert Tokenizer.from_gguf(source).eos_ids == {2, 7, 9}
    (tmp_path / "chat_template.jinja").write_text("J")
    metadata = Metadata(tmp_path)
    add_vocabulary(metadata, tmp_path, Config(tmp_path / "config.json", {}), 400)
    assert metadata.entries["tokenizer.chat_template"].value == "J"


# --- tokenizer.model ---------------------------------------------------------------------------------------


def test_a_sentencepiece_model_gives_the_ids_of_its_gguf_form(tmp_path: Path) -> None:
    known = spm_vocabulary(gemma=False)
    pieces = list(zip(known.tokens, known.scores, map(int, known.types), strict=True))
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_bytes(pieces))
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    added = {str(len(pieces)): {"content": "<|im_start|>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named | {"added_tokens_decoder": added}))
    tokenizer = opened(tmp_path, len(pieces) + 3)
    source = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [*known.tokens, "<|im_start|>"],
        "tokenizer.ggml.scores": [*known.scores, -1000.0],
        "tokenizer.ggml.token_type": [*map(int, known.types), 3],
    }
    expected = Tokenizer.from_gguf(SimpleNamespace(metadata=source))
    for text in NASTY:
        for special in (False, True):
            assert tokenizer.encode(text, parse_special=special) == expected.encode(
                text, parse_special=special
            )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": 1}, "type UNIGRAM is not supported"),
        ({"charsmap": b"x"}, "a table of characters to rewrite"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces"),
        ({"escape_whitespaces": False}, "escape_whitespaces false"),
    ],
)
def test_sentencepiece_models_that_are_not_supported(tmp_path: Path, options: Any, message: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes(
        sentencepiece_bytes([("<unk>", 0.0, 2), ("a", 0.0, 1)], **options)
    )
    with pytest.raises(TokenizerError, match=message):
        opened(tmp_path, 2)


# --- added tokens
# ---------------------------------------------------------------------------------------------

_CONTENTS = [
    "<x>",
    "<x>y",
    "x>y",
    "the",
    "th",
    "he har",
    " harbour",
    "a b",
    "é",
    "e\u0301",
    "世",
    "▁",
    "1",
    "<|im_start|>",
    "\n\n",
]
_ADDED = st.fixed_dictionaries(
    {
        "content": st.sampled_from(_CONTENTS),
        **{name: st.booleans() for name in ("lstrip", "rstrip", "single_word", "normalized", "special")},
    }
)
_SPACES = " \t\u00a0\u2003\x1c\x1f\u200b\x85"
_ADDED_TEXT = st.lists(
    st.sampled_from([*_CONTENTS, *_SPACES, *"xyabe_'", "Ⓐ", "\u0301", "the harbour", "<s>", "<tool>"]),
    max_size=14,
).map("".join)


@settings(derandomize=True, deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(
    kind=st.sampled_from(sorted(TOKENIZERS)),
    added=st.lists(_ADDED, min_size=1, max_size=5, unique_by=lambda token: token["content"]),
    where=st.sampled_from(["tokenizer.json", "decoder", "added_tokens.json", "named", "decoder again"]),
    texts=st.lists(_ADDED_TEXT, min_size=8, max_size=8),
)
def test_any_added_tokens(
    tmp_path_factory: pytest.TempPathFactory,
    kind: str,
    added: list[dict[str, Any]],
    where: str,
    texts: list[str],
) -> None:
    """Ids are those of transformers, whichever of its files has the tokens and whatever their properties."""
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("added")
    theirs = make_tokenizer(kind)
    save_added(folder, theirs, added, where)
    package = PreTrainedTokenizerFast.from_pretrained(folder)
    ours = opened(folder, len(package))
    for text in texts:
        expected = package.encode(text, add_special_tokens=False)
        assert ours.encode(text, add_bos=False, parse_special=True) == expected, (text, where)


def save_added(folder: Path, theirs: Any, added: list[dict[str, Any]], where: str) -> None:
    """The directory of a tokeniser that gets tokens in one of the places that transformers reads."""
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if where in ("tokenizer.json", "decoder again"):
        theirs.add_tokens([AddedToken(**token) for token in added])
    save_tokenizer(folder, theirs)
    if where == "decoder again":  # the same tokens with other properties
        config["added_tokens_decoder"] = {
            str(theirs.token_to_id(token["content"])): {**token, "lstrip": True, "single_word": False}
            for token in added
        }
    if where == "decoder":
        first = theirs.get_vocab_size()
        config["added_tokens_decoder"] = {str(first + index): token for index, token in enumerate(added)}
    if where == "added_tokens.json":
        first = theirs.get_vocab_size()
        ids = {token["content"]: first + index for index, token in enumerate(added)}
        (folder / "added_tokens.json").write_text(json.dumps(ids))
        config["bos_token"] = added[0]["content"]
    if where == "named":
        config["extra_special_tokens"] = [token["content"] for token in added[1:]]
        config["eos_token"] = {"__type": "AddedToken", **added[0]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def test_tokens_beyond_the_embedding_are_left_out(tmp_path: Path) -> None:
    """As all Gemma 3 text models have one: refused where a text needs it, and not before."""
    theirs = make_tokenizer(sorted(TOKENIZERS)[0])
    theirs.add_special_tokens([AddedToken("<image_soft_token>", special=True)])
    save_tokenizer(tmp_path, theirs)
    ours = opened(tmp_path, theirs.get_vocab_size() - 1)
    assert len(ours.tokens) == theirs.get_vocab_size() - 1
    assert any("'<image_soft_token>': left out" in notice for notice in ours.notices)
    assert ours.encode("the harbour") == theirs.encode("the harbour").ids
    assert ours.encode("<image_soft_token>", parse_special=False)
    with pytest.raises(TokenizerError, match="needs the token '<image_soft_token>'"):
        ours.encode("a <image_soft_token>", parse_special=True)
    with pytest.raises(TokenizerError, match="do not belong together"):
        opened(tmp_path, 10)
