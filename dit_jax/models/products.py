"""Matrix products whose gradient on a CPU has the layout that XLA's fast kernels take.

The gradient of `x @ w` by `w` sums over the rows of x and of the output's gradient. JAX writes it as a product of two operands
that both have the summed axis first. On a CPU, XLA has fast kernels (YNNPACK) only for a left operand that has it last: it takes
a slower kernel and still copies one operand, often the wider one. Here the narrower operand is transposed. A training step of
S/2 takes a fifth less time. On other platforms the gradient is JAX's own.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

Dimensions = tuple[tuple[Sequence[int], Sequence[int]], tuple[Sequence[int], Sequence[int]]]


def dot_general(
    x: jax.Array, w: jax.Array, dimension_numbers: Dimensions, precision: Any = None, preferred_element_type: Any = None
) -> jax.Array:
    """`lax.dot_general`, with another gradient by w on a CPU. Supports every transformation; linen's layers take it as argument.

    Args:
        x: the operand whose kept axes are many (rows, queries).
        w: the operand whose kept axes are few (features, the width of a head).
    """
    (x_summed, w_summed), (x_batch, w_batch) = dimension_numbers
    dimensions = (tuple(x_summed), tuple(w_summed)), (tuple(x_batch), tuple(w_batch))
    return _product((dimensions, precision, preferred_element_type), x, w)


def _plain(how: Any, x: jax.Array, w: jax.Array) -> jax.Array:
    dimensions, precision, dtype = how
    return lax.dot_general(x, w, dimensions, precision=precision, preferred_element_type=dtype)


_product = jax.custom_jvp(_plain, nondiff_argnums=(0,))


@partial(_product.defjvp, symbolic_zeros=True)
def _product_jvp(how, primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    y = _plain(how, x, w)  # not _product, which policies of rematerialisation do not know
    terms = [] if isinstance(dx, SymbolicZero) else [_plain(how, dx, w)]
    terms += [] if isinstance(dw, SymbolicZero) else [_by_second.bind(x, dw, how=how)]
    return y, sum(terms[1:], terms[0]) if terms else jax.numpy.zeros_like(y)


def _gradient_by_second(dy: jax.Array, x: jax.Array, w: Any, how: Any) -> jax.Array:
    """The gradient by w, from dy: [batch, kept axes of x, kept axes of w]."""
    if _for_cpu():
        return _cpu_form(how, w, dy, x)
    (gradient,) = jax.linear_transpose(lambda w: _plain(how, x, w), w)(dy)
    return gradient


def _for_cpu() -> bool:
    """Whether the program is for CPUs: those of the mesh that is set (`plan` sets one of chips that are elsewhere), or JAX's."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (jax.default_backend() if device is None else device.platform) == "cpu"


def _cpu_form(how: Any, w: Any, dy: jax.Array, x: jax.Array) -> jax.Array:
    (((x_summed, w_summed), (x_batch, w_batch)), precision, _) = how
    batch = len(x_batch)
    rows = tuple(axis for axis in range(x.ndim) if axis not in (*x_summed, *x_batch))
    kept = tuple(axis for axis in range(w.ndim) if axis not in (*w_summed, *w_batch))
    leading = tuple(range(batch))
    dy_rows, dy_kept = tuple(range(batch, batch + len(rows))), tuple(range(batch + len(rows), dy.ndim))
    dims = {"precision": precision, "preferred_element_type": w.dtype}

    def after(axes, other):  # axes of `left` that follow the batch axes and those of `other`
        return tuple(range(batch + len(other), batch + len(other) + len(axes)))

    # The barriers keep XLA from turning the product back into the one that JAX writes.
    if math.prod(x.shape[axis] for axis in x_summed) <= math.prod(w.shape[axis] for axis in kept):
        left = lax.optimization_barrier(x.transpose(*x_batch, *x_summed, *rows))
        product = lax.dot_general(left, dy, ((after(rows, x_summed), dy_rows), (leading, leading)), **dims)
        order = (*w_batch, *w_summed, *kept)
    else:
        left = lax.optimization_barrier(dy.transpose(*leading, *dy_kept, *dy_rows))
        product = lax.dot_general(left, x, ((after(rows, kept), rows), (leading, x_batch)), **dims)
        product = lax.optimization_barrier(product)
        by_place = sorted(range(len(x_summed)), key=lambda i: x_summed[i])  # the product has the summed axes in x's order
        order = (*w_batch, *kept, *(w_summed[i] for i in by_place))
    return product.transpose(*(order.index(axis) for axis in range(w.ndim)))


def _gradient_by_first(dy: jax.Array, x: Any, w: jax.Array, how: Any) -> jax.Array:
    (gradient,) = jax.linear_transpose(lambda x: _plain(how, x, w), x)(dy)
    return gradient


# The product as a function of its second operand: only derivatives contain it.
_by_second = Primitive("dot_general_by_second")
_by_second.def_impl(lambda x, w, how: _plain(how, x, w))
_by_second.def_abstract_eval(lambda x, w, how: x.update(**_shape_of(how, x, w)))
ad.defbilinear(
    _by_second,
    lambda dy, x, w, how: _gradient_by_first(dy, x.aval, w, how),
    lambda dy, x, w, how: _gradient_by_second(dy, x, w.aval, how),
)
mlir.register_lowering(_by_second, mlir.lower_fun(lambda x, w, how: _plain(how, x, w), multiple_results=False))
batching.primitive_batchers[_by_second] = lambda operands, axes, how: (
    jax.vmap(lambda x, w: _plain(how, x, w), axes)(*operands),
    0,
)


def _shape_of(how: Any, x: Any, w: Any) -> dict[str, Any]:
    y = jax.eval_shape(partial(_plain, how), *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x, w)))
    return {"shape": y.shape, "dtype": y.dtype}
