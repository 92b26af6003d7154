"""A loaded model, ready to generate."""

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

    ``threads`` None takes the machine's cores. ``context`` is the maximum number of tokens of a session
    (None: the model's own, up to 4096). ``mode`` None takes the file's mode. ``device`` gives the hot part of
    a split file to torch, limited to ``vram`` bytes. ``kv_type`` "q8_0" halves the KV cache at a small cost
    in precision. ``ram`` is the memory that the process may take (None: all that is free). Experts beyond it
    are read from disk as they are needed; ``placement`` says whether the choice of the experts that stay in
    memory follows use, or the profile beside the model. ``learn`` names a profile; at the end, the experts
    or neurons taken are added to it. ``draft`` "ngram" guesses the next tokens from the text so far;
    ``draft_model`` guesses them with a smaller model of the same vocabulary. The text stays the same, and
    comes faster where guesses are right. ``check_recall`` also computes the neurons that predictors
    should have found, for :meth:`Session.report`. ``progress`` is told of GPU kernels that have to be
    compiled, as on a first start.
    Only ``mode``, ``device``, ``vram`` and ``kv_type`` change results.

    Raises FormatError for a file that cannot be read, ModelError for one that cannot be run or does not fit
    in memory, and HardwareError if the device does not exist.
    """
    loaded = load_model(Path(path))
    with ExitStack() as opened:
        opened.callback(loaded.close)
        learning = None if learn is None else _learning(loaded, Path(learn), mode, device)
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


def _learning(loaded: LoadedModel, path: Path, mode: str | None, device: str) -> "Learning":
    from powerinfer_tools.stages.profile.learning import Learning

    return Learning(loaded, path, mode, beside=device != "none")


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
        """The model's name in the file."""
        return self._loaded.name

    @property
    def context(self) -> int:
        """The maximum number of tokens of a session."""
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
        """Whether the file has a chat template. Without one, :meth:`chat` writes plain turns."""
        return has_chat_template(self._loaded.source)

    @property
    def notices(self) -> tuple[str, ...]:
        """Requests that could not be met as asked, and what is done instead."""
        return (*self._loaded.source.notices, *self._weights.notices)

    def text_notices(self, *, chat: bool) -> tuple[str, ...]:
        """Notices about the tokeniser and, for a ``chat``, about the template. Raises TokenizerError."""
        notice = self._template.notice if chat else None
        return (*self._tokenizer.notices, *([] if notice is None else [notice]))

    def session(self, context: int | None = None) -> Session:
        """A session of up to ``context`` tokens (None: the model's). Raises TokenizerError. Raises ModelError
        if memory does not suffice, and for a second session if the device computes attention."""
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
        """Ids of ``text``. ``special``: control tokens written in it count as such. ``begin``: whether the
        model's first token comes in front (None: if the model asks for it). Raises TokenizerError."""
        return self._tokenizer.encode(text, parse_special=special, add_bos=begin)

    def detokenize(self, tokens: Iterable[int], *, special: bool = False) -> str:
        """Text of ids; ``special`` shows control tokens."""
        return self._tokenizer.decode(tokens, show_special=special)

    def read_bandwidth(self) -> float:
        """Measure how fast the model's threads read memory now, in bytes per second; 0 if memory does not
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
        """The stream that ``begin`` returns; at its end it closes the session."""
        try:
            stream: TextStream = begin()
        except BaseException:
            session.close()
            raise
        stream._on_end = session.close
        return stream
