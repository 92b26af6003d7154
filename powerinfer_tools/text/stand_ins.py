"""Stand-ins: characters that mark the user's text in a rendered prompt.

Each character of control tokens has a stand-in. In users' text it takes the character's place while a chat
template is rendered and the result is searched for control tokens; then it is undone. So the template wrote
every character of a control token, whatever it does with the user's characters.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from powerinfer_tools.errors import ChatTemplateError

#: Planes 15 and 16 of Unicode, for private use, without the last two code points of each.
_PRIVATE = (range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
_UNSAFE_IN_JSON = '"\\'  # these must always be escaped


@dataclass(frozen=True)
class StandIns:
    """`of`: character → stand-in. `letters`: characters that get a stand-in only if a whole text could be the
    inside of a control token, since templates use these words, too. `controls`: texts of control tokens."""

    of: Mapping[str, str]
    letters: str
    controls: tuple[str, ...]

    @classmethod
    def avoiding(cls, text: str, controls: Iterable[str]) -> "StandIns":
        """Stand-ins for control tokens with these texts. `text` is everything that goes into the prompt; no
        stand-in occurs in it. Raises ChatTemplateError if it leaves no characters for stand-ins."""
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
        """The fields that the rendering process needs."""
        return {"stand_ins": dict(self.of), "letters": self.letters, "controls": self.controls}

    def undo(self, text: str) -> str:
        """`text` with its stand-ins replaced by the original characters."""
        return text.translate({ord(stand_in): character for character, stand_in in self.of.items()})


def _marks(control: str) -> str:
    """The characters by which a control token differs from words; all of them if it is a word."""
    marks = "".join(char for char in control if not (char.isalnum() or char == "_" or char.isspace()))
    return marks.translate(dict.fromkeys(map(ord, _UNSAFE_IN_JSON))) or control


def _unused(text: str) -> Iterator[str]:
    used = set(text)
    return (character for block in _PRIVATE for character in map(chr, block) if character not in used)
