"""Attention and its gradient beside the formula in float64; which kernel computes it."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from dit_jax.models.attention import attention_kernel, dot_product_attention


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 2e-5), ("bfloat16", 2e-2)])
def test_attention_is_softmax(dtype, tolerance, with_bias):
    """Catches heads or tokens mixed up; a scale of the wrong width; scores that overflow or a sum that does not match its terms;
    a gradient through the largest score; a bias that is scaled like the scores, added after the softmax, of another head, or
    without a gradient."""
    rng, (b, n, m, h, e) = np.random.default_rng(0), (2, 5, 7, 3, 12)
    q, k, v, dy = (jnp.asarray(rng.normal(size=(b, length, h, e)), dtype) for length in (n, m, m, n))
    q = q.at[0].multiply(30)  # scores of hundreds: softmax all but picks one
    bias = jnp.asarray(with_bias * 2 * rng.normal(size=(h, n, m)), dtype)
    given = (q, k, v, bias) if with_bias else (q, k, v)
    exact = [np.asarray(x, np.float64) for x in (q, k, v, dy)]
    scores = np.einsum("bnhe,bmhe->bhnm", *exact[:2]) / math.sqrt(e) + np.asarray(bias, np.float64)
    weights = scipy.special.softmax(scores, axis=-1)
    y, gradients = jax.vjp(lambda q, k, v, *bias: dot_product_attention(q, k, v, "xla", *bias), *given)
    dy_v = np.einsum("bnhe,bmhe->bhnm", exact[3], exact[2])
    d_scores = weights * (dy_v - (weights * dy_v).sum(-1, keepdims=True))
    expected = [
        np.einsum("bhnm,bmhe->bnhe", weights, exact[2]),
        np.einsum("bhnm,bmhe->bnhe", d_scores, exact[1]) / math.sqrt(e),
        np.einsum("bhnm,bnhe->bmhe", d_scores, exact[0]) / math.sqrt(e),
        np.einsum("bhnm,bnhe->bmhe", weights, exact[3]),
        d_scores.sum(0),
    ]
    for ours, other in zip((y, *gradients(dy)), expected[: 1 + len(given)], strict=True):
        assert ours.dtype == dtype
        np.testing.assert_allclose(np.asarray(ours, np.float64), other, rtol=tolerance, atol=tolerance * abs(other).max())
    if with_bias:
        np.testing.assert_array_equal(dot_product_attention(q, k, v, "xla", bias[None]), y)


@pytest.mark.parametrize(
    "dtype, width, platform, kernel",
    [
        ("bfloat16", 72, "gpu", "cudnn"),
        ("bfloat16", 12, "gpu", "xla"),
        ("bfloat16", 256, "gpu", "xla"),
        ("float32", 64, "gpu", "xla"),
        ("bfloat16", 64, "tpu", "xla"),
    ],
)
def test_attention_kernel(dtype, width, platform, kernel):
    """A head width or dtype that cuDNN refuses, chosen for it by "auto"."""
    assert attention_kernel("auto", dtype, width, platform) == kernel
    assert attention_kernel("xla", dtype, width, platform) == "xla"


@pytest.mark.parametrize("n, m", [(5, 7), (6, 7), (5, 6), (6, 8)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_lengths_that_cudnn_takes(monkeypatch, n, m, with_bias):
    """Catches odd lengths and a bias of one row, which cuDNN refuses in training, and a row that is added and attended to.

    XLA stands for cuDNN, with the same meaning of the lengths.
    """
    rng, (b, h, e) = np.random.default_rng(0), (2, 3, 16)
    q, k, v, dy = (jnp.asarray(rng.normal(size=(b, length, h, e)), jnp.float32) for length in (n, m, m, n))
    bias = jnp.where(jnp.arange(m) < m - 2, 0.0, -1e30)[None, None, None] if with_bias else None
    fused, seen = jax.nn.dot_product_attention, []

    def xla(q, k, v, bias=None, *, implementation, **options):
        seen.append((q.shape[1], k.shape[1], None if bias is None else bias.shape))
        assert implementation == "cudnn"
        return fused(q, k, v, bias, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", xla)
    expected, expected_vjp = jax.vjp(lambda *x: dot_product_attention(*x, "xla", bias), q, k, v)
    found, vjp = jax.vjp(lambda *x: dot_product_attention(*x, "cudnn", bias), q, k, v)
    even = n + n % 2, m + m % 2
    assert seen == [(*even, (1, 1, *even) if with_bias else None)]
    for ours, other in zip((found, *vjp(dy)), (expected, *expected_vjp(dy)), strict=True):
        np.testing.assert_allclose(ours, other, rtol=1e-4, atol=1e-5)
