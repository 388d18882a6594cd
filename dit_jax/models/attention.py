"""Scaled dot-product attention, and the choice of its kernel.

B batch, N tokens, M context tokens, H heads, E width of a head.
"""

from typing import Any

import jax
import jax.numpy as jnp

from dit_jax.models.products import dot_general

IMPLEMENTATIONS = ("auto", "xla", "cudnn")
CUDNN_HEAD_WIDTH = 128


def attention_kernel(implementation: str, dtype: Any, head_width: int, platform: str | None = None) -> str:
    """Returns "xla" or "cudnn". "auto" is cuDNN on a GPU, for 16-bit dtypes and head widths that it supports; else XLA.

    cuDNN supports multiples of 8 up to CUDNN_HEAD_WIDTH. (jax 0.11: up to 256 on Hopper; "auto" does not use that.)

    platform: "cpu", "gpu" or "tpu"; None is the platform of the default backend.
    """
    if implementation != "auto":
        return implementation
    fits = jnp.dtype(dtype).itemsize == 2 and head_width % 8 == 0 and head_width <= CUDNN_HEAD_WIDTH
    return "cudnn" if (platform or jax.default_backend()) == "gpu" and fits else "xla"


def dot_product_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    implementation: str = "auto",
    bias: jax.Array | None = None,
    scale: float | None = None,
) -> jax.Array:
    """softmax(scale q k^T + bias) v with the softmax in float32.

    Args:
        q: [B, N, H, E].
        k, v: [B, M, H, E].
        implementation: see `attention_kernel`. The gradient of a bias that has one needs even N and M with cuDNN.
        bias: broadcasts to [B, H, N, M], added to the scaled scores; in the dtype of q for cuDNN.
        scale: None for 1 / sqrt(E).

    Returns:
        [B, N, H, E] in the dtype of q.
    """
    if attention_kernel(implementation, q.dtype, q.shape[-1]) == "cudnn":
        return _fused_attention(q, k, v, bias, scale)
    # Plain matrix products per head take a quarter less time on a CPU than the einsums of jax.nn.
    q, k, v = (jnp.swapaxes(part, 1, 2) for part in (q, k, v))  # [B, H, N or M, E]
    per_head = ((3,), (2,)), ((0, 1), (0, 1))
    scores = dot_general(q, jnp.swapaxes(k, 2, 3), per_head, preferred_element_type=jnp.float32)
    scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
    weights = jax.nn.softmax(scores if bias is None else scores + bias.astype(jnp.float32), axis=-1)
    return jnp.swapaxes(dot_general(weights.astype(q.dtype), v, per_head), 1, 2)


def _fused_attention(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None, scale: float | None) -> jax.Array:
    """cuDNN's kernel. It takes a bias for all N and M, and JAX 0.10 refuses its gradient where N or M is odd: it gets one row
    more, which it is told to ignore."""
    rows, columns = q.shape[1], k.shape[1]
    odd = rows % 2, columns % 2
    if bias is not None:
        bias = bias.reshape((1,) * (4 - bias.ndim) + bias.shape).astype(q.dtype)
        bias = jnp.broadcast_to(bias, (*bias.shape[:2], rows, columns))
        bias = jnp.pad(bias, ((0, 0), (0, 0), (0, odd[0]), (0, odd[1]))) if any(odd) else bias
    if not any(odd):
        return jax.nn.dot_product_attention(q, k, v, bias, scale=scale, implementation="cudnn")
    q, k, v = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (q, k, v))
    count = jnp.full(len(q), rows, jnp.int32), jnp.full(len(q), columns, jnp.int32)
    y: jax.Array = jax.nn.dot_product_attention(
        q, k, v, bias, scale=scale, implementation="cudnn", query_seq_lengths=count[0], key_value_seq_lengths=count[1]
    )
    return y[:, :rows]
