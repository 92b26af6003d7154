"""Answers taken apart while they come, however they are cut into pieces."""

import itertools

import pytest

from chat_templates import TEMPLATES
from powerinfer_tools.text.answer_parts import Content, Part, Reasoning, parts_parser, said
from powerinfer_tools.text.tool_formats import Call

HARMONY = TEMPLATES["gpt-oss"]
CALL = "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>"


def taken(template: str | None, tail: str, pieces: list[str]) -> list[tuple[str, str]]:
    """(kind, text), neighbours of one kind joined."""
    parser = parts_parser(template, tail)
    parts: list[Part] = []
    for piece in pieces:
        parts += parser.push(piece)
    parts += parser.finish()
    return [
        (kind.__name__, "".join(said(part) for part in group))
        for kind, group in itertools.groupby(parts, type)
    ]


def every_cut(text: str) -> list[list[str]]:
    """Whole, character by character, and in threes."""
    return [[text], list(text), [text[i : i + 3] for i in range(0, len(text), 3)]]


@pytest.mark.parametrize(
    ("template", "tail", "text", "expected"),
    [
        (None, "", "<think>\nhm\n</think>\n\nYes.", [("Reasoning", "hm\n"), ("Content", "Yes.")]),
        (None, "<think>\n", "hm</think>Yes.", [("Reasoning", "hm"), ("Content", "Yes.")]),
        (None, "", "Yes <think>no</think>", [("Content", "Yes <think>no</think>")]),
        (None, "", "[THINK]hm[/THINK]Yes.", [("Content", "[THINK]hm[/THINK]Yes.")]),
        (
            "{{ '[THINK]' + m.thinking + '[/THINK]' }}",
            "",
            "[THINK]hm[/THINK]Yes.",
            [("Reasoning", "hm"), ("Content", "Yes.")],
        ),
        (
            "<seed:think></seed:think>",
            "",
            "<seed:think>hm</seed:think>Yes.",
            [("Reasoning", "hm"), ("Content", "Yes.")],
        ),
        (
            r"{{ '<|channel>thought\n' }}<channel|>",
            "",
            "<|channel>thought\nhm<channel|>Yes.",
            [("Reasoning", "hm"), ("Content", "Yes.")],
        ),
        (
            HARMONY,
            "<|start|>assistant",
            "<|channel|>analysis<|message|>hm <|x|><|end|>"
            "<|start|>assistant<|channel|>final<|message|>Yes < no",
            [("Reasoning", "hm <|x|>"), ("Content", "Yes < no")],
        ),
        (HARMONY, "<|start|>assistant", "Yes.", [("Content", "Yes.")]),
        (HARMONY, "<|start|>assistant", "<|channel|>final<|message|>Yes.<|e", [("Content", "Yes.<|e")]),
        (
            HARMONY,
            "<|start|>assistant",
            f'<|channel|>analysis<|message|>hm<|end|><|start|>assistant{CALL}{{"city": "Rome"}}',
            [("Reasoning", "hm"), ("Call", 'weather({"city": "Rome"})')],
        ),
        (HARMONY, "<|start|>assistant", "<|channel|>analysis<|message|>hm", [("Reasoning", "hm")]),
        (HARMONY, "<|start|>assistant", "", []),
    ],
)
def test_thought_and_answer(
    template: str | None, tail: str, text: str, expected: list[tuple[str, str]]
) -> None:
    for pieces in every_cut(text):
        assert taken(template, tail, pieces) == expected


def test_text_comes_as_soon_as_it_is_certain() -> None:
    parser = parts_parser(HARMONY, "<|start|>assistant")
    assert parser.push("<|channel|>analysis<|mess") == []
    assert parser.push("age|>so") == [Reasoning("so")]
    assert parser.push(" it <") == [Reasoning(" it ")]
    assert parser.push("|end|><|start|>assistant<|channel|>final<|message|>go") == [Content("go")]


def test_an_answer_with_a_form_is_not_taken_apart() -> None:
    parser = parts_parser(HARMONY, "<|start|>assistant", formed=True)
    assert [*parser.push('{"a": 1}'), *parser.finish()] == [Content('{"a": 1}')]


def test_calls_of_channels_are_said() -> None:
    parser = parts_parser(HARMONY, "<|start|>assistant")
    parts = [*parser.push(CALL + " {} "), *parser.finish()]
    assert parts == [Call("weather", "{}")]
    assert parser.called
