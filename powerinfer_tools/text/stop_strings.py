"""Finding stop strings in text that arrives in pieces, without ever letting a part of one out."""

from collections.abc import Sequence


class StopStrings:
    """Passes text on up to the first stop string; holds back text that could still be the beginning of one.

    The first stop string is the one that is complete earliest, and the longest of several that end together.
    So the result does not depend on how the text is cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """The part of all text so far that now certainly lies before any stop string, without the text
        already returned.

        Sets `found` when a stop string is complete; nothing comes out after that.
        """
        if not self._stops:
            return text
        if self.found is not None:
            return ""
        self._held += text
        matches = [
            (start + len(stop), start, stop) for stop in self._stops if (start := self._held.find(stop)) >= 0
        ]
        if matches:
            _, start, self.found = min(matches)
            certain, self._held = self._held[:start], ""
            return certain
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        certain, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return certain

    def finish(self) -> str:
        """The text that was held back, now that no more text comes."""
        rest, self._held = self._held, ""
        return rest

    def _overlap(self, stop: str) -> int:
        """How many characters at the end of the held text begin `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)
