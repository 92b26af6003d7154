"""Sign predictors: the code of the input, exact sums by XOR and popcount, the same bits everywhere."""

import numpy as np
import pytest

from powerinfer_kernels import (
    KernelError,
    Pool,
    ProgramBuilder,
    Signs,
    aligned,
    available_isas,
    pack_signs,
    reference,
    sign_code_words,
)

EPS = float(np.finfo(np.float32).eps)
TOKENS, HEADER, PLANES = 3, 16, 4
SHAPES = [(1, 1), (5, 7), (16, 32), (17, 33), (40, 64), (33, 100), (150, 577), (16, 1)]


def normal(seed: int, *shape: int) -> np.ndarray:
    out = aligned(shape, np.float32)
    out[:] = np.random.default_rng(seed).standard_normal(shape)
    return out


def run(x: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Code and scores, which must have the same bits for every instruction set and thread count; rows of the
    buffers beyond the run stay as they are."""
    rows, width = weights.shape
    signs = Signs(pack_signs(weights), rows, width)
    code = aligned((TOKENS + 1, sign_code_words(width)), np.uint32)
    out = aligned((TOKENS + 1, rows), np.float32)
    builder = ProgramBuilder(TOKENS + 1)
    builder.sign_code(x, code)
    builder.sign_scores(signs, code, out)
    program, results = builder.build(), []
    for isa in available_isas():
        for threads in (1, 2, 3):
            code[:], out[:] = 7, 7.0
            with Pool(threads, isa) as pool:
                program.run(pool, 0, builder.mark(), TOKENS, 0)
            assert (code[TOKENS] == 7).all()
            assert (out[TOKENS] == 7).all()
            results.append((code[:TOKENS].copy(), out[:TOKENS].copy()))
    for other, scores in results[1:]:
        np.testing.assert_array_equal(other, results[0][0])
        np.testing.assert_array_equal(scores.view(np.uint32), results[0][1].view(np.uint32))
    return results[0]


def decoded(code: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """q and step of each token, out of the planes of bits."""
    blocks = -(-width // 32)
    planes = code[:, HEADER:].reshape(len(code), PLANES + 1, blocks)
    bits = np.unpackbits(np.ascontiguousarray(planes).view(np.uint8), axis=2, bitorder="little")
    assert not bits[:, 1:, width:].any(), "magnitudes beyond the last column"
    bits = bits[:, :, :width].astype(np.int64)
    q = (1 - 2 * bits[:, 0]) * (bits[:, 1:] << np.arange(PLANES)[:, None]).sum(axis=1)
    np.testing.assert_array_equal(code[:, 0], np.abs(q).sum(axis=1))
    return q, np.ascontiguousarray(code[:, 1:2]).view(np.float32)


@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_against_the_reference(rows: int, width: int) -> None:
    """The step carries the rounding of a root of n squares; a magnitude differs from the reference's only
    where x / step is that near to a half; scores are exact sums times the step."""
    x, weights = normal(width, TOKENS + 1, width), normal(rows, rows, width)
    code, scores = run(x, weights)
    q, step = decoded(code, width)
    wide = x[:TOKENS].astype(np.float64)
    exact_q, exact_step = reference.sign_code(wide)
    error = (width / 2 + 6) * EPS
    assert (np.abs(step - exact_step) <= error * exact_step).all()
    beside = np.abs(np.abs(wide) / exact_step % 1 - 0.5) <= 2 * error * (np.abs(wide) / exact_step + 1)
    assert (np.abs(q - exact_q) <= beside).all()
    signs = np.where(weights < 0, -1, 1)
    np.testing.assert_array_equal(scores, (q @ signs.T).astype(np.float32) * step)
    tolerance = error * exact_step * np.abs(exact_q).sum(axis=1, keepdims=True)
    want = reference.sign_scores(wide, signs.astype(np.float64))
    assert (np.abs(scores - want) <= tolerance + 2 * exact_step * beside.sum(axis=1, keepdims=True)).all()


def test_scores_follow_the_products() -> None:
    """What they are for: with weights of random signs they are nearly the product's."""
    x, weights = normal(1, TOKENS + 1, 512), normal(2, 300, 512)
    _, scores = run(x, weights)
    exact = x[:TOKENS] @ weights.T
    assert np.corrcoef(scores.reshape(-1), exact.reshape(-1))[0, 1] > 0.75


def test_zeros_and_nan() -> None:
    x, weights = normal(3, TOKENS + 1, 40), normal(4, 20, 40)
    x[0], x[1, 7] = 0.0, np.nan
    _, scores = run(x, weights)
    assert (scores[0] == 0).all()
    assert np.isnan(scores[1]).all()
    assert np.isfinite(scores[2]).all()


def test_what_does_not_fit() -> None:
    with pytest.raises(KernelError, match="are 12 bytes, the source has 11"):
        Signs(bytes(11), 6, 9)
    builder, signs = ProgramBuilder(2), Signs(bytes(12), 6, 9)
    code, x = aligned((2, sign_code_words(9)), np.uint32), normal(5, 2, 9)
    with pytest.raises(KernelError, match="code"):
        builder.sign_code(x, aligned((2, 3), np.uint32))
    with pytest.raises(KernelError, match="code"):
        builder.sign_scores(signs, code.astype(np.int32), x)
    with pytest.raises(KernelError, match="out"):
        builder.sign_scores(signs, code, x)
