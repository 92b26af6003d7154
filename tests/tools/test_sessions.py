"""Several sessions over one packed model: each gets the bits that it gets alone, in any company."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from every_run import RUNS, SPARSE, sparse, split
from powerinfer_kernels import KernelError
from powerinfer_tools.engine import Engine, Part, Session, Weights
from powerinfer_tools.engine import weights as weights_module
from powerinfer_tools.engine.memory import MARGIN
from powerinfer_tools.errors import ContextFull, ModelError
from powerinfer_tools.model.loading import load_model

LONGEST = 40


@dataclass
class Talk:
    """The tokens of one session, how they came, and the logits after each."""

    tokens: list[int]
    kind: str
    context: int
    slices: list[int] = field(default_factory=list)
    rows: list[np.ndarray] = field(default_factory=list)
    session: Session | None = None

    @property
    def done(self) -> int:
        return sum(self.slices)

    def bits(self) -> np.ndarray:
        return np.stack(self.rows).view(np.uint32)


def talks(vocabulary: int, kinds: tuple[str, ...]) -> list[Talk]:
    rng = np.random.default_rng(7)
    lengths = [1, 2, LONGEST, *rng.integers(3, LONGEST, 4).tolist()]
    return [
        Talk(
            rng.integers(0, vocabulary, length).tolist(),
            kinds[index % len(kinds)],
            min(LONGEST, length + 5 * (index % 3)),
        )
        for index, length in enumerate(lengths)
    ]


def all_at_once(weights: Weights, some: list[Talk], seed: int) -> None:
    """They join and leave at random, in random order, with single tokens and slices of prompts."""
    rng = np.random.default_rng(seed)
    waiting, active = list(some), list[Talk]()
    while waiting or active:
        while waiting and (not active or rng.random() < 0.6):
            talk = waiting.pop(int(rng.integers(len(waiting))))
            talk.session = weights.session(talk.context, talk.kind)
            active.append(talk)
        order = rng.permutation(len(active))[: rng.integers(1, len(active) + 1)].tolist()
        parts = []
        for talk in (active[index] for index in order):
            left = len(talk.tokens) - talk.done
            count = 1 if rng.random() < 0.5 else int(rng.integers(1, left + 1))
            assert talk.session is not None
            parts.append(Part(talk.session, talk.tokens[talk.done : talk.done + count], count))
            talk.slices.append(count)
        logits, at = weights.step(parts), 0
        for index, part in zip(order, parts, strict=True):
            active[index].rows += list(logits[at : at + part.rows].copy())
            at += part.rows
        for talk in [talk for talk in active if talk.done == len(talk.tokens)]:
            assert talk.session is not None
            talk.session.close()
            active.remove(talk)


@pytest.mark.parametrize("name", RUNS)
def test_company_changes_no_bit(name: str, tmp_path: Path) -> None:
    """A batch of 9 cuts prompts over passes and puts slices beside single tokens. Alone: token by token, or,
    where torch's sums may depend on the number of rows, in the same slices."""
    make, options, kinds = RUNS[name]
    model = load_model(make(tmp_path))
    alone = talks(model.hyper.vocabulary, kinds)
    plans = []
    for threads in (1, 2, 3, 4):
        together = talks(model.hyper.vocabulary, kinds)
        with Weights(model, threads=threads, context=LONGEST, batch=9, **options) as weights:  # type: ignore[arg-type]
            all_at_once(weights, together, threads)
        plans.append(together)
    with Weights(model, threads=1, context=LONGEST, batch=9, **options) as weights:  # type: ignore[arg-type]
        for index, talk in enumerate(alone):
            for together in plans if "device" in options else plans[:1]:
                talk.rows.clear()
                with weights.session(talk.context, talk.kind) as session:
                    for token in talk.tokens if "device" not in options else ():
                        talk.rows.append(session.decode(token).copy())
                    done = 0
                    for count in together[index].slices if "device" in options else ():
                        some = talk.tokens[done : done + count]
                        talk.rows += [row.copy() for row in session.process(some, count)]
                        done += count
                np.testing.assert_array_equal(talk.bits(), together[index].bits())
            if "device" not in options:
                for together in plans[1:]:
                    np.testing.assert_array_equal(talk.bits(), together[index].bits())
    model.close()


@pytest.fixture
def weights(tmp_path: Path) -> Weights:
    return Weights(load_model(sparse(tmp_path)), threads=1, context=LONGEST, batch=4, mode="dense")


def test_a_step_gives_the_rows_that_were_asked_for(weights: Weights) -> None:
    """40 rows are more than the head takes at once, 12 tokens more than a pass."""
    first, second = weights.session(), weights.session(kv_type="q8_0")
    tokens = list(range(5, 25))
    expected = [np.concatenate([r.copy() for r in s.logits_from(tokens, 0)]) for s in (first, second)]
    first.rewind(0)
    second.rewind(0)
    got = weights.step([Part(second, tokens, 20), (first, tokens)]).copy()
    np.testing.assert_array_equal(got, np.concatenate([expected[1], expected[0][-1:]]))
    got = weights.step([(first, [7])])
    assert got.shape == (1, weights.vocabulary)
    assert (first.position, second.position) == (21, 20)
    weights.close()


def test_writing_gives_what_a_step_gives(weights: Weights) -> None:
    here, there = ([weights.session() for _ in range(3)] for _ in range(2))
    for sessions in (here, there):
        weights.step([(session, [5, 6, 7 + at][: at + 1]) for at, session in enumerate(sessions)])
    for tokens in ([1, 2, 3], [4, 1, 1]):
        expected = weights.step([(s, [token]) for s, token in zip(there, tokens, strict=True)]).copy()
        written = weights.write(here, tokens)
        weights.check(written)
        assert np.array_equal(written.view(np.uint32), expected.view(np.uint32))
    assert [session.position for session in here] == [session.position for session in there]
    held = [session.position for session in here]
    with pytest.raises(ModelError, match="outside the vocabulary"):
        weights.write(here, [1, 1 << 30, 1])
    here[1].position = here[1].context
    with pytest.raises(ContextFull):
        weights.write(here, [1, 1, 1])
    assert [here[0].position, here[2].position] == [held[0], held[2]]


def test_a_copied_prefix_goes_on_with_the_same_bits(weights: Weights) -> None:
    tokens = list(range(3, 33))
    one = weights.session()
    expected = np.stack([row.copy() for row in one.process(tokens, len(tokens))])
    for positions in (0, 1, 16, 17, 30):
        other = weights.session(context=35)
        other.prefill([9] * 5)
        other.copy_prefix(one, positions)
        got = np.array([other.decode(token).copy() for token in tokens[positions:]])
        np.testing.assert_array_equal(got, expected[positions:].reshape(got.shape))
        other.close()
    fork = one.fork()
    assert fork.position == 30
    np.testing.assert_array_equal(fork.decode(3).copy(), one.decode(3))
    one.copy_prefix(one, 4)
    assert one.position == 4
    np.testing.assert_array_equal(one.decode(tokens[4]), expected[4])
    weights.close()


def test_sessions_take_memory_for_what_they_hold_and_give_it_back(weights: Weights) -> None:
    small, large = weights.session(context=10), weights.session()
    width = SPARSE.kv_heads * SPARSE.head_dim
    assert large.nbytes >= LONGEST * SPARSE.layers * width * 2 * 2 > small.nbytes
    large.prefill([1] * 20)
    assert large.touched_bytes == large.nbytes // 2
    large.close()
    large.close()
    assert large.nbytes == 0
    with pytest.raises(ContextFull):
        large.decode(1)
    weights.close()


def test_what_a_step_refuses_changes_nothing(weights: Weights, tmp_path: Path) -> None:
    one, other = weights.session(context=3), weights.session()
    with Weights(weights.model, threads=1, context=8, mode="dense") as elsewhere:
        foreign = elsewhere.session()
        for parts, fault in (
            ([], "at least one"),
            ([(one, [1]), (one, [2])], "each session only once"),
            ([(other, [1]), (one, [])], "1 rows of logits after 0 tokens"),
            ([(other, [1]), Part(one, [1], 2)], "2 rows of logits"),
            ([(other, [1]), (foreign, [1])], "belongs to other weights"),
        ):
            with pytest.raises(ValueError, match=fault):
                weights.step(parts)  # type: ignore[arg-type]
    with pytest.raises(ContextFull, match="4 more tokens"):
        weights.step([(other, [1]), (one, [1] * 4)])
    with pytest.raises(ModelError, match="token id 512 is outside"):
        weights.step([(other, [1]), (one, [512])])
    assert (one.position, other.position) == (0, 0)
    one.close()
    with pytest.raises(ValueError, match="closed"):
        weights.step([(one, [1])])
    with pytest.raises(ModelError, match="not from 1 to 40"):
        weights.session(context=41)
    with pytest.raises(ValueError, match="has not 1 tokens"):
        weights.session().copy_prefix(other, 1)
    other.prefill([1, 2])
    with pytest.raises(ModelError, match="cannot be copied"):
        weights.session(kv_type="q8_0").copy_prefix(other, 1)
    with pytest.raises(ContextFull):
        weights.session(context=1).copy_prefix(other, 2)
    weights.close()


def test_a_session_for_which_there_is_no_memory(weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    """What open sessions have been promised and not yet taken is not free."""
    first = weights.session()
    room = MARGIN + first.nbytes + first.nbytes // 2
    monkeypatch.setattr(weights_module, "available_ram_bytes", lambda: room)
    with pytest.raises(ModelError, match="one more session of 40 tokens"):
        weights.session()
    first.prefill([1] * 30)
    weights.session().close()
    weights.close()


def test_attention_on_the_device_serves_one_session(tmp_path: Path) -> None:
    with Weights(load_model(split(attention=(1,))(tmp_path)), threads=1, device="cpu") as weights:
        first = weights.session()
        expected = first.prefill([1, 2, 3]).copy()
        for options in ({}, {"kv_type": "q8_0"}):
            with pytest.raises(ModelError, match="no second session can be open"):
                weights.session(**options)
        with pytest.raises(ModelError, match="no second session"):
            first.fork()
        first.close()
        np.testing.assert_array_equal(weights.session().prefill([1, 2, 3]), expected)


def test_engines_share_weights(weights: Weights) -> None:
    """Closing one leaves the weights open."""
    one, other = (Engine(weights.model, weights=weights) for _ in range(2))
    expected = one.prefill([1, 2]).copy()
    one.close()
    np.testing.assert_array_equal(other.prefill([1, 2]), expected)
    assert other.report().prompt_tokens == 2
    other.close()
    weights.session()
    weights.close()


@pytest.mark.parametrize("fault", ["StackWriter", "Head", "Session"])
def test_what_was_opened_is_closed_when_a_later_step_fails(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads and the hot device are let go of."""
    path, closed = split()(tmp_path), list[str]()
    model = load_model(path)

    def broken(*args: object) -> None:
        raise KernelError("broken")

    from powerinfer_tools.engine import layers

    for module, name in ((weights_module.Pool, "Pool"), (layers.LayerStack, "LayerStack")):
        close = module.close
        monkeypatch.setattr(
            module, "close", lambda self, close=close, name=name: (closed.append(name), close(self))
        )
    place = layers if fault == "StackWriter" else weights_module
    monkeypatch.setattr(place, fault, broken)
    with pytest.raises(KernelError, match="broken"):
        Engine(model, threads=1, device="cpu")
    assert closed == ["LayerStack", "Pool"]
    monkeypatch.undo()
    Engine(model, threads=1, device="cpu").close()
    model.close()


def test_an_interrupted_pass_changes_no_position(weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    session = weights.session()
    session.prefill([1, 2])

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(weights.stack, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        weights.step([(session, [3])])
    monkeypatch.undo()
    assert session.position == 2
    weights.close()
