"""A model that is loaded, and ready to generate."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, Unpack

import numpy as np
import numpy.typing as npt

from powerinfer.drafts import Draft, Drafts
from powerinfer.options import GenerateOptions
from powerinfer.session import Session
from powerinfer.text_stream import Generated, TextStream
from powerinfer_tools.engine import Engine, Weights
from powerinfer_tools.engine.from_disk import RamOptions
from powerinfer_tools.model.loading import Model as LoadedModel
from powerinfer_tools.model.loading import load_model
from powerinfer_tools.progress import Progress
from powerinfer_tools.text import Tokenizer
from powerinfer_tools.text.chat import Template, chat_template, has_chat_template

if TYPE_CHECKING:
    from powerinfer_tools.stages.profile.learning import Learning

Floats = npt.NDArray[np.float32]
Mode = Literal["dense", "gate-first", "predicted", "thresholded"]


def load(
    path: str | PathLike[str],
    *,
    threads: int | None = None,
    context: int | None = None,
    mode: Mode | None = None,
    device: Literal["none", "cpu", "cuda"] = "none",
    vram: int | None = None,
    kv_type: Literal["f16", "q8_0"] = "f16",
    ram: int | None = None,
    placement: Literal["adaptive", "static"] = "adaptive",
    learn: str | PathLike[str] | None = None,
    check_recall: bool = False,
    draft: Draft | None = None,
    draft_model: str | PathLike[str] | None = None,
    progress: Progress | None = None,
) -> "Model":
    """Load a model: a GGUF file, a split file, or a Hugging Face folder.

    ``threads`` None takes the machine's cores. ``context`` is the most tokens of a session (None: the model's
    own, up to 4096). ``mode`` None takes what the file says. ``device`` gives the hot part of a split file to
    torch, limited to ``vram`` bytes. ``kv_type`` "q8_0" halves the KV cache at a small cost in precision.
    ``ram`` is the memory that the process may take (None: what is free): experts beyond it are read from disk
    as they are needed, and ``placement`` says whether those that stay follow use, or the profile beside the
    model. ``learn`` names a profile, to which the experts that were taken are added at the end.
    ``draft`` "ngram" guesses the next tokens from the text so far, ``draft_model`` with a smaller model of
    the same vocabulary: faster where the guesses come true, and the same text. ``check_recall`` also computes
    what predictors should have found, for :meth:`Session.report`. ``progress`` hears of GPU kernels that
    have to be compiled, which a first start does. Nothing but ``mode``, ``device``, ``vram``
    and ``kv_type`` changes a result.

    Raises FormatError for a file that cannot be read, ModelError for one that cannot be run or does not fit
    in memory, HardwareError for a device that is not there.
    """
    loaded = load_model(Path(path))
    with ExitStack() as opened:
        opened.callback(loaded.close)
        learning = None if learn is None else _learning(loaded, Path(learn))
        weights = Weights(
            loaded,
            threads=threads,
            context=context,
            mode=mode,
            device=device,
            vram=vram,
            kv_type=kv_type,
            ram=RamOptions(ram, placement),
            check_recall=check_recall,
            observed=None if learning is None else learning.observed,
            progress=progress,
        )
        opened.callback(weights.close)
        if learning is not None:
            opened.callback(lambda: learning.save(weights.stack.tokens))
        drafts = Drafts(loaded, weights, draft, None if draft_model is None else Path(draft_model))
        opened.callback(drafts.close)
        return Model(loaded, weights, drafts, opened.pop_all())


def _learning(loaded: LoadedModel, path: Path) -> "Learning":
    from powerinfer_tools.stages.profile.learning import Learning

    return Learning(loaded, path)


class Model:
    """One loaded model, made by :func:`load`: a context manager. Not for two threads at once."""

    def __init__(self, loaded: LoadedModel, weights: Weights, drafts: Drafts, opened: ExitStack) -> None:
        self._loaded, self._weights, self._drafts, self._opened = loaded, weights, drafts, opened

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def name(self) -> str:
        """What the file calls the model."""
        return self._loaded.name

    @property
    def context(self) -> int:
        """The most tokens of a session."""
        return self._weights.context

    @property
    def vocabulary(self) -> int:
        """Number of token ids, and of logits."""
        return self._weights.vocabulary

    @property
    def mode(self) -> str:
        """How the layers are computed: a mode, or "mixed"."""
        return self._weights.stack.mode

    @property
    def has_chat_template(self) -> bool:
        """Whether the file brings a chat template. :meth:`chat` writes plain turns where it does not."""
        return has_chat_template(self._loaded.source)

    @property
    def notices(self) -> tuple[str, ...]:
        """What could not be done as asked, and what is done instead."""
        return (*self._loaded.source.notices, *self._weights.notices)

    def text_notices(self, *, chat: bool) -> tuple[str, ...]:
        """The same about the tokeniser, and for a ``chat`` about the template. Raises TokenizerError."""
        notice = self._template.notice if chat else None
        return (*self._tokenizer.notices, *([] if notice is None else [notice]))

    def session(self, context: int | None = None) -> Session:
        """A session of up to ``context`` tokens (None: the model's). Raises ModelError where memory does not
        suffice, and for a second one where the device computes attention; TokenizerError."""
        engine = Engine(self._loaded, weights=self._weights, session=self._weights.session(context))
        try:
            self._drafts.attach(engine)
            return Session(engine, self._tokenizer, self._template)
        except BaseException:
            engine.close()
            raise

    def generate(self, prompt: str | Sequence[int], **options: Unpack[GenerateOptions]) -> Generated:
        """Continue ``prompt``, text or ids. Raises as :meth:`Session.stream` does."""
        return self.stream(prompt, **options).finish()

    def stream(self, prompt: str | Sequence[int], **options: Unpack[GenerateOptions]) -> TextStream:
        """:meth:`generate`, piece by piece."""
        session = self.session()
        return self._ending(session, lambda: session.stream(prompt, **options))

    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Unpack[GenerateOptions]) -> Generated:
        """The answer to a conversation: messages with "role" and "content". To go on with it cheaply, keep a
        :meth:`session` and use its ``chat``. Raises as :meth:`Session.stream_chat` does."""
        return self.stream_chat(messages, **options).finish()

    def stream_chat(
        self, messages: Sequence[Mapping[str, Any]], **options: Unpack[GenerateOptions]
    ) -> TextStream:
        """:meth:`chat`, piece by piece."""
        session = self.session()
        return self._ending(session, lambda: session.stream_chat(messages, **options))

    def logits(self, tokens: Sequence[int]) -> Floats:
        """Logits float32 (tokens, vocabulary) after each of ``tokens``; needs no tokeniser. Raises
        ContextFull and ModelError."""
        with self._weights.session() as session:
            rows = [rows.copy() for rows in session.logits_from(list(tokens), 0)]
        return np.concatenate(rows) if rows else np.empty((0, self.vocabulary), np.float32)

    def tokenize(self, text: str, *, special: bool = False, begin: bool | None = None) -> list[int]:
        """Ids of ``text``. ``special``: control tokens written in it are taken as such. ``begin``: whether
        the model's first token comes in front (None: where the model asks for it). Raises TokenizerError."""
        return self._tokenizer.encode(text, parse_special=special, add_bos=begin)

    def detokenize(self, tokens: Iterable[int], *, special: bool = False) -> str:
        """Text of ids; ``special`` shows control tokens."""
        return self._tokenizer.decode(tokens, show_special=special)

    def read_bandwidth(self) -> float:
        """Measure how fast the model's threads read memory now, in bytes per second; 0 where memory does not
        suffice to measure it."""
        return self._weights.read_bandwidth()

    def close(self) -> None:
        """Close all sessions, stop the threads and give the memory back."""
        self._opened.close()

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer.from_gguf(self._loaded.source)

    @cached_property
    def _template(self) -> Template:
        return chat_template(self._loaded.source, self._tokenizer)

    @staticmethod
    def _ending(session: Session, begin: Any) -> TextStream:
        """What ``begin`` returns, which closes the session when it ends."""
        try:
            stream: TextStream = begin()
        except BaseException:
            session.close()
            raise
        stream._on_end = session.close
        return stream
