"""How many tokens to draft: what pays, by the acceptance and the cost of batches measured so far."""

from collections import deque
from collections.abc import Iterator
from statistics import median

#: Most tokens drafted at a time.
MOST = 15
#: Share of the time of decoding that drafts which turn out wrong may cost.
ALLOWED = 0.01
#: A pass over one token is due after so many over more: without it, what drafts gain would be judged by the
#: speed that the machine had long ago.
REFRESH = 16
#: What one more token of a batch is taken to cost, in parts of a single token, until it is measured.
_GUESS = 0.2
#: Weight of the newest measurement, and of what was seen before in the acceptance.
_NEW, _KEEP = 0.3, 0.9
#: Passes worth of time that gains may pay for later losses.
_SAVINGS = 4.0
#: The last passes over one token, whose median is a single token's time: one that was held up counts nothing.
_SINGLES = 3


class DraftLength:
    """Measures passes and chooses. Times change how many tokens are drafted, never which text comes out.

    All costs are kept in single tokens, since the speed of a machine changes more than their ratio. A ledger
    bounds the loss: what drafting has saved, less what it has cost, may fall to −:data:`ALLOWED` of all that
    was decoded, and no further; so one token is tried now and then where nothing seems to pay.
    """

    def __init__(self) -> None:
        self._singles: deque[float] = deque(maxlen=_SINGLES)  # seconds
        self._since = 0  # passes over several tokens since the last over one
        self._cost = {1: 1.0}  # tokens of a pass → its time, in single tokens
        self._drafting = 0.0  # to draft one token
        self._right, self._tried = 1.0, 2.0
        self._saved = self._spent = 0.0
        self._chosen: dict[int, int] = {}  # most → what pays, by what was measured until then

    @property
    def single(self) -> float | None:
        """Seconds of a pass of one token; None before one was measured."""
        return median(self._singles) if self._singles else None

    def choose(self, most: int) -> int:
        """How many tokens to draft, up to ``most``; 0 does not pay, or is not known to."""
        most = min(most, MOST)
        if not self._singles or most < 1 or self._saved < -ALLOWED * self._spent or self._since >= REFRESH:
            return 0
        if most not in self._chosen:
            self._chosen[most] = self._fastest(most)
        return self._chosen[most]

    def _fastest(self, most: int) -> int:
        """How many tokens to draft, of 1 to ``most``; 1 to learn more, where none pays."""
        share = self._right / self._tried
        best, fastest, expected = 1, 1.0, 1.0
        for count, cost in enumerate(self._costs(most), 1):
            expected += share**count
            rate = expected / (cost + count * self._drafting)
            if rate > fastest:
                best, fastest = count, rate
        return best

    def passed(self, drafted: int, accepted: int, seconds: float, drafting: float) -> None:
        """A pass over one token and ``drafted`` more took ``seconds``, and ``drafting`` before; ``accepted``
        of them were right."""
        if not drafted:
            self._singles.append(seconds)
            self._since = 0
        single = self.single
        if single is None:
            return
        self._spent += accepted + 1
        if not drafted:
            return
        self._since += 1
        self._chosen.clear()
        tokens, cost, drafting = drafted + 1, seconds / single, drafting / single
        before = self._cost.get(tokens, cost)
        self._cost[tokens] = before + _NEW * (cost - before)
        self._drafting += _NEW * (drafting / drafted - self._drafting)
        self._right = _KEEP * self._right + accepted
        self._tried = _KEEP * self._tried + min(accepted + 1, drafted)
        self._saved = min(self._saved + accepted + 1 - cost - drafting, _SAVINGS)

    def _costs(self, most: int) -> Iterator[float]:
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
                slope = _GUESS
            yield below[1] + (tokens - below[0]) * slope
