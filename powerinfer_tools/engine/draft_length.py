"""How many tokens to draft: what pays, by the acceptance and the cost of batches measured so far."""

from collections.abc import Iterator

#: Most tokens drafted at a time.
MOST = 15
#: Share of the time of decoding that drafts which turn out wrong may cost.
ALLOWED = 0.015
#: What one more token of a batch is taken to cost, in parts of a single token, until it is measured.
_GUESS = 0.2
#: Weight of the newest measurement, and of what was seen before in the acceptance.
_NEW, _KEEP = 0.3, 0.9
#: Passes worth of time that gains may pay for later losses.
_SAVINGS = 4.0
#: Change of a single token's time, as a share of it, from which on a choice is made anew: choosing takes
#: longer than looking a text up.
_STALE = 0.25


class DraftLength:
    """Measures passes and chooses. Times change how many tokens are drafted, never which text comes out.

    A ledger bounds the loss: what drafting has saved, less what it has cost, may fall to −:data:`ALLOWED` of
    all time spent, and no further; so something is tried now and then where nothing seems to pay.
    """

    def __init__(self) -> None:
        self._cost: dict[int, float] = {}  # tokens of a pass → its seconds
        self._drafting = 0.0  # seconds to draft one token
        self._right, self._tried = 1.0, 2.0
        self._saved = self._spent = 0.0
        self._chosen: dict[int, int] = {}  # most → what pays, by what was measured until then
        self._chosen_by = 0.0  # seconds of a single token then

    @property
    def single(self) -> float | None:
        """Seconds of a pass of one token; None before one was measured."""
        return self._cost.get(1)

    def choose(self, most: int) -> int:
        """How many tokens to draft, up to ``most``; 0 does not pay, or is not known to."""
        single, most = self.single, min(most, MOST)
        if single is None or most < 1 or self._saved < -ALLOWED * self._spent:
            return 0
        if abs(single - self._chosen_by) > _STALE * self._chosen_by:
            self._chosen, self._chosen_by = {}, single
        if most not in self._chosen:
            self._chosen[most] = self._fastest(single, most)
        return self._chosen[most]

    def _fastest(self, single: float, most: int) -> int:
        """How many tokens to draft, of 1 to ``most``; 2 to learn more, where none pays."""
        share = self._right / self._tried
        best, fastest = 0, 1 / single
        expected = 1.0
        for count, seconds in enumerate(self._seconds(most), 1):
            expected += share**count
            rate = expected / (seconds + count * self._drafting)
            if rate > fastest:
                best, fastest = count, rate
        return best or min(2, most)

    def passed(self, drafted: int, accepted: int, seconds: float, drafting: float) -> None:
        """A pass over one token and ``drafted`` more took ``seconds``, and ``drafting`` before; ``accepted``
        of them were right."""
        tokens = drafted + 1
        before = self._cost.get(tokens, seconds)
        self._cost[tokens] = before + _NEW * (seconds - before)
        self._spent += seconds + drafting
        if not drafted:
            return
        self._chosen.clear()
        self._drafting += _NEW * (drafting / drafted - self._drafting)
        self._right = _KEEP * self._right + accepted
        self._tried = _KEEP * self._tried + min(accepted + 1, drafted)
        single = self._cost.get(1, seconds)
        gain = (accepted + 1) * single - seconds - drafting
        self._saved = min(self._saved + gain, _SAVINGS * single)

    def _seconds(self, most: int) -> Iterator[float]:
        """What passes of 1 to ``most`` tokens more than one take: as measured, else along the line between
        the nearest that were."""
        measured = sorted(self._cost.items())
        below, above = measured[0], 0
        for tokens in range(2, most + 2):
            while above < len(measured) and measured[above][0] < tokens:
                below, above = measured[above], above + 1
            if above < len(measured):
                slope = (measured[above][1] - below[1]) / (measured[above][0] - below[0])
            else:
                slope = _GUESS * self._cost[1]
            yield below[1] + (tokens - below[0]) * slope
