"""Pre-tokenisers: how a byte-level vocabulary splits text into words before merging, by the name in the file.

Each family is a list of patterns applied one after another; each pattern cuts the pieces so far into its
matches and the text between them. Names and families are llama.cpp's; the ids agree exactly with llama.cpp's.
"""

from dataclasses import dataclass

from powerinfer_tools.errors import TokenizerError
from powerinfer_tools.text.characters import (
    CAPITAL,
    CASED,
    HAN,
    IDEOGRAPH_OR_KANA,
    LEADER,
    LEADER_BUT_SIGNS,
    LETTER,
    LETTER_OR_MARK,
    MARK,
    NUMBER,
    OTHER,
    OTHER_BUT_MARKS,
    PUNCTUATION,
    SMALL,
    SYMBOL,
)

_GPT2 = rf"'s|'t|'re|'ve|'m|'ll|'d| ?{LETTER}+| ?{NUMBER}+| ?{OTHER}+|\s+(?!\S)|\s+"
_CONTRACTIONS = "'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
_SPACES = r"\s+(?!\S)|\s+"
_LINES_AND_SPACES = rf"\s*[\r\n]+|{_SPACES}"
_WORD = f"{LEADER}?{LETTER}+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORD}|{NUMBER}{{1,3}}| ?{OTHER}+[\r\n]*|{_LINES_AND_SPACES}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORD}|{NUMBER}| ?{OTHER}+[\r\n]*|{_LINES_AND_SPACES}"
_WORD_WITH_MARKS = f"{LEADER}?{LETTER_OR_MARK}+"
_QWEN35 = rf"{_CONTRACTIONS}|{_WORD_WITH_MARKS}|{NUMBER}| ?(?:{OTHER_BUT_MARKS})+[\r\n]*|{_LINES_AND_SPACES}"
_RUNS_OF_SPACES = "|".join(rf"\s{{{length}}}(?!\S)" for length in (512, 256, 128, 64, 32, 16, 8, 4, "1,2"))
_JAIS2 = rf"{_CONTRACTIONS}|{_WORD}|{NUMBER}{{1,3}}| ?{OTHER}+[\r\n]*|\s*[\r\n]+|{_RUNS_OF_SPACES}|\s"
_SIGNS = rf"(?:{PUNCTUATION}|{SYMBOL})"
_SIGN_AND_LATIN = r"[!-/:-@\[-`{-~][A-Za-z]+"
_WORDS_AND_SIGNS = rf"{_SIGN_AND_LATIN}|(?:{LEADER_BUT_SIGNS})?{LETTER_OR_MARK}+| ?{_SIGNS}+"
_SPARK = rf"{_WORDS_AND_SIGNS}|[\r\n]|{_SPACES}"
_DEEPSEEK3 = rf"{_WORDS_AND_SIGNS}[\r\n]*|{_LINES_AND_SPACES}"
_CASED_WORD = rf"(?:(?:{CAPITAL})*(?:{SMALL})+|(?:{CAPITAL})+(?:{SMALL})*)"
_CASED_WORD_WITH_MARKS = (
    rf"(?:(?:{CAPITAL}|{MARK})*(?:{SMALL}|{MARK})+|(?:{CAPITAL}|{MARK})+(?:{SMALL}|{MARK})*)"
)
_LINES_AND_SLASHES = rf" ?{OTHER}+[\r\n/]*|{_LINES_AND_SPACES}"
_TEKKEN = rf"{LEADER}?{_CASED_WORD}|{NUMBER}|{_LINES_AND_SLASHES}"
_GPT4O = rf"{LEADER}?{_CASED_WORD}(?:{_CONTRACTIONS})?|{NUMBER}{{1,3}}|{_LINES_AND_SLASHES}"
_GRANITE = rf"{LEADER}?{_CASED_WORD_WITH_MARKS}(?:{_CONTRACTIONS})?|{NUMBER}{{1,3}}|{_LINES_AND_SLASHES}"
# llama.cpp does not distinguish upper from lower case here.
_LETTERS = rf"{LEADER}?{LETTER_OR_MARK}+(?:{_CONTRACTIONS})?"
_TINY_AYA = rf"{_LETTERS}|{NUMBER}{{1,3}}|{_LINES_AND_SLASHES}"
_YOUTU = rf"{_LETTERS}|{NUMBER}|{_LINES_AND_SLASHES}"
_YOUTU_SCRIPTS = (
    r"[\x{AC00}-\x{D7A3}\x{3131}-\x{318E}]+"
    r"|[\x{FF01}\x{2026}\x{201C}\x{201D}\x{2018}\x{2019}\x{2014}\x{FF1A}\x{FF1B}\x{FF0C}\x{3001}-\x{303F}\x{FE30}-\x{FE4F}]+"
    rf"|[\x{{3105}}-\x{{312F}}]+|{IDEOGRAPH_OR_KANA}+"
)
# Numbers in groups of three, counted from their end; the first group includes the text before it.
_GROUPS_OF_THREE = rf"(?:(?!{NUMBER})(?m:.))*{NUMBER}{{1,3}}(?=(?:{NUMBER}{{3}})*(?!{NUMBER}))"
_AFMOE_SCRIPTS = (
    r"[\x{4E00}-\x{9FFF}\x{3400}-\x{4DBF}\x{F900}-\x{FAFF}\x{3040}-\x{30FF}\x{FF65}-\x{FF9F}\x{2F00}-\x{2FDF}"
    r"\x{E40}-\x{E7F}\x{E80}-\x{EFF}\x{1780}-\x{17FF}\x{1000}-\x{109F}\x{AA60}-\x{AA7F}\x{A9E0}-\x{A9FF}"
    r"\x{AC00}-\x{D7AF}\x{1100}-\x{11FF}]+"
)
_NOT_HAN = rf"(?!{HAN}){LETTER}"
_KIMI = (
    rf"{HAN}+|(?:(?!{HAN}){LEADER})?(?:{_NOT_HAN})+(?:{_CONTRACTIONS})?|{NUMBER}{{1,3}}| ?{OTHER}+[\r\n]*"
    rf"|{_LINES_AND_SPACES}"
)
_BLOOM = r" ?[^(\s|.,!?\x{2026}\x{3002}\x{FF0C}\x{3001}\x{964}\x{6D4}\x{60C})]+"
_ASIAN = r"[[\x{800}-\x{9FA5}\x{AC00}-\x{D7FF}]&&[^\s]]+"
_DEEPSEEK_SIGNS = r"\s?[!-/:-~\x{FF01}-\x{FF0F}\x{FF1A}-\x{FF5E}\x{2018}-\x{201F}\x{3001}-\x{3002}]+"
_BAILING = (
    rf"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|{_WORD}|{NUMBER}| ?{OTHER}+[\r\n]*|\s*[\r\n]|{_SPACES}"
)
_SEED = rf"{_CONTRACTIONS}|{_WORD}|{NUMBER}| ?{OTHER}+|{_LINES_AND_SPACES}"
_EXAONE_MOE = (
    rf"{_CONTRACTIONS}|{LEADER}?(?:{LETTER}{MARK}*(?: {LETTER}{MARK}*)*)+|{NUMBER}| ?{OTHER}+[\r\n/]?"
    rf"|\s*[\r\n]|{_SPACES}"
)
_MINICPM5 = rf"{_CONTRACTIONS}|{_WORD}|{NUMBER}+| ?{OTHER}+[\r\n]*|{_LINES_AND_SPACES}"
_IMAGES = ("<sentinel:[0-9]+>", "IMGIMG[A-I]{1,4}Z")
_ONE_SIGN = rf"{PUNCTUATION}|[!-/:-@\[-`{{-~]"
_LINES = r"[^\n]+|\n+"


@dataclass(frozen=True)
class PreTokenizer:
    """One family: its patterns in order, and the other properties that its name implies.

    ignore_merges: a word that is a token as a whole becomes that token, whatever the merges say.
    add_bos: whether a beginning-of-text token is added if the file does not say.
    names_bos: whether there is a beginning-of-text token if the file names none.
    raw: tokens are written in characters, with "▁" for a space, not in the characters for bytes.
    may_lack_merges: in a file without merges each word is a token, or else its bytes are.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    names_bos: bool = True
    raw: bool = False
    may_lack_merges: bool = False


_FAMILIES: tuple[tuple[PreTokenizer, tuple[str, ...]], ...] = (
    (PreTokenizer((_GPT2,)), (
        "gpt2", "gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4", "gigachat",
        "a.x-4.0", "mellum", "modern-bert", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de")),
    (PreTokenizer((NUMBER, _GPT2)), (
        "smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2")),
    (PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True), (
        "llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2",
        "jina-v5-nano")),
    (PreTokenizer((_LLAMA3,)), ("dbrx", "smaug-bpe")),
    (PreTokenizer((_LLAMA3,), names_bos=False), ("chatglm-bpe",)),
    (PreTokenizer((_LLAMA3,), ignore_merges=True, names_bos=False), ("glm4", "glm5")),
    (PreTokenizer((_JAIS2,)), ("jais-2",)),
    (PreTokenizer((f"{NUMBER}{{1,3}}", _MINICPM5), ignore_merges=True), ("minicpm5",)),
    (PreTokenizer((_QWEN2,)), (
        "qwen2", "deepseek-r1-qwen", "megrez", "stablelm2", "hunyuan", "solar-open", "grok-2",
        "kormo", "f2llmv2")),
    (PreTokenizer((_QWEN35,)), ("qwen35",)),
    (PreTokenizer((rf"{_WORD}|{NUMBER}| ?{OTHER}+[\r\n]*|{_LINES_AND_SPACES}",)), ("ufakzeka",)),
    (PreTokenizer((_LINES, _QWEN2)), ("laguna",)),
    (PreTokenizer((_SEED,)), ("seed-coder",)),
    (PreTokenizer((_BAILING,)), ("bailingmoe", "bailingmoe2", "llada-moe")),
    (PreTokenizer((_EXAONE_MOE,)), ("exaone-moe",)),
    (PreTokenizer(("[\r\n]", rf"\s?[{CASED}]+", _DEEPSEEK_SIGNS, r"\s+\z", _ASIAN, f"{NUMBER}+")),
     ("deepseek-llm",)),
    (PreTokenizer(("[\r\n]", rf"\s?{LETTER}+", rf"\s?{PUNCTUATION}+", _ASIAN, NUMBER)), ("deepseek-coder",)),
    (PreTokenizer((f"{NUMBER}{{1,3}}", f"{IDEOGRAPH_OR_KANA}+", _DEEPSEEK3)), (
        "deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4")),
    (PreTokenizer((f"{NUMBER}{{1,3}}", f"{IDEOGRAPH_OR_KANA}+", _SPARK, NUMBER)), ("spark2_5",)),
    (PreTokenizer((_GROUPS_OF_THREE, _AFMOE_SCRIPTS, _DEEPSEEK3)), ("afmoe",)),
    (PreTokenizer((_YOUTU_SCRIPTS, _YOUTU), ignore_merges=True), ("youtu",)),
    (PreTokenizer((_GROUPS_OF_THREE, _TINY_AYA)), ("tiny_aya", "cohere2moe")),
    (PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True), ("tekken",)),
    (PreTokenizer((_GPT4O,)), ("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2")),
    (PreTokenizer((_GRANITE,), ignore_merges=True), ("granite-embed-multi-97m",)),
    (PreTokenizer((_KIMI,), may_lack_merges=True), ("kimi-k2",)),
    (PreTokenizer((f"{NUMBER}+", "[0-9]{3}(?=(?:[0-9]{3})*(?![0-9]))")), ("superbpe",)),
    (PreTokenizer((_BLOOM,)), ("bloom", "poro-chat", "gpt3-finnish")),
    (PreTokenizer((_BLOOM, NUMBER)), ("viking",)),
    (PreTokenizer((*_IMAGES, "[\t\n]|    |  ", NUMBER, _ONE_SIGN, _GPT2), add_bos=True), ("chameleon",)),
    (PreTokenizer((rf"(?:{PUNCTUATION}|[$+<=>^~|`])+", _GPT2, "[0-9][0-9][0-9]")), ("falcon",)),
    (PreTokenizer((_LINES,), raw=True), ("gemma4", "granite-embed-multi-311m")),
    (PreTokenizer((rf"(?:{PUNCTUATION}|[$+<=>^~|])+", _GPT2, f"{NUMBER}+", "[0-9]{3}")), ("default",)),
)  # fmt: skip

_BY_NAME = {name: family for family, names in _FAMILIES for name in names}


def supported_names() -> tuple[str, ...]:
    """All names of `tokenizer.ggml.pre` that `pre_tokenizer` knows, sorted."""
    return tuple(sorted(_BY_NAME))


def pre_tokenizer(name: str) -> PreTokenizer:
    """The family called `name` in `tokenizer.ggml.pre`.

    Raises TokenizerError for an unknown family: a wrong guess would tokenise almost correctly, which is worse
    than not at all.
    """
    try:
        return _BY_NAME[name]
    except KeyError:
        raise TokenizerError(
            f"pre-tokeniser {name!r} (tokenizer.ggml.pre) is not supported; supported are: "
            + ", ".join(supported_names())
        ) from None
