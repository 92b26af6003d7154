"""The prefix cache on disk at work: blocks are restored into a place before its request begins, and saved
when a request has left it, each by a thread of its own, so that no pass waits for a file."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import takewhile

from powerinfer_tools.serving.places import Place
from powerinfer_tools.serving.prefix_store import BLOCK, PrefixStore, keys
from powerinfer_tools.serving.slots import BlockSlots


class DiskCache:
    """Blocks of ``slots`` in ``store``; ``identity`` is all that their bits depend on. ``say`` is told once
    when nothing more can be written."""

    def __init__(
        self, slots: BlockSlots, store: PrefixStore, identity: bytes, say: Callable[[str], None]
    ) -> None:
        self._slots, self._store, self._identity, self._say = slots, store, identity, say
        self._lock = threading.Lock()
        self._loader = ThreadPoolExecutor(1, "prefix-loader")
        self._saver = ThreadPoolExecutor(1, "prefix-saver")
        self._full = False

    def stored(self, prompt: Sequence[int]) -> int:
        """How many tokens at the start of ``prompt`` seem to be there, whole blocks; the last token of the
        prompt is needed anew. Waits for nothing."""
        held = (key in self._store for key in keys(self._identity, prompt[:-1]))
        return BLOCK * sum(1 for _ in takewhile(bool, held))

    def lacks(self, place: Place) -> bool:
        """Whether ``place`` has blocks that are not there. Waits for nothing."""
        return not self._full and any(
            key not in self._store for key in keys(self._identity, place.tokens.tolist())
        )

    def restore(self, place: Place, prompt: Sequence[int], done: Callable[[int], None]) -> None:
        """Fill ``place``, which holds the first tokens of ``prompt``, with the blocks that follow; ``done``
        is told in another thread how many tokens it holds then. Nobody else may use it meanwhile."""
        self._loader.submit(self._restore, place, list(prompt), done)

    def save(self, place: Place, done: Callable[[], None]) -> None:
        """Write the blocks of ``place`` that are not there; ``done`` is called in another thread. What it
        holds must stay meanwhile."""
        self._saver.submit(self._save, place, done)

    def close(self) -> None:
        """Wait until all is written."""
        self._loader.shutdown(wait=True, cancel_futures=True)
        self._saver.shutdown(wait=True)

    def _restore(self, place: Place, prompt: list[int], done: Callable[[int], None]) -> None:
        length = place.length
        try:
            for index, key in enumerate(keys(self._identity, prompt[:-1])):
                first = index * BLOCK
                if first + BLOCK <= place.length:
                    continue
                tokens = prompt[first : first + BLOCK]
                with self._lock:
                    block = self._store.get(key, tokens, self._slots.block_bytes(BLOCK))
                if block is None:
                    break
                self._slots.restore(place.slot, first, BLOCK, block)
                length = first + BLOCK
        except Exception as error:  # noqa: BLE001  the request is computed without what could not be read
            self._tell(f"a block of the prefix cache could not be restored: {error!r}")
        finally:
            done(length)

    def _save(self, place: Place, done: Callable[[], None]) -> None:
        try:
            tokens = place.tokens.tolist()
            for index, key in enumerate(keys(self._identity, tokens)):
                with self._lock:
                    known = key in self._store or self._full
                if not known:
                    first = index * BLOCK
                    block = self._slots.block(place.slot, first, BLOCK)
                    with self._lock:
                        self._store.put(key, tokens[first : first + BLOCK], block)
        except Exception as error:  # noqa: BLE001  the server goes on without saving
            self._full = True
            self._tell(f"the prefix cache takes no more blocks: {error}")
        finally:
            done()

    def _tell(self, text: str) -> None:
        with suppress(Exception):  # a closed terminal must not end this thread
            self._say(text)
