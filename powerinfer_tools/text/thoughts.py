"""How families of models write their reasoning before the answer, and how to cut it out of their text."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ThoughtFormat:
    """Markers around reasoning."""

    opener: str
    closer: str


#: Qwen, DeepSeek, GLM, MiniMax, Nemotron, SmolLM and others; recognised by the text alone.
THINK = ThoughtFormat("<think>", "</think>")
#: Named by the chat template: Mistral's, Seed-OSS, Command A, Apertus, Gemma 4.
FORMATS = (
    ThoughtFormat("[THINK]", "[/THINK]"),
    ThoughtFormat("<seed:think>", "</seed:think>"),
    ThoughtFormat("<|START_THINKING|>", "<|END_THINKING|>"),
    ThoughtFormat("<|inner_prefix|>", "<|inner_suffix|>"),
    ThoughtFormat("<|channel>thought\n", "<channel|>"),
)


def thought_formats(template: str | None) -> tuple[ThoughtFormat, ...]:
    """The formats with which answers to a chat template may begin."""
    source = (template or "").replace("\\n", "\n")
    return (THINK, *(one for one in FORMATS if one.opener.strip() in source and one.closer in source))


def writes_channels(template: str | None) -> bool:
    """Whether answers are in channels (OpenAI's harmony format), each with a header before its text."""
    return template is not None and all(marker in template for marker in ("<|channel|>", "<|message|>"))
