"""Token ids agree with llama.cpp's; text comes back whole."""

import hashlib
import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from powerinfer_formats.gguf_reader import GGUFFile
from powerinfer_tools.errors import TokenizerError
from powerinfer_tools.text import Tokenizer
from powerinfer_tools.text.byte_pair import _chunks
from powerinfer_tools.text.pretokenizers import pre_tokenizer, supported_names
from powerinfer_tools.text.score_merging import ScoreEncoder
from small_vocabularies import BYTE, byte_level, spm

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
BPE = Tokenizer.from_gguf(byte_level())
SPM = Tokenizer.from_gguf(spm())
# SmolLM2's vocabulary lacks a few control characters and the bytes of the planes beyond U+40000.
SPELLABLE = st.characters(min_codepoint=0x20, max_codepoint=0x3FFFF, exclude_categories=["Cs"])


def named(tokenizer: Tokenizer, *texts: str) -> list[int]:
    return [tokenizer.tokens.ids[text] for text in texts]


@pytest.fixture(scope="module")
def smollm2_tokenizer(smollm2: Path) -> Tokenizer:
    with GGUFFile.open(smollm2) as gguf:
        return Tokenizer.from_gguf(gguf)


def test_golden_ids(smollm2_tokenizer: Tokenizer) -> None:
    cases = json.loads((GOLDEN / "smollm2.json").read_text())["tokenize"]["cases"]
    assert len(cases) == 30
    for text, ids in cases:
        assert smollm2_tokenizer.encode(text, add_bos=False) == ids, text
        assert smollm2_tokenizer.decode(ids) == text


def test_golden_text_comes_back_and_chunks_change_nothing(smollm2_tokenizer: Tokenizer) -> None:
    text = (GOLDEN / "northanger-abbey-40kB.txt").read_text() * 4
    ids = smollm2_tokenizer.encode(text)
    assert smollm2_tokenizer.decode(ids) == text
    assert len(_chunks(text)) > 1
    whole = smollm2_tokenizer._encoder._backend.encode(text, add_special_tokens=False).ids  # type: ignore[union-attr]
    assert ids == whole


def test_smollm2_special_ids(smollm2_tokenizer: Tokenizer) -> None:
    tokenizer = smollm2_tokenizer
    assert tokenizer.vocabulary == 49152
    assert tokenizer.bos_id == 1
    assert not tokenizer.adds_bos
    assert tokenizer.eos_ids == {0, 2, 4}  # <|endoftext|>, <|im_end|>, <reponame>, as llama.cpp lists them
    turn = "<|im_start|>user\nHi<|im_end|>"
    assert tokenizer.encode(turn, parse_special=True) == [1, 4093, 198, 26843, 2]
    assert 1 not in tokenizer.encode(turn)


def test_merges_by_rank() -> None:
    assert BPE.encode("hello hello") == named(BPE, "hello", "Ġhello")
    assert BPE.encode("hel") == named(BPE, "he", "l")


def test_word_boundaries_stop_merges() -> None:
    # The second space belongs to the second word, so that the two cannot become "ĠĠ".
    assert BPE.encode("he  he") == named(BPE, "he", "Ġ", "Ġ", "he")
    assert BPE.encode("12") == named(BPE, "1", "2")


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("gpt-2", "it's 1234 ABC'S", ["it", "'s", "Ġ1234", "ĠABC", "'", "S"]),
        ("smollm", "it's 123 4", ["it", "'s", "Ġ", "1", "2", "3", "Ġ", "4"]),
        ("llama-bpe", "it'S 1234567 a\n\n b", ["it", "'S", "Ġ", "123", "456", "7", "Ġa", "ĊĊ", "Ġb"]),
        ("qwen2", "it's 123!?\n\n x(y", ["it", "'s", "Ġ", "1", "2", "3", "!?ĊĊ", "Ġx", "(y"]),
        ("default", "a12345 b...", ["a", "123", "45", "Ġb", "..."]),
        ("falcon", "a12345 b", ["a", "123", "45", "Ġb"]),
        # U+1C89 became a letter in Unicode 16, which llama.cpp does not know yet: it leads the next word.
        ("qwen2", "a\u1c89b", ["a", "á²īb"]),
    ],
)
def test_pre_tokenizers_split(pre: str, text: str, words: list[str]) -> None:
    tokenizer = Tokenizer.from_gguf(byte_level(pre=pre))
    backend = tokenizer._encoder._backend  # type: ignore[union-attr]
    assert [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)] == words


def test_every_pre_tokenizer_cuts_a_nasty_text_as_llama_cpp_does() -> None:
    """Hashes of the pieces, made when scripts/compare_tokenizers.py found the same ids for every name."""
    golden = json.loads((GOLDEN / "pre_tokenizers.json").read_text())
    assert set(golden["pieces"]) == {name for name in supported_names() if not pre_tokenizer(name).raw}
    for name, expected in golden["pieces"].items():
        backend = Tokenizer.from_gguf(byte_level(pre=name))._encoder._backend  # type: ignore[union-attr]
        pieces = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(golden["text"])]
        digest = hashlib.sha256("\0".join(pieces).encode()).hexdigest()[:16]
        assert [len(pieces), digest] == expected, name


def test_a_vocabulary_without_a_default_bos() -> None:
    assert Tokenizer.from_gguf(byte_level(pre="glm4", bos_token_id=None)).bos_id is None
    assert Tokenizer.from_gguf(byte_level(pre="qwen2", bos_token_id=None)).bos_id == 11


RWKV_WORDS = (
    b" the",
    b" then",
    b"then",
    b"th",
    b"\n\n",
    "\u00e9t".encode(),
    "\u6c34\u6c34".encode(),
    b"a\\b",
    b"'\"",
)

#: Ids of the text below, by llama-tokenize.
RWKV_IDS = [
    259,
    257,
    258,
    261,
    11,
    260,
    102,
    33,
    262,
    196,
    170,
    33,
    263,
    231,
    177,
    181,
    33,
    264,
    33,
    98,
    93,
    100,
    33,
    265,
    40,
    33,
    1,
    241,
    160,
    153,
    129,
]


def rwkv(words: tuple[bytes, ...] = RWKV_WORDS, *, all_bytes: bool = True) -> SimpleNamespace:
    """Token 0 is a control token, then come single bytes, then ``words``, as the converter writes them."""
    tokens = [*(bytes((value,)) for value in range(256 if all_bytes else 97)), *words]
    texts = ["<s>", *(repr(token)[2:-1] for token in tokens)]
    metadata = {
        "tokenizer.ggml.model": "rwkv",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": np.array([3] + [1] * len(tokens), np.int32),
    }
    return SimpleNamespace(metadata=metadata)


def test_rwkv_takes_the_longest_token() -> None:
    """The ids are llama.cpp's, but for a control token that stands in a text."""
    tokenizer = Tokenizer.from_gguf(rwkv())
    text = "then the then\n\n\nthe \u00e9t\u00e9 \u6c34\u6c34\u6c34 a\\b a\\c '\"' \x00\U0001f600"
    ids = tokenizer.encode(text)
    assert ids == RWKV_IDS
    assert tokenizer.decode(ids) == text
    assert tokenizer.bos_id is None
    assert not tokenizer.adds_bos
    assert tokenizer.encode("<s>") == [1 + ord(char) for char in "<s>"]
    assert tokenizer.encode("<s>", parse_special=True) == [0]
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode("\u6c34\u00e9"))).decode() == "\u6c34\u00e9"
    with pytest.raises(TokenizerError, match="the vocabulary has no token for the byte 0x62"):
        Tokenizer.from_gguf(rwkv(all_bytes=False)).encode("Ab")


def test_gemma4_merges_within_lines_and_takes_runs_of_line_ends_as_they_are() -> None:
    texts = [
        *(f"<0x{value:02X}>" for value in range(256)),
        "a",
        "b",
        "\n",
        "\n\n",
        "▁",
        "ab",
        "▁a",
        "a\n",
        "b\n",
    ]
    metadata = {
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": np.array([BYTE] * 256 + [1] * (len(texts) - 256), np.int32),
        "tokenizer.ggml.merges": ["a \n", "b \n", "a b", "▁ a", "\n \n"],
        "tokenizer.ggml.add_space_prefix": False,
    }
    tokenizer = Tokenizer.from_gguf(SimpleNamespace(metadata=metadata))
    ids = tokenizer.encode("ab\n\na a\n\n\nbé")
    assert [tokenizer.token_text(token) for token in ids[:8]] == [
        "ab",
        "\n\n",
        "a",
        " a",
        "\n\n",
        "\n",
        "b",
        "\ufffd",
    ]
    assert tokenizer.decode(ids) == "ab\n\na a\n\n\nbé"


def test_unknown_pre_tokenizer_is_named_with_the_supported_ones() -> None:
    with pytest.raises(TokenizerError, match=r"'martian'.*not supported.*llama-bpe.*qwen2.*smollm"):
        Tokenizer.from_gguf(byte_level(pre="martian"))


def test_missing_pre_tokenizer_is_told() -> None:
    assert "no pre-tokeniser" in Tokenizer.from_gguf(byte_level(pre=None)).notices[0]
    assert BPE.notices == ()


def test_ignore_merges_takes_whole_words() -> None:
    # "hello" cannot be reached: the merge of "hell" and "o" is missing.
    merges = ["h e", "l l", "he ll"]
    assert Tokenizer.from_gguf(byte_level(pre="dbrx", merges=merges)).encode("hello") == named(
        BPE, "hell", "o"
    )
    assert Tokenizer.from_gguf(byte_level(pre="llama-bpe", merges=merges)).encode("hello", add_bos=False) == (
        named(BPE, "hello")
    )


def test_first_of_equal_merges_has_the_rank() -> None:
    merges = ["l l", "h e", "he ll", "h e", "e l"]
    assert Tokenizer.from_gguf(byte_level(merges=merges)).encode("hell") == named(BPE, "hell")


def test_characters_without_token_vanish_as_in_llama_cpp() -> None:
    # The first byte of 世 has no token here, nor has the merged pair: only what is a token remains.
    tokenizer = Tokenizer.from_gguf(byte_level(merges=["a b", "b c", "ab q"]))
    assert tokenizer.encode("世x") == named(BPE, "x")
    assert tokenizer.encode("abq") == named(BPE, "a", "b", "q")  # "ab" and "abq" are no tokens


def test_control_tokens_only_where_trusted_user_defined_always() -> None:
    text = "he<|im_end|><tag>he"
    assert BPE.encode(text, parse_special=True) == named(BPE, "he", "<|im_end|>", "<tag>", "he")
    untrusted = BPE.encode(text)
    assert BPE.tokens.ids["<|im_end|>"] not in untrusted
    assert BPE.tokens.ids["<tag>"] in untrusted


def test_longest_special_token_wins_over_the_leftmost() -> None:
    tokens = [*byte_level().metadata["tokenizer.ggml.tokens"], "xab", "abcd"]
    types = np.array([*byte_level().metadata["tokenizer.ggml.token_type"], 4, 4], np.int32)
    tokenizer = Tokenizer.from_gguf(byte_level(tokens=tokens, token_type=types))
    assert tokenizer.encode("xabcd") == named(tokenizer, "x", "abcd")
    assert tokenizer.encode("xabc") == named(tokenizer, "xab", "c")


def test_phi3_tokens_swallow_what_follows() -> None:
    source = spm()
    named_phi = type(source)({**source.metadata, "general.name": "Phi-3 mini"})
    tokenizer = Tokenizer.from_gguf(named_phi)
    assert tokenizer.encode("<turn> \n hello", add_bos=False) == named(tokenizer, "<turn>", "▁hello")
    assert SPM.encode("<turn> hello", add_bos=False) == named(SPM, "<turn>", "▁", "▁hello")


def test_bos_and_eos_as_the_model_says() -> None:
    assert BPE.encode("he") == named(BPE, "he")
    assert BPE.encode("he", add_bos=True) == [1, *named(BPE, "he")]
    llama = Tokenizer.from_gguf(byte_level(pre="llama-bpe"))
    assert llama.encode("he") == [1, *named(BPE, "he")]
    assert llama.encode("he", add_bos=False) == named(BPE, "he")
    both = Tokenizer.from_gguf(byte_level(add_bos_token=True, add_eos_token=True))
    assert both.encode("he") == [1, *named(BPE, "he"), 0]
    assert both.encode("") == [1, 0]
    assert SPM.encode("") == [1]
    assert SPM.encode("", add_bos=False) == []


def test_spm_merges_by_score() -> None:
    # Best score first: he (-1), ll or lo (-2, the left one wins), hell (-4), hello (-5), ▁hello (-6); ▁h (-3)
    # would come before hell, but its h has been joined to he by then.
    assert SPM.encode("hello", add_bos=False) == named(SPM, "▁hello")
    assert SPM.encode("lo", add_bos=False) == named(SPM, "▁", "lo")
    assert SPM.encode("h", add_bos=False) == named(SPM, "▁h")


def test_spm_equal_scores_take_the_leftmost() -> None:
    # In "llo" both ll and lo have score -2.
    assert SPM.encode("llo", add_bos=False) == named(SPM, "▁", "ll", "o")


def test_spm_space_prefix() -> None:
    assert SPM.encode("h", add_bos=False) == named(SPM, "▁h")
    assert Tokenizer.from_gguf(spm(add_space_prefix=False)).encode("h", add_bos=False) == named(SPM, "h")
    assert SPM.encode("h<turn>h", add_bos=False) == named(SPM, "▁h", "<turn>", "▁h")
    assert SPM.decode(SPM.encode("hello hello")) == "hello hello"
    assert SPM.decode(SPM.encode(" hello")) == " hello"


def test_spm_byte_fallback() -> None:
    ids = SPM.encode("é", add_bos=False)
    assert ids == named(SPM, "▁", "<0xC3>", "<0xA9>")
    assert SPM.decode(ids) == "é"


def test_spm_without_byte_tokens_says_so() -> None:
    texts = [text.replace("<0x", "byte ") for text in spm().metadata["tokenizer.ggml.tokens"]]
    types = [1 if type_ == BYTE else type_ for type_ in spm().metadata["tokenizer.ggml.token_type"]]
    tokenizer = Tokenizer.from_gguf(spm(tokens=texts, token_type=np.array(types)))
    with pytest.raises(TokenizerError, match="'é' cannot be tokenised"):
        tokenizer.encode("é")


def plain_spm(text: str) -> list[int]:
    """The rule in its plainest form: look for the best pair, join it, look again."""
    vocabulary = SPM.tokens
    assert vocabulary.scores is not None
    pieces = list(text.replace(" ", "▁"))
    while True:
        joined = [left + right for left, right in pairwise(pieces)]
        scores = [vocabulary.scores[vocabulary.ids[j]] if j in vocabulary.ids else -np.inf for j in joined]
        if not scores or max(scores) == -np.inf:
            break
        best = scores.index(max(scores))
        pieces[best : best + 2] = [joined[best]]
    spelt = [
        [piece] if piece in vocabulary.ids else [f"<0x{b:02X}>" for b in piece.encode()] for piece in pieces
    ]
    return named(SPM, *(text for texts in spelt for text in texts))


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.text(alphabet="helo é", max_size=40))
def test_spm_against_the_plain_rule(text: str) -> None:
    assert SPM._encoder.encode(text) == plain_spm(text)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.text(alphabet="helowrd éo", max_size=40))
def test_spm_words_can_be_merged_apart(text: str) -> None:
    """Cutting a text into words before merging changes nothing, also where a token ends in "▁" ("o▁"
    does)."""
    encoder = SPM._encoder
    assert isinstance(encoder, ScoreEncoder)
    assert encoder.encode(text) == (encoder._merge(text.replace(" ", "▁")) if text else [])


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.text(max_size=60))
def test_spm_text_comes_back(text: str) -> None:
    text = text.replace("▁", "_")  # written as a space in such a vocabulary
    assert SPM.decode(SPM.encode(text)) == text


@settings(derandomize=True, deadline=None, max_examples=200)
@given(text=st.text(SPELLABLE, max_size=60), parse_special=st.booleans())
def test_smollm2_text_comes_back(smollm2_tokenizer: Tokenizer, text: str, parse_special: bool) -> None:
    ids = smollm2_tokenizer.encode(text, parse_special=parse_special)
    assert smollm2_tokenizer.decode(ids, show_special=True) == text


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.text(max_size=60))
def test_stream_emits_whole_characters_only(text: str) -> None:
    text = text.replace("▁", "_")
    decoder = SPM.stream()
    pieces = [decoder.push(token) for token in SPM.encode(text, add_bos=False)]
    assert all("\ufffd" not in piece for piece in pieces if "\ufffd" not in text)
    assert "".join(pieces) + decoder.finish() == (f" {text}" if text else "")


def test_stream_unfinished_character() -> None:
    decoder = SPM.stream()
    assert decoder.push(SPM.tokens.ids["<0xF0>"]) == ""
    assert decoder.push(SPM.tokens.ids["<0x9F>"]) == ""
    assert decoder.finish() == "\ufffd"
    assert decoder.push(SPM.tokens.ids["he"]) == "he"  # usable again
    assert decoder.push(SPM.tokens.ids["<0xFF>"]) + decoder.push(SPM.tokens.ids["he"]) == "\ufffdhe"


def test_special_tokens_hidden_or_shown() -> None:
    ids = named(BPE, "<|im_start|>", "he", "<tag>", "<|im_end|>")
    assert BPE.decode(ids) == "he<tag>"
    assert BPE.decode(ids, show_special=True) == "<|im_start|>he<tag><|im_end|>"
    assert BPE.stream(show_special=True).push(ids[0]) == "<|im_start|>"
    assert BPE.token_text(ids[0]) == "<|im_start|>"
    assert BPE.token_text(BPE.tokens.ids["Ã"]) == "\ufffd"


def test_token_id_out_of_range() -> None:
    with pytest.raises(TokenizerError, match="token id 99999 is beyond"):
        BPE.decode([99999])
    with pytest.raises(TokenizerError, match="token id -1 is beyond"):
        BPE.decode([-1])


def test_lone_surrogate_is_refused_with_its_place() -> None:
    with pytest.raises(TokenizerError, match="lone surrogate at character 2"):
        BPE.encode("he\ud800")


@pytest.mark.parametrize(
    ("texts", "ends"),
    [
        (["<|eot_id|>", "<|eom_id|>", "<end_of_turn>"], {"<|eot_id|>", "<|eom_id|>", "<end_of_turn>"}),
        (["<|fim_pad|>", "<|fim_prefix|>", "<|file_sep|>"], {"<|fim_pad|>", "<|file_sep|>"}),
        (["<|end|>"], {"<|end|>"}),
        (["<|end|>", "<|call|>", "<|return|>"], {"<|call|>", "<|return|>"}),
        (["</s>"], {"</s>"}),
        (["</s>", "<|tool_response>"], {"<|tool_response>"}),
    ],
)
def test_end_tokens_by_their_text(texts: list[str], ends: set[str]) -> None:
    source = byte_level().metadata
    tokens = [*source["tokenizer.ggml.tokens"], *texts]
    types = np.array([*source["tokenizer.ggml.token_type"], *([1] * len(texts))], np.int32)
    tokenizer = Tokenizer.from_gguf(byte_level(tokens=tokens, token_type=types))
    found = {tokenizer.tokens.texts[token] for token in tokenizer.eos_ids}
    assert found == ends | {"<|endoftext|>", "<|im_end|>"}
    if "<|fim_prefix|>" in texts:  # not an end, but a control token although the file says otherwise
        assert tokenizer.tokens.ids["<|fim_prefix|>"] not in tokenizer.encode("<|fim_prefix|>")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "vocabulary type 'bert'.*gpt2.*llama"),
        ({"model": None}, "no tokenizer.ggml.model"),
        ({"tokens": None}, "no tokenizer.ggml.tokens"),
        ({"tokens": []}, "tokenizer.ggml.tokens is empty"),
        ({"tokens": "abc"}, "not an array of strings"),
        ({"tokens": ["a", b"\xff"]}, "not UTF-8"),
        ({"tokens": ["a", "b", "a"], "token_type": None}, "tokens 0 and 2 have the same text 'a'"),
        ({"token_type": np.zeros(3, np.int32)}, "token_type has 3 entries for 54 tokens"),
        ({"token_type": np.zeros(60, np.float32)}, "token_type is not an array of integers"),
        ({"token_type": "text"}, "token_type is not an array of numbers"),
        ({"merges": None}, "no tokenizer.ggml.merges"),
        ({"merges": ["ab"]}, r"merges\[0\] is 'ab', expected two parts"),
        ({"add_bos_token": 1}, "add_bos_token is not a boolean"),
        ({"bos_token_id": "x"}, "bos_token_id is not an integer"),
        ({"pre": 7}, "pre is not a string"),
    ],
)
def test_faulty_metadata_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_gguf(byte_level(**changes))


def test_faulty_scores_are_refused() -> None:
    scores = np.zeros(len(SPM.tokens), np.float32)
    scores[7] = np.nan
    with pytest.raises(TokenizerError, match=r"scores\[7\] is not finite"):
        Tokenizer.from_gguf(spm(scores=scores))
    with pytest.raises(TokenizerError, match="has 5 entries"):
        Tokenizer.from_gguf(spm(scores=scores[:5]))


def test_special_id_beyond_the_vocabulary_is_told_and_not_used() -> None:
    tokenizer = Tokenizer.from_gguf(byte_level(bos_token_id=4294967295))
    assert tokenizer.bos_id == 11  # llama.cpp's default for this kind
    assert "4294967295" in tokenizer.notices[0]
