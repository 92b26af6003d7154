"""Pre-tokenisers: how a byte-level vocabulary splits text into words before merging, by the name in the file.

Each family is a list of patterns applied one after another; each pattern cuts the pieces so far into its
matches and what lies between them. Names and families are those of llama.cpp, with whose ids we agree
exactly.
"""

from dataclasses import dataclass

from powerinfer_tools.errors import TokenizerError

# llama.cpp classifies characters by Unicode 15.1, the regular expressions of `tokenizers` by 16.0. These are
# what 16.0 added; without them, a text with one of these characters would be cut differently.
_LATER_LETTERS = (
    r"\x{1C89}-\x{1C8A}\x{A7CB}-\x{A7CD}\x{A7DA}-\x{A7DC}\x{105C0}-\x{105F3}\x{10D4A}-\x{10D65}"
    r"\x{10D6F}-\x{10D85}\x{10EC2}-\x{10EC4}\x{11380}-\x{11389}\x{1138B}\x{1138E}\x{11390}-\x{113B5}"
    r"\x{113B7}\x{113D1}\x{113D3}\x{11BC0}-\x{11BE0}\x{13460}-\x{143FA}\x{16100}-\x{1611D}"
    r"\x{16D40}-\x{16D6C}\x{18CFF}\x{1E5D0}-\x{1E5ED}\x{1E5F0}"
)
_LATER_NUMBERS = (
    r"\x{10D40}-\x{10D49}\x{116D0}-\x{116E3}\x{11BF0}-\x{11BF9}\x{16130}-\x{16139}\x{16D70}-\x{16D79}"
    r"\x{1CCF0}-\x{1CCF9}\x{1E5F1}-\x{1E5FA}"
)
_LATER_PUNCTUATION = (
    r"\x{1B4E}-\x{1B4F}\x{1B7F}\x{10D6E}\x{113D4}-\x{113D5}\x{113D7}-\x{113D8}\x{11BE1}"
    r"\x{16D6D}-\x{16D6F}\x{1E5FF}"
)
_L = rf"[\p{{L}}&&[^{_LATER_LETTERS}]]"
_N = rf"[\p{{N}}&&[^{_LATER_NUMBERS}]]"
_P = rf"[\p{{P}}&&[^{_LATER_PUNCTUATION}]]"
_OTHER = rf"[[^\s\p{{L}}\p{{N}}]{_LATER_LETTERS}{_LATER_NUMBERS}]"  # neither space, letter nor number
_LEADER = rf"[[^\r\n\p{{L}}\p{{N}}]{_LATER_LETTERS}{_LATER_NUMBERS}]"  # one of these may lead a word

_GPT2 = rf"'s|'t|'re|'ve|'m|'ll|'d| ?{_L}+| ?{_N}+| ?{_OTHER}+|\s+(?!\S)|\s+"
_CONTRACTIONS = "'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
_LINES_AND_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_LEADER}?{_L}+|{_N}{{1,3}}| ?{_OTHER}+[\r\n]*|{_LINES_AND_SPACES}"
_QWEN2 = rf"{_CONTRACTIONS}|{_LEADER}?{_L}+|{_N}| ?{_OTHER}+[\r\n]*|{_LINES_AND_SPACES}"


@dataclass(frozen=True)
class PreTokenizer:
    """One family: its patterns in order, and what else the family's name implies.

    ignore_merges: a word that is a token as a whole is taken as such, whatever the merges say.
    add_bos: whether a beginning-of-text token is added when the file does not say.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


_FAMILIES: tuple[tuple[PreTokenizer, tuple[str, ...]], ...] = (
    (PreTokenizer((_GPT2,)), (
        "gpt2", "gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4", "gigachat",
        "a.x-4.0", "mellum", "modern-bert", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de")),
    (PreTokenizer((_N, _GPT2)), (
        "smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2")),
    (PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True), (
        "llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2",
        "jina-v5-nano")),
    (PreTokenizer((_LLAMA3,)), ("dbrx", "smaug-bpe")),
    (PreTokenizer((_QWEN2,)), (
        "qwen2", "deepseek-r1-qwen", "megrez", "stablelm2", "hunyuan", "solar-open", "grok-2",
        "kormo", "f2llmv2")),
    (PreTokenizer((rf"(?:{_P}|[$+<=>^~|`])+", _GPT2, "[0-9][0-9][0-9]")), ("falcon",)),
    (PreTokenizer((rf"(?:{_P}|[$+<=>^~|])+", _GPT2, rf"{_N}+", "[0-9][0-9][0-9]")), ("default",)),
)  # fmt: skip

_BY_NAME = {name: family for family, names in _FAMILIES for name in names}


def supported_names() -> tuple[str, ...]:
    """All names of `tokenizer.ggml.pre` that `pre_tokenizer` knows, sorted."""
    return tuple(sorted(_BY_NAME))


def pre_tokenizer(name: str) -> PreTokenizer:
    """The family called `name` in `tokenizer.ggml.pre`.

    Raises TokenizerError for an unknown one: a wrong guess would tokenise almost right, worse than not at
    all.
    """
    try:
        return _BY_NAME[name]
    except KeyError:
        raise TokenizerError(
            f"pre-tokeniser {name!r} (tokenizer.ggml.pre) is not supported; supported are: "
            + ", ".join(supported_names())
        ) from None
