"""Products against `lax.dot_general`, whose derivatives are JAX's own."""

import re

import jax
import jax.numpy as jnp
import pytest
import tiny
from jax import lax

from dit_jax.models.products import dot_general

LAST_BY_FIRST = (((2,), (0,)), ((), ()))
CASES = {
    "wide": ((2, 5, 6), (6, 9), LAST_BY_FIRST),
    "narrow": ((2, 5, 6), (6, 4), LAST_BY_FIRST),
    "two summed axes, wide": ((2, 5, 3, 4), (4, 17, 3), (((3, 2), (0, 2)), ((), ()))),
    "two summed axes, narrow": ((2, 5, 3, 4), (4, 7, 3), (((3, 2), (0, 2)), ((), ()))),
    "heads, wide": ((2, 3, 5, 4), (3, 2, 4, 6), (((3,), (2,)), ((0, 1), (1, 0)))),
    "heads, narrow": ((2, 3, 5, 4), (2, 3, 4, 2), (((3,), (2,)), ((0, 1), (0, 1)))),
}
DEFAULT = ("wide", "two summed axes, narrow", "heads, narrow")


def draw(shape, key):
    return jax.random.normal(jax.random.key(key), shape)


@pytest.mark.parametrize("name", [name if name in DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in CASES])
def test_derivatives_are_those_of_lax(name):
    """A gradient with its axes swapped or of the wrong operand; a rule that forward mode, vmap or a second derivative lacks."""
    x_shape, w_shape, dimensions = CASES[name]
    x, dx, w, dw = (draw(shape, key) for key, shape in enumerate((x_shape, x_shape, w_shape, w_shape)))

    def outcomes(product):
        def f(x, w):
            return jnp.sin(product(x, w, dimensions))

        gradient = jax.grad(lambda x, w: jnp.square(f(x, w)).sum(), (0, 1))
        return jax.jit(
            lambda x, dx, w, dw: (
                jax.jvp(f, (x, w), (dx, dw)),
                jax.jvp(lambda w: f(x, w), (w,), (dw,)),
                gradient(x, w),
                jax.vmap(gradient, (0, None))(jnp.stack([x, dx]), w),
                jax.jvp(gradient, (x, w), (dx, dw)),
                jax.grad(lambda w: jax.jvp(f, (x, w), (dx, dw))[1].sum())(w),
            )
        )(x, dx, w, dw)

    ours, others = outcomes(dot_general), outcomes(lax.dot_general)
    assert jax.tree.map(jnp.shape, ours) == jax.tree.map(jnp.shape, others)
    assert tiny.distance(ours, others) < 1e-5


def gradient(product, features):
    return jax.jit(jax.grad(lambda w, x: jnp.square(product(x, w, LAST_BY_FIRST)).sum())).trace(
        jnp.ones((64, features)), jnp.ones((8, 256, 64))
    )


@pytest.mark.parametrize("features", (32, 128))
def test_the_gradient_by_a_weight_has_the_fast_layout(features):
    """A product that XLA's slow kernels compute on a CPU: its left operand does not have the summed axis last."""

    def slow(product):
        program = gradient(product, features).lower().compile().as_text()
        dots = re.findall(r" dot\(.*lhs_contracting_dims=\{(\d+)\}", program)
        assert dots
        return "0" in dots

    assert slow(lax.dot_general) and not slow(dot_general)


@pytest.mark.parametrize("chosen_by", ("mesh", "backend"))
def test_other_platforms_compute_the_gradient_of_jax(chosen_by, monkeypatch):
    """A copy for the kernels of a CPU in the program for a TPU that `plan` compiles on a CPU, or on a GPU."""
    mesh = jax.sharding.get_abstract_mesh()
    if chosen_by == "mesh":
        device = jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
        mesh = jax.sharding.AbstractMesh((1,), ("data",), (jax.sharding.AxisType.Auto,), abstract_device=device)
    else:
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with jax.sharding.use_abstract_mesh(mesh):
        ours, others = (
            [eqn.primitive.name for eqn in gradient(product, 128).jaxpr.eqns] for product in (dot_general, lax.dot_general)
        )
    assert ours == others
