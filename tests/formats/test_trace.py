"""The trace: what is written is read, and everything a file can get wrong has its error."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from powerinfer_formats import errors
from powerinfer_formats.trace import TraceFile, TraceHeader, encode_frame, write_trace

WIDTH, NEURONS, LAYERS, CHUNKS = 6, 13, 3, (4, 1, 7)


def header(**changes: Any) -> TraceHeader:
    values = {
        "fingerprint": "ab" * 32,
        "model_name": "tiny",
        "activation": "relu",
        "width": WIDTH,
        "neurons": NEURONS,
        "layers": LAYERS,
        "window": 32,
        "corpus_hashes": ("cd" * 32,),
        "tool_version": "0",
        "chunks": CHUNKS,
    }
    return TraceHeader(**(values | changes))


def records() -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(2)
    return [
        (rng.normal(size=(count, WIDTH)).astype(np.float16), rng.random((count, NEURONS)) < 0.3)
        for count in CHUNKS
        for _ in range(LAYERS)
    ]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    result = tmp_path / "m.trace.zst"
    write_trace(result, header(), [encode_frame(*record) for record in records()])
    return result


def made(path: Path, document: dict[str, Any] | bytes, frames: list[bytes], table: Any = None) -> Path:
    """A trace by hand, with sizes as ``table`` makes them of the true ones."""
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    every = [zstandard.compress(text), *frames]
    sizes = [(len(frame), zstandard.frame_content_size(frame)) for frame in every]
    sizes = table(sizes) if table else sizes
    packed = b"".join(struct.pack("<II", *(n & 0xFFFFFFFF for n in size)) for size in sizes)
    footer = struct.pack("<IBI", len(sizes), 0, 0x8F92EAB1)
    path.write_bytes(
        b"".join(every) + struct.pack("<II", 0x184D2A5E, len(packed) + len(footer)) + packed + footer
    )
    return path


def document(**changes: Any) -> dict[str, Any]:
    return {"format": "powerinfer-trace", "version": 1, **vars(header()), **changes}


def test_what_was_written_is_read(path: Path) -> None:
    expected = records()
    with TraceFile(path) as trace:
        assert trace.header == header()
        assert trace.header.records == 12
        for layer in range(LAYERS):
            inputs, active = trace.read(layer)
            assert np.array_equal(inputs, np.concatenate([x for x, _ in expected[layer::LAYERS]]))
            assert np.array_equal(active, np.concatenate([a for _, a in expected[layer::LAYERS]]))
            inputs, active = trace.read(layer, [2, 0])
            assert np.array_equal(inputs[:7], expected[2 * LAYERS + layer][0])
            assert np.array_equal(active[7:], expected[layer][1])


def test_zstd_itself_reads_the_whole(path: Path) -> None:
    reader = zstandard.ZstdDecompressor().stream_reader(path.read_bytes(), read_across_frames=True)
    data = reader.read()
    assert data.endswith(np.packbits(records()[-1][1], axis=1, bitorder="little").tobytes())


def test_same_content_same_bytes(path: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    write_trace(again, header(), [encode_frame(*record) for record in records()])
    assert again.read_bytes() == path.read_bytes()


def test_too_few_frames_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(errors.WriteOrder):
        write_trace(tmp_path / "t", header(), [encode_frame(*record) for record in records()[1:]])
    assert not list(tmp_path.iterdir())


def test_another_model_is_refused_with_both_names(path: Path) -> None:
    with TraceFile(path) as trace:
        trace.require_model("ab" * 32, "x", (LAYERS, WIDTH, NEURONS))
        with pytest.raises(errors.OtherModel, match=r"'tiny'.*'other'"):
            trace.require_model("00" * 32, "other", (LAYERS, WIDTH, NEURONS))
        with pytest.raises(errors.OtherModel):
            trace.require_model("ab" * 32, "x", (LAYERS, WIDTH + 1, NEURONS))


def good_frames() -> list[bytes]:
    return [encode_frame(*record) for record in records()]


def bomb(size: int) -> bytes:
    return zstandard.compress(bytes(size))


@pytest.mark.parametrize(
    ("fault", "make"),
    [
        (errors.BadMagic, lambda p: made(p, document(format="x"), good_frames())),
        (errors.BadMagic, lambda p: made(p, b"[]", good_frames())),
        (errors.UnsupportedVersion, lambda p: made(p, document(version=2), good_frames())),
        (errors.BadDocument, lambda p: made(p, b"{", good_frames())),
        (errors.InvalidUTF8, lambda p: made(p, b"\xff", good_frames())),
        (errors.BadField, lambda p: made(p, document(width=0), good_frames())),
        (errors.BadField, lambda p: made(p, document(layers=1 << 40), good_frames())),
        (errors.BadField, lambda p: made(p, document(chunks=[]), good_frames())),
        (errors.BadField, lambda p: made(p, document(chunks=[4, 0, 7]), good_frames())),
        (errors.BadField, lambda p: made(p, document(extra=1), good_frames())),
        (errors.BadFrame, lambda p: made(p, document(), good_frames()[1:])),
        (errors.BadFrame, lambda p: made(p, document(neurons=NEURONS + 8), good_frames())),
        (errors.BadFrame, lambda p: made(p, document(), [bomb(1000), *good_frames()[1:]])),
        (errors.BadFrame, lambda p: made(p, bytes(17 << 20), good_frames())),
        (errors.BadFrame, lambda p: made(p, document(), good_frames(), lambda s: [(1, 1), *s[1:]])),
        (errors.BadFrame, lambda p: made(p, document(), good_frames(), lambda s: [(0, 0), *s])),
    ],
)
def test_faults(tmp_path: Path, fault: type[Exception], make: Any) -> None:
    with pytest.raises(fault):
        TraceFile(make(tmp_path / "t"))


def test_a_frame_that_lies_about_its_size(tmp_path: Path) -> None:
    """The table promises what the records need; the frame itself would unpack to more."""
    frames = good_frames()
    true_size = zstandard.frame_content_size(frames[0])
    frames[0] = bomb(1 << 20)
    path = made(tmp_path / "t", document(), frames, lambda s: [s[0], (s[1][0], true_size), *s[2:]])
    with TraceFile(path) as trace, pytest.raises(errors.BadFrame, match="another size"):
        trace.read(0)


@pytest.mark.parametrize("kind", ["bits", "infinite", "damaged"])
def test_records_that_cannot_be(tmp_path: Path, kind: str) -> None:
    frames, (inputs, active) = good_frames(), records()[0]
    if kind == "bits":
        masks = np.packbits(active, axis=1, bitorder="little")
        masks[0, -1] |= 0x80
        frames[0] = zstandard.compress(inputs.tobytes() + masks.tobytes())
    elif kind == "infinite":
        inputs[1, 2] = np.inf
        frames[0] = encode_frame(inputs, active)
    else:
        frames[0] = frames[0][:-4] + b"\xff" * 4
    with TraceFile(made(tmp_path / "t", document(), frames)) as trace:
        trace.read(1)
        with pytest.raises(errors.BadFrame):
            trace.read(0)


@pytest.mark.parametrize("length", [0, 5, 16, 17, 100])
def test_a_file_that_was_cut_off(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises((errors.TruncatedFile, errors.BadMagic)):
        TraceFile(path)


def test_no_file_and_no_regular_file(tmp_path: Path) -> None:
    with pytest.raises(errors.CannotRead):
        TraceFile(tmp_path / "none")
    with pytest.raises(errors.NotARegularFile):
        TraceFile(tmp_path)


@settings(derandomize=True, deadline=None, max_examples=300, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4))
def test_damage_is_an_error_or_harmless(path: Path, changes: list[tuple[float, int]]) -> None:
    changed = bytearray(path.read_bytes())
    for share, value in changes:
        changed[int(share * len(changed))] = value
    damaged = path.with_name("damaged")
    damaged.write_bytes(changed)
    try:
        with TraceFile(damaged) as trace:
            for layer in range(trace.header.layers):
                inputs, active = trace.read(layer)
                assert inputs.shape == (trace.header.records, trace.header.width)
                assert active.shape == (trace.header.records, trace.header.neurons)
    except errors.FormatError:
        pass
