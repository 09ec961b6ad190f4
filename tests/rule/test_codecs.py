"""Codecs of gradients between nodes: the identities of the papers, byte by byte."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dtrain.comm.int8_codec import QuantizationKind, boundaries, code_values, quantize
from dtrain.syncs.common.compressor import Codec
from dtrain.syncs.demo import ChunkedDCT, dct_matrix
from dtrain.syncs.int8 import Int8Codec
from dtrain.syncs.terngrad import TernaryCodec

CODECS = [TernaryCodec(0.0), TernaryCodec(2.5), Int8Codec("dynamic"), Int8Codec("linear")]


def normal(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def round_trip(codec: Codec, values: Tensor, *key: int | str) -> Tensor:
    """Return the values after encoding and decoding."""
    data = codec.encode(values, key)
    assert data.dtype == torch.uint8
    assert len(data) == codec.encoded_bytes(len(values))
    return codec.decode(data, len(values))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 1000])
def test_zeros_and_constants_are_exact(codec: Codec, count: int) -> None:
    assert torch.equal(round_trip(codec, torch.zeros(count), count), torch.zeros(count))
    if count > 1:  # whatever the clipping: the deviation of a constant of one sign is zero
        signs = torch.tensor([1.0, -1.0]).repeat(count)[:count]
        assert torch.equal(round_trip(codec, 0.7 * signs, count), 0.7 * signs)


@pytest.mark.parametrize("codec", CODECS)
def test_float64_is_encoded_as_float32(codec: Codec) -> None:
    values = normal(33)
    assert torch.equal(round_trip(codec, values.double(), "a"), round_trip(codec, values, "a"))


# ---- TernGrad


@pytest.mark.parametrize("clip", [0.0, 1.5, 2.5])
def test_ternary_numbers_are_right_in_the_mean(clip: float) -> None:
    """The mean is the clipped number, within five standard errors of the draws."""
    values, draws = normal(200) + 0.3, 1000
    codec = TernaryCodec(clip)
    decoded = torch.stack([round_trip(codec, values, draw) for draw in range(draws)])
    limit = clip * values.std(correction=0) if clip else torch.inf
    clipped = values.clamp(-limit, limit)
    scale = clipped.abs().max()
    assert {round(float(value), 5) for value in decoded.unique()} <= {
        round(float(value), 5) for value in (-scale, 0 * scale, scale)
    }
    error = (clipped.abs() * (scale - clipped.abs()) / draws).sqrt()
    assert ((decoded.mean(0) - clipped).abs() <= 5 * error + 1e-6).all()
    if clip:
        assert (clipped != values).any()


def test_ternary_draws_follow_from_their_key() -> None:
    values, codec = normal(50), TernaryCodec(2.5)
    assert torch.equal(codec.encode(values, ("a", 1)), codec.encode(values, ("a", 1)))
    assert not torch.equal(codec.encode(values, ("a", 1)), codec.encode(values, ("a", 2)))


def test_four_ternary_digits_fill_a_byte() -> None:
    values = torch.tensor([1.0, -1.0, 0.0, 1.0, -1.0])
    data = TernaryCodec(0.0).encode(values, ("a",))
    assert data[:2].tolist() == [2 | 0 << 2 | 1 << 4 | 2 << 6, 0]


# ---- eight bits


@pytest.mark.parametrize("kind", ["dynamic", "linear"])
def test_eight_bits_are_the_nearest_value(kind: QuantizationKind) -> None:
    """Idempotent, the extremes exact, the error at most half the distance of two values."""
    codec, values = Int8Codec(kind), normal(5000) ** 3
    scale = values.abs().max()
    decoded, grid = round_trip(codec, values), code_values(kind) * scale
    assert torch.equal(round_trip(codec, decoded), decoded)
    assert decoded.abs().max() == scale
    right = torch.bucketize(values, grid).clamp(1, len(grid) - 1)
    low, high = grid[right - 1], grid[right]
    assert ((decoded - values).abs() <= (high - low) / 2 * (1 + 1e-5)).all()


def test_dynamic_values_are_a_tree() -> None:
    """Sign, zeros, marker, fraction: seven powers of ten, half as many steps in each."""
    values = code_values("dynamic")
    assert len(values) == 255
    assert torch.equal(values, -values.flip(0))
    assert values.diff().min() > 0
    for zeros in range(6):
        low, high = 10.0 ** -(zeros + 1), 10.0**-zeros
        inside = (values > low) & (values < high)
        assert int(inside.sum()) == 1 << (6 - zeros)


# ---- DeMo


@pytest.mark.parametrize("shape", [(6,), (1,), (64, 10), (7, 3, 3, 3), (128, 100), (67,)])
def test_a_cosine_transform_and_back_is_the_identity(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    chunks = ChunkedDCT(shape, 64)
    coefficients = chunks.dct(x)
    assert coefficients.shape == (chunks.count, chunks.size)
    assert coefficients.square().sum() == pytest.approx(float(x.square().sum()))
    torch.testing.assert_close(chunks.inverse_dct(coefficients), x, rtol=1e-12, atol=1e-13)


def test_the_transform_is_that_of_scipy() -> None:
    fft = pytest.importorskip("scipy.fft")
    x = torch.randn(12, 10, dtype=torch.float64)
    reference = torch.from_numpy(fft.dctn(x.numpy(), type=2, norm="ortho"))
    torch.testing.assert_close(ChunkedDCT((12, 10), 64).dct(x).view(12, 10), reference)
    assert dct_matrix(5).shape == (5, 5)


@pytest.mark.parametrize("kind", ["dynamic", "linear"])
def test_codes_by_the_upper_half_are_those_of_a_search(kind: QuantizationKind) -> None:
    """At every boundary, next to it, and for numbers of all sizes."""
    edges = boundaries(kind)
    up, down = edges.new_tensor(2.0), edges.new_tensor(-2.0)
    sizes = normal(100_000).clamp(-4, 4) * 10 ** -(normal(100_000, 1).abs() * 6)
    values = torch.cat([edges, edges.nextafter(up), edges.nextafter(down), sizes / 4, -edges])
    assert torch.equal(quantize(values, kind), torch.bucketize(values, edges).to(torch.uint8))


def test_nan_stays_nan() -> None:
    values = torch.tensor([1.0, float("nan"), 2.0])
    assert round_trip(Int8Codec("dynamic"), values).isnan().any()
