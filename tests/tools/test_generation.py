"""Generating with a scripted engine: pieces, stop strings, every outcome, interrupts."""

import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from powerinfer_tools.errors import ContextFull, PowerInferError
from powerinfer_tools.generate.generation import Generation, GenerationOptions, Outcome, generate, logits_hash
from powerinfer_tools.generate.sampling import Sampler, SamplingOptions
from powerinfer_tools.text import Tokenizer
from powerinfer_tools.text.stop_strings import StopStrings
from scripted_engine import ScriptedEngine, script
from small_vocabularies import byte_level, spm

TOKENIZER = Tokenizer.from_gguf(spm(add_space_prefix=False))
PROMPT = TOKENIZER.encode("hello")
END = TOKENIZER.tokens.ids["</s>"]
GREEDY = SamplingOptions(temperature=0)
deterministic = settings(derandomize=True, deadline=None, max_examples=300)


def run(
    answer: list[int], *, context: int = 1000, options: GenerationOptions | None = None
) -> tuple[Generation, ScriptedEngine, list[str]]:
    engine = ScriptedEngine(script(PROMPT, answer), TOKENIZER.vocabulary, context)
    generation = generate(engine, TOKENIZER, PROMPT, options or GenerationOptions(GREEDY))
    return generation, engine, [piece.text for piece in generation]


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_bos=False)


def test_text_until_the_end_token() -> None:
    generation, engine, pieces = run([*ids("hello world é"), END])
    assert "".join(pieces) == generation.text == "hello world é"
    assert generation.outcome is Outcome.END
    assert generation.tokens == ids("hello world é")
    assert engine.cache == PROMPT + generation.tokens == generation.fed


def test_no_piece_has_half_a_character() -> None:
    _, _, pieces = run([*ids("éé"), END])
    assert [piece for piece in pieces if piece] == ["é", "é"]


def test_an_unfinished_character_shows_at_the_end() -> None:
    generation, _, _ = run([*ids("h"), TOKENIZER.tokens.ids["<0xC3>"], END])
    assert generation.text == "h\ufffd"


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_limit(limit: int) -> None:
    generation, engine, _ = run([*ids("held held"), END], options=GenerationOptions(GREEDY, max_tokens=limit))
    assert len(generation.tokens) == limit
    assert generation.outcome is Outcome.LIMIT
    assert f"{limit} tokens" in generation.explanation
    assert len(engine.cache) == len(PROMPT) + max(0, limit - 1)  # the last token need not be computed


def test_limit_and_end_at_once_is_an_end() -> None:
    generation, _, _ = run([END], options=GenerationOptions(GREEDY, max_tokens=1))
    assert generation.outcome is Outcome.END
    assert generation.tokens == []


def test_full_context_is_an_outcome() -> None:
    generation, engine, _ = run(ids("h"), context=len(PROMPT) + 4)
    assert generation.outcome is Outcome.CONTEXT_FULL
    assert len(generation.tokens) == 5
    assert len(engine.cache) == engine.context
    assert str(engine.context) in generation.explanation


def test_a_prompt_that_exactly_fits_gives_one_token() -> None:
    generation, _, _ = run(ids("h"), context=len(PROMPT))
    assert (generation.outcome, len(generation.tokens)) == (Outcome.CONTEXT_FULL, 1)


def test_a_prompt_that_does_not_fit_raises() -> None:
    with pytest.raises(ContextFull):
        run(ids("h"), context=len(PROMPT) - 1)


def test_an_empty_prompt_is_refused() -> None:
    engine = ScriptedEngine(script([], [END]), TOKENIZER.vocabulary)
    with pytest.raises(PowerInferError, match="the prompt is empty"):
        generate(engine, TOKENIZER, [])


def test_ignore_eos() -> None:
    generation, _, _ = run(
        [*ids("h"), END], options=GenerationOptions(GREEDY, max_tokens=20, ignore_eos=True)
    )
    assert generation.outcome is Outcome.LIMIT
    assert END not in generation.tokens


@pytest.mark.parametrize(
    ("stops", "text"),
    [
        (("lo w",), "hel"),
        (("d", "world"), "hello "),
        (("absent",), "hello world"),
        (("h",), ""),
        (("o", "lo"), "hel"),
    ],
)
def test_stop_strings_over_token_borders(stops: tuple[str, ...], text: str) -> None:
    generation, engine, pieces = run(
        [*ids("hello world"), END], options=GenerationOptions(GREEDY, stop=stops)
    )
    assert "".join(pieces) == generation.text == text
    stopped = text != "hello world"
    assert generation.outcome is (Outcome.STOP_STRING if stopped else Outcome.END)
    assert generation.stop_string == (
        next(s for s in stops if "hello world".startswith(text + s)) if stopped else None
    )
    assert engine.cache == generation.fed


@deterministic
@given(
    text=st.text("ab", max_size=30),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(1, 5), min_size=30, max_size=30),
)
def test_stop_strings_do_not_depend_on_the_pieces(text: str, stops: list[str], cuts: list[int]) -> None:
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    expected = text[: min(ends)[1]] if ends else text
    finder, out, start = StopStrings(stops), "", 0
    for cut in cuts:
        out += finder.push(text[start : start + cut])
        assert expected.startswith(out)  # nothing comes out that would have to be taken back
        start += cut
    assert out + (finder.finish() if finder.found is None else "") == expected
    assert (finder.found is not None) == bool(ends)


def test_stop_strings_hold_back_no_more_than_needed() -> None:
    finder = StopStrings(["###", "<end>"])
    assert finder.push("text ##") == "text "
    assert finder.push("x") == "##x"
    assert finder.push("<") == ""
    assert finder.finish() == "<"


def test_closing_early_leaves_the_engine_usable() -> None:
    engine = ScriptedEngine(script(PROMPT, ids("hello")), TOKENIZER.vocabulary)
    generation = generate(engine, TOKENIZER, PROMPT, GenerationOptions(GREEDY))
    next(generation)
    next(generation)
    generation.close()
    assert generation.outcome is Outcome.INTERRUPTED
    assert engine.cache == generation.fed
    assert generation.logits_hash is not None
    assert list(generation) == []
    engine.rewind(0)
    again = generate(engine, TOKENIZER, PROMPT, GenerationOptions(GREEDY, max_tokens=3))
    assert len("".join(piece.text for piece in again)) > 0


def test_closing_before_the_start() -> None:
    ended: list[Generation] = []
    engine = ScriptedEngine(script(PROMPT, [END]), TOKENIZER.vocabulary)
    generation = Generation(engine, TOKENIZER, PROMPT, GenerationOptions(GREEDY), on_end=ended.append)
    generation.close()
    generation.close()
    assert (generation.outcome, generation.logits_hash, engine.cache) == (Outcome.INTERRUPTED, None, [])
    assert ended == [generation]


def test_an_interrupt_inside_the_engine() -> None:
    engine = ScriptedEngine(script(PROMPT, ids("hello")), TOKENIZER.vocabulary)
    engine.interrupt_at = len(PROMPT) + 2
    generation = generate(engine, TOKENIZER, PROMPT, GenerationOptions(GREEDY))
    with pytest.raises(KeyboardInterrupt):
        for _ in generation:
            pass
    assert generation.outcome is Outcome.INTERRUPTED
    assert generation.logits_hash is None  # the engine may have half overwritten them
    assert len(generation.fed) <= engine.position
    assert engine.cache[: len(generation.fed)] == generation.fed


def test_logits_hash_is_of_the_last_logits() -> None:
    generation, engine, _ = run([*ids("h"), END])
    last = engine._forward()
    assert generation.logits_hash == logits_hash(last) == f"#{zlib.crc32(last.tobytes()):08x}"


def test_logits_hash_known_values() -> None:
    # CRC-32 of 00 00 80 3f 00 00 00 c0, and of nothing
    assert (
        logits_hash(np.array([1, -2], np.float32)) == f"#{zlib.crc32(bytes.fromhex('0000803f000000c0')):08x}"
    )
    assert logits_hash(np.zeros(0, np.float32)) == "#00000000"
    assert logits_hash(np.array([1, 0], np.float32)) != logits_hash(np.array([1, -0.0], np.float32))


def test_statistics() -> None:
    engine = ScriptedEngine(script([0, *PROMPT], [*ids("hello hello"), END]), TOKENIZER.vocabulary)
    engine.prefill([0])
    generation = generate(engine, TOKENIZER, PROMPT, GenerationOptions(GREEDY))
    assert generation.statistics.prompt_tokens_per_second == 0
    list(generation)
    statistics = generation.statistics
    assert (statistics.prompt_tokens, statistics.reused_tokens) == (len(PROMPT), 1)
    assert statistics.tokens == statistics.decoded == len(generation.tokens)
    assert statistics.prompt_seconds > 0
    assert statistics.decode_seconds > 0
    assert statistics.prompt_tokens_per_second == len(PROMPT) / statistics.prompt_seconds
    assert statistics.first_token_seconds is not None


def test_sampled_text_reproduces_with_its_seed() -> None:
    def text(seed: int) -> list[int]:
        engine = ScriptedEngine(lambda cache: 5, TOKENIZER.vocabulary)
        options = GenerationOptions(
            SamplingOptions(temperature=50, min_p=0, top_p=1, seed=seed), max_tokens=20
        )
        generation = generate(engine, TOKENIZER, PROMPT, options)
        list(generation)
        return generation.tokens

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_penalties_see_the_prompt() -> None:
    engine = ScriptedEngine(lambda cache: PROMPT[-1], TOKENIZER.vocabulary)
    options = GenerationOptions(SamplingOptions(temperature=0, presence_penalty=100), max_tokens=1)
    generation = generate(engine, TOKENIZER, PROMPT, options)
    list(generation)
    assert generation.tokens != [PROMPT[-1]]


def test_a_sampler_can_be_carried_on() -> None:
    sampler = Sampler(SamplingOptions(temperature=0, repeat_penalty=2))
    engine = ScriptedEngine(lambda cache: 5, TOKENIZER.vocabulary)
    generation = Generation(engine, TOKENIZER, PROMPT, GenerationOptions(max_tokens=1), sampler=sampler)
    list(generation)
    assert list(sampler._recent) == [*PROMPT, *generation.tokens]


def test_special_tokens_shown_on_request() -> None:
    bpe = Tokenizer.from_gguf(byte_level())
    start, stop = bpe.tokens.ids["<|im_start|>"], bpe.tokens.ids["<|im_end|>"]
    for show, text in ((True, "<|im_start|>"), (False, "")):
        engine = ScriptedEngine(script([9], [start, stop]), bpe.vocabulary)
        generation = generate(engine, bpe, [9], GenerationOptions(GREEDY, show_special=show))
        list(generation)
        assert generation.text == text


def test_bad_options_are_refused() -> None:
    with pytest.raises(PowerInferError, match="-2, expected -1"):
        GenerationOptions(max_tokens=-2)
    with pytest.raises(PowerInferError, match="stop string is empty"):
        GenerationOptions(stop=("a", ""))
