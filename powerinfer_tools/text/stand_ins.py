"""Stand-ins: characters that mark which text in a rendered prompt is a user's.

Each character of control tokens has one. In users' text it takes the character's place while a chat template
is rendered and its result searched for control tokens; then it is undone. So a control token is made of
characters that the template wrote, all of them, whatever the template does with the user's.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from powerinfer_tools.errors import ChatTemplateError

#: Planes 15 and 16 of Unicode, for private use, without the two last code points of each.
_PRIVATE = (range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
_UNSAFE_IN_JSON = '"\\'  # escaping them must not fail to happen


@dataclass(frozen=True)
class StandIns:
    """`of`: character → stand-in. `letters`: characters that have one only where a whole text could be the
    inside of a control token, since templates spell such words, too. `controls`: texts of control tokens."""

    of: Mapping[str, str]
    letters: str
    controls: tuple[str, ...]

    @classmethod
    def avoiding(cls, text: str, controls: Iterable[str]) -> "StandIns":
        """For control tokens of these texts; no stand-in is a character of `text`, which is all that goes
        into the prompt. Raises ChatTemplateError where it leaves none."""
        controls = tuple(sorted(controls))
        characters = sorted(set("".join(controls)) - set(_UNSAFE_IN_JSON))
        needed = {character for control in controls for character in _marks(control)}
        free = _unused(text)
        try:
            of = {character: next(free) for character in characters}
        except StopIteration:
            raise ChatTemplateError(
                "the conversation uses all characters for private use there are"
            ) from None
        return cls(of, "".join(character for character in characters if character not in needed), controls)

    def request(self) -> dict[str, Any]:
        """The fields that the process needs that renders templates."""
        return {"stand_ins": dict(self.of), "letters": self.letters, "controls": self.controls}

    def undo(self, text: str) -> str:
        """`text` with the characters that stand-ins stand for."""
        return text.translate({ord(stand_in): character for character, stand_in in self.of.items()})


def _marks(control: str) -> str:
    """The characters by which a control token differs from words; all of it where it is one."""
    marks = "".join(char for char in control if not (char.isalnum() or char == "_" or char.isspace()))
    return marks.translate(dict.fromkeys(map(ord, _UNSAFE_IN_JSON))) or control


def _unused(text: str) -> Iterator[str]:
    used = set(text)
    return (character for block in _PRIVATE for character in map(chr, block) if character not in used)
