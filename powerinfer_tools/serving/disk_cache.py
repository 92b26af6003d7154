"""The prefix cache on disk at work: blocks are restored into a place before its request begins, and saved
when a request has left it, each by a thread of its own, so that no pass waits for a file.

A recurrence keeps no tokens, but one state that every token changes. If a family has a recurrence, its state
at the end of a block is saved beside the block when the place has reached that token. A prompt then begins
after the last block whose state was saved.
"""

import hashlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from powerinfer_tools.serving.places import Place
from powerinfer_tools.serving.prefix_store import BLOCK, PrefixStore, keys
from powerinfer_tools.serving.slots import BlockSlots

#: How many states may wait to be written; further states are not saved.
_WAITING = 4


class DiskCache:
    """Blocks of ``slots`` in ``store``. ``identity`` states everything that their bits depend on. If it
    changes, for example because a hot device is lost, nothing is restored or saved any more. ``say`` is
    called once when nothing more can be written."""

    def __init__(
        self,
        slots: BlockSlots,
        store: PrefixStore,
        identity: Callable[[], bytes],
        say: Callable[[str], None],
    ) -> None:
        self._slots, self._store, self._identity, self._say = slots, store, identity, say
        self._first_identity = identity()
        self._recurrent = slots.checkpoint_bytes > 0
        self._lock = threading.Lock()
        self._loader = ThreadPoolExecutor(1, "prefix-loader")
        self._saver = ThreadPoolExecutor(1, "prefix-saver")
        self._waiting = threading.BoundedSemaphore(_WAITING)
        self._full = False

    def stored(self, prompt: Sequence[int]) -> int:
        """How many tokens at the start of ``prompt`` seem to be on disk, in whole blocks. The prompt's last
        token is not counted, since it has to be processed again. Does not block."""
        length = 0
        for end, key in self._ends(prompt[:-1]) if self._usable else ():
            if key not in self._store:
                break
            if not self._recurrent or _of_state(key) in self._store:
                length = end
        return self._sliced(length)

    def lacks(self, place: Place) -> bool:
        """Whether ``place`` has blocks that are not on disk. Does not block."""
        tokens = place.reusable.tolist()
        return self._saves and any(key not in self._store for _, key in self._ends(tokens))

    def piece(self, place: Place, count: int) -> int:
        """How many of ``count`` tokens ``place`` may process before :meth:`checkpoint` is due."""
        return min(count, BLOCK - place.length % BLOCK) if self._recurrent else count

    def checkpoint(self, place: Place) -> None:
        """Save the state of a recurrence if a block ends there, unless too many states are already waiting.
        Copies the state, and does not block."""
        if not self._recurrent or not place.length or place.length % BLOCK or not self._saves:
            return
        tokens = place.reusable.tolist()
        if len(tokens) < place.length:
            return
        *_, (_, key) = self._ends(tokens)
        if _of_state(key) not in self._store and self._waiting.acquire(blocking=False):
            state = self._slots.checkpoint(place.slot)
            self._saver.submit(self._save_state, _of_state(key), tokens[-BLOCK:], state)

    def restore(self, place: Place, prompt: Sequence[int], done: Callable[[int], None]) -> None:
        """Fill ``place``, which holds the first tokens of ``prompt``, with the blocks that follow. ``done``
        is called in another thread with the number of tokens then in it. Nobody else may use it meanwhile."""
        self._loader.submit(self._restore, place, list(prompt), done)

    def save(self, place: Place, done: Callable[[], None]) -> None:
        """Write the blocks of ``place`` that are not on disk; ``done`` is called in another thread. The
        place's contents must not change meanwhile."""
        self._saver.submit(self._save, place, done)

    def close(self) -> None:
        """Wait until all is written."""
        self._loader.shutdown(wait=True, cancel_futures=True)
        self._saver.shutdown(wait=True)

    @property
    def _usable(self) -> bool:
        return self._identity() == self._first_identity

    @property
    def _saves(self) -> bool:
        return not self._full and self._usable

    def _ends(self, tokens: Sequence[int]) -> list[tuple[int, bytes]]:
        """Where the whole blocks of a text end, with their keys."""
        made = keys(self._first_identity, tokens)
        return [(BLOCK * (index + 1), key) for index, key in enumerate(made)]

    def _sliced(self, length: int) -> int:
        """How many of the first ``length`` tokens can be used."""
        step = self._slots.fixed_slice
        return length if step is None else length // step * step

    def _get(self, key: bytes, tokens: Sequence[int], nbytes: int) -> bytes | None:
        with self._lock:
            return self._store.get(key, tokens, nbytes)

    def _restore(self, place: Place, prompt: list[int], done: Callable[[int], None]) -> None:
        length = place.length
        try:
            prefixes = list[tuple[int, bytes]]()
            for end, key in self._ends(prompt[:-1]):
                if end <= place.length:
                    continue
                block = self._get(key, prompt[end - BLOCK : end], self._slots.block_bytes(BLOCK))
                if block is None:
                    break
                self._slots.restore(place.slot, end - BLOCK, BLOCK, block)
                prefixes.append((end, key))
            length = self._held(place, prompt, prefixes)
        except Exception as error:  # noqa: BLE001  the request is computed without the blocks that could not be read
            self._tell(f"a block of the prefix cache could not be restored: {error!r}")
        finally:
            done(length)

    def _held(self, place: Place, prompt: Sequence[int], prefixes: Sequence[tuple[int, bytes]]) -> int:
        """Fill the slot from the blocks of ``prefixes`` as far as they fit; returns its length."""
        for end, key in reversed(prefixes):
            state, length = None, self._sliced(end)
            if length <= place.length:
                break
            if self._recurrent:
                state = self._get(_of_state(key), prompt[end - BLOCK : end], self._slots.checkpoint_bytes)
            if (length == end and state is not None) or not self._recurrent:
                self._slots.hold(place.slot, length, state)
                return length
        return place.length

    def _save(self, place: Place, done: Callable[[], None]) -> None:
        try:
            tokens = place.reusable.tolist()
            for end, key in self._ends(tokens):
                if key not in self._store and self._saves:
                    block = self._slots.block(place.slot, end - BLOCK, BLOCK)
                    self._put(key, tokens[end - BLOCK : end], block)
        except Exception as error:  # noqa: BLE001  the server goes on without saving
            self._end(error)
        finally:
            done()

    def _save_state(self, key: bytes, tokens: Sequence[int], state: bytes) -> None:
        try:
            self._put(key, tokens, state)
        except Exception as error:  # noqa: BLE001  as above
            self._end(error)
        finally:
            self._waiting.release()

    def _put(self, key: bytes, tokens: Sequence[int], data: bytes) -> None:
        with self._lock:
            self._store.put(key, tokens, data)

    def _end(self, error: Exception) -> None:
        if not self._full:
            self._full = True
            self._tell(f"the prefix cache takes no more blocks: {error}")

    def _tell(self, text: str) -> None:
        with suppress(Exception):  # a closed terminal must not end this thread
            self._say(text)


def _of_state(key: bytes) -> bytes:
    """The key of a recurrence's state at the end of the block with ``key``."""
    return hashlib.sha256(key + b"state").digest()
