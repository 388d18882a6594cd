"""Fingerprints of arrays: a uint32 that detects flipped bits, swapped elements and changes of length.

The fingerprint of an array is the sum mod 2^32, over its 32-bit words w_i in row-major order, of fmix32(w_i + i *
0x9E3779B9), where fmix32 is the finaliser of MurmurHash3 (Appleby 2011, public domain). fmix32 is a bijection, so a
change of one word always changes the sum; any other change goes undetected with probability 2^-32. Integer addition
commutes, so the value does not depend on the sharding or the order of the reduction. Elements of one or two bytes and
booleans count as one word each, elements of eight bytes as two (low word first).
"""

import collections
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_HOST_CHUNK_WORDS = 1 << 22  # limits the temporaries of the host version to about 50 MB
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint32}


def is_key(leaf: Any) -> bool:
    """Whether a leaf is a typed PRNG key (`jax.random.key`), concrete or abstract."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def leaf_names(tree: Any) -> list[str]:
    """Slash-joined path of every leaf, in flattening order: ["step", "params/block/kernel", "opt_state/0/count", ...].

    Raises: ValueError if two leaves get the same name (a dict key that contains a slash).
    """
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    if len(set(names)) < len(names):
        repeated = sorted(name for name, count in collections.Counter(names).items() if count > 1)
        raise ValueError(f"several leaves have the same path {repeated[:3]}: keys of a state must not contain '/'")
    return names


def fingerprints(arrays: list[jax.Array]) -> list[int]:
    """Fingerprints of jax arrays as ints, computed on their devices; only one uint32 per array is sent to the host.

    Temporary memory per device: up to 4 bytes per element of one shard, unless XLA fuses it.

    Args:
        arrays: list of jax.Array of any sharding, including typed PRNG keys. Every process calls this with the same
            list.
    Raises: ValueError for a dtype without a bit pattern of 1, 2, 4 or 8 bytes (int4, complex64, ...).
    """
    for array in arrays:
        if not is_key(array):
            _word_type(array.dtype)
    # Sequentially: on simulated CPU devices, XLA deadlocks if several programs with collectives are in flight.
    return [int(_device_fingerprint(array)) for array in arrays]


@jax.jit
def _device_fingerprint(array):
    array = jax.device_put(array, jax.memory.Space.Device)  # it may be in host memory
    bits = jax.random.key_data(array) if is_key(array) else array
    if bits.dtype == jnp.bool_:
        words = bits.astype(jnp.uint32)
    else:
        words = jax.lax.bitcast_convert_type(bits, _word_type(bits.dtype)).astype(jnp.uint32)
    # The row-major index is built per axis: flattening a sharded array would gather it.
    index, stride = jnp.uint32(0), 1
    for axis in reversed(range(words.ndim)):
        index = index + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * np.uint32(stride % 2**32)
        stride *= words.shape[axis]
    return jnp.sum(_mix(words, index), dtype=jnp.uint32)


def host_fingerprint(array: np.ndarray) -> int:
    """Fingerprint of one NumPy array (PRNG keys as their uint32 key data), equal to that of `fingerprints`."""
    flat = np.ascontiguousarray(array).reshape(-1)
    flat = flat.view(_word_type(flat.dtype))
    total = 0
    for start in range(0, flat.size, _HOST_CHUNK_WORDS):
        words = flat[start : start + _HOST_CHUNK_WORDS].astype(np.uint32)
        index = (np.arange(start, start + words.size, dtype=np.uint64) % 2**32).astype(np.uint32)
        total += int(_mix(words, index).sum(dtype=np.uint64))
    return total % 2**32


def _mix(words, index):
    mixed = words + index * np.uint32(0x9E3779B9)
    mixed = (mixed ^ (mixed >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return mixed ^ (mixed >> np.uint32(16))


def _word_type(dtype):
    dtype = jnp.dtype(dtype)
    if dtype == np.bool_:
        return np.uint8
    bits = (jnp.iinfo if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo)(dtype).bits
    if jnp.issubdtype(dtype, jnp.complexfloating) or bits < 8:
        raise ValueError(f"dtype {dtype} has no fingerprint: use bool, or an integer or float of 8 to 64 bits")
    return _UNSIGNED[dtype.itemsize]
