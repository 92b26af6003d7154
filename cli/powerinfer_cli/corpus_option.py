"""``--corpus`` takes every word up to the next option, as shells expand ``texts/*``."""

from typing import Any

from powerinfer_cli.help import HelpfulCommand, HelpfulGroup


def spread(arguments: list[str], option: str) -> list[str]:
    """``--x a b`` as ``--x a --x b``: what follows ``option`` up to the next option belongs to it."""
    result: list[str] = []
    inside = False
    for index, word in enumerate(arguments):
        if word.startswith("-") and len(word) > 1:
            inside = word == option
            result.append(word)
        elif inside and arguments[index - 1] != option:
            result += [option, word]
        else:
            result.append(word)
    return result


class CorpusCommand(HelpfulCommand):
    """A command with ``--corpus FILE...``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat ``--corpus`` before each of its words, which is how the parser knows lists."""
        return super().parse_args(ctx, spread(args, "--corpus"))


class CorpusGroup(HelpfulGroup):
    """A group that is a command with ``--corpus FILE...`` itself."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat ``--corpus`` before each of its words, which is how the parser knows lists."""
        return super().parse_args(ctx, spread(args, "--corpus"))
