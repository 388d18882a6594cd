import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from traced import traced_macs

from dit_jax import recipes
from dit_jax.errors import UserError
from dit_jax.models import dit, layers, position
from dit_jax.models.dit import CONDITIONINGS, DiT
from dit_jax.models.patches import patchify, unpatchify

PAPER_PARAMETERS = {  # trainable, 256 px, learned variance, 1000 + 1 classes
    "S/8": 33142016,
    "S/4": 32920448,
    "S/2": 32865056,
    "B/8": 130869248,
    "B/4": 130426496,
    "B/2": 130315808,
    "L/8": 458578432,
    "L/4": 457988224,
    "L/2": 457840672,
    "XL/8": 675664640,
    "XL/4": 675000704,
    "XL/2": 674834720,
}
PAPER_GMACS = {  # (256 px, 512 px), what the paper prints as Gflops
    "S/8": (0.36, 1.43),
    "S/4": (1.41, 6.07),
    "S/2": (6.06, 31.44),
    "B/8": (1.42, 5.59),
    "B/4": (5.56, 23.03),
    "B/2": (23.01, 106.38),
    "L/8": (5.01, 19.73),
    "L/4": (19.7, 80.74),
    "L/2": (80.71, 360.98),
    "XL/8": (7.39, 29.09),
    "XL/4": (29.05, 118.66),
    "XL/2": (118.64, 524.6),
}
PAPER_CONDITIONING = {  # XL/2: millions of parameters, GMACs
    "in_context": (449, 119.37),
    "cross_attention": (598, 137.62),
    "adaln": (600, 118.56),
    "adaln_zero": (675, 118.64),
}


def paper_model(size, conditioning="adaln_zero"):
    fields = recipes.model(size)
    return DiT(
        conditioning=conditioning,
        num_classes=1000,
        out_channels=8,
        **{k: fields[k] for k in ("patch_size", "depth", "width", "heads")},
    )


def parameters(net, side=32):
    shapes = jax.eval_shape(
        net.init, jax.random.key(0), jnp.zeros((1, side, side, 4)), jnp.zeros((1,)), {"label": jnp.zeros((1,), jnp.int32)}
    )
    return sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))


def inputs(batch=3, side=8, channels=1):
    x = jax.random.normal(jax.random.key(1), (batch, side, side, channels))
    return x, jnp.linspace(0, 999, batch), {"label": jnp.arange(batch) % 11}


def init(net, x, t, cond):
    return tiny.random_params(jax.eval_shape(net.init, jax.random.key(0), x, t, cond))


@pytest.mark.parametrize("size", recipes.MODELS)
def test_size_table(size):
    """A wrong width, depth, head count, missing bias or extra layer in any of the twelve sizes."""
    assert parameters(paper_model(size)) == PAPER_PARAMETERS[size]
    for side, gmacs in zip((32, 64), PAPER_GMACS[size], strict=True):
        # The paper prints two decimals.
        assert paper_model(size).macs((side, side, 4)) / 1e9 == pytest.approx(gmacs, rel=3e-3, abs=0.0051)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_conditioning_table(conditioning):
    """A block kind with other layers than the paper's (table of section 5, conditioning ablation)."""
    millions, gmacs = PAPER_CONDITIONING[conditioning]
    net = paper_model("XL/2", conditioning)
    assert round(parameters(net) / 1e6) == millions
    assert net.macs((32, 32, 4)) / 1e9 == pytest.approx(gmacs, rel=3e-3)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("num_classes", [0, 10])
def test_macs_match_traced_products(conditioning, num_classes):
    """A matrix product that the analytic count forgets or counts twice."""
    net = tiny.dit(conditioning, num_classes=num_classes)
    x, t, cond = inputs(batch=1)
    cond = cond if num_classes else {}
    params = jax.eval_shape(net.init, jax.random.key(0), x, t, cond)
    assert traced_macs(net.apply, params, x, t, cond) == net.macs((8, 8, 1))


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_macs_match_xla(conditioning):
    """A count that drifts from what XLA says of the unrolled program (which also counts elementwise work, a few percent)."""
    net = tiny.dit(conditioning, unroll=True, width=256)
    x, t, cond = inputs(batch=1)
    params = jax.eval_shape(net.init, jax.random.key(0), x, t, cond)
    xla = jax.jit(net.apply).lower(params, x, t, cond).cost_analysis()["flops"] / 2
    assert 1 < xla / net.macs((8, 8, 1)) < 1.03


def test_patchify_inverse():
    """Rows and columns, or patch and channel, exchanged."""
    x = jnp.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    tokens = patchify(x, 2)
    assert (unpatchify(tokens, 2, 4, 6) == x).all()
    np.testing.assert_array_equal(tokens[1, 4].reshape(2, 2, 3), x[1, 2:4, 2:4])  # second row, second column


def test_position_table():
    """Halves exchanged (the column comes first), sines and cosines exchanged, rows run the wrong way."""
    table, width = position.sincos_2d(16, 3, 5), 16
    for row, column in ((0, 0), (2, 1), (1, 4)):
        frequencies = [10000 ** (-i / 4) for i in range(4)]
        expected = [f(p * w) for p in (column, row) for f in (math.sin, math.cos) for w in frequencies]
        np.testing.assert_allclose(table[row * 5 + column], expected, rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match="multiple of 4"):
        position.sincos_2d(width + 2, 2, 2)


def test_frequency_embedding():
    """Sines before cosines, or a wrong lowest frequency."""
    e = layers.frequency_embedding(jnp.array([0.0, 500.5]), 8)
    expected = [f(500.5 * 10000 ** (-i / 4)) for f in (math.cos, math.sin) for i in range(4)]
    np.testing.assert_allclose(e[1], expected, atol=1e-4)
    np.testing.assert_allclose(e[0], [1] * 4 + [0] * 4)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_projections_apart_or_together(dtype, tolerance):
    """A GPU that computes other q, k and v than a CPU, or learns another kernel: the products apart run with cuDNN only."""
    together, apart = (layers.Projections(3, 3, flag, dtype=dtype) for flag in (False, True))
    x, dy = jax.random.normal(jax.random.key(0), (2, 5, 12)), jax.random.normal(jax.random.key(1), (3, 2, 5, 3, 4))
    params = tiny.random_params(together.init(jax.random.key(2), x))

    def outcome(layer):
        y, vjp = jax.vjp(lambda params, x: layer.apply(params, x), params, x)
        return y, vjp([part.astype(dtype) for part in dy])

    for one, other in zip(jax.tree.leaves(outcome(together)), jax.tree.leaves(outcome(apart)), strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        np.testing.assert_allclose(
            *(np.asarray(a, np.float32) for a in (one, other)), rtol=tolerance, atol=tolerance * float(abs(one).max())
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    "conditioning",
    ["adaln_zero", *(pytest.param(c, marks=pytest.mark.exhaustive) for c in ("cross_attention", "in_context", "adaln"))],
)
def test_forms_agree(conditioning):
    """Scanned, unrolled and rematerialised forms that compute different things, forward or backward."""
    x, t, cond = inputs()
    params = init(tiny.dit(conditioning), x, t, cond)

    def value(net):
        return jax.jit(jax.value_and_grad(lambda p: jnp.square(net.apply(p, x, t, cond)).sum()))(params)

    plain = value(tiny.dit(conditioning, remat="none"))
    named = ("elementwise", "offload") if conditioning == "cross_attention" else ()  # it has every tensor that they name
    for fields in ({"unroll": True}, {"remat": "full"}, {"remat": "dots"}, *({"remat": policy} for policy in named)):
        assert tiny.distance(value(tiny.dit(conditioning, **fields)), plain) < 2e-5


@pytest.mark.parametrize("platform, form", [("gpu", (True, "none")), ("cpu", (False, "elementwise"))])
def test_form_left_to_the_platform(platform, form, monkeypatch):
    """A network that ignores what was decided for its platform, or a user's choice that is overruled."""
    x, t, cond = inputs()

    def gradient(**fields):
        net = tiny.dit(**fields)
        params = jax.eval_shape(net.init, jax.random.key(0), x, t, cond)
        return str(jax.make_jaxpr(jax.grad(lambda p: net.apply(p, x, t, cond).sum()))(params))

    assert dit.form_of_loop(None, "auto", platform) == form
    assert dit.form_of_loop(False, "full", platform) == (False, "full")
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    assert gradient() == gradient(unroll=form[0], remat=form[1])


@pytest.mark.slow
def test_remat_saves_memory():
    """A policy that stores what it should repeat: a name that no tensor has, or a tensor that lost its name."""
    x, t, cond = inputs(batch=8)
    fields = {"width": 64, "depth": 8, "patch_size": 1}
    params = jax.eval_shape(tiny.dit(**fields).init, jax.random.key(0), x, t, cond)

    def temporaries(remat):
        net = tiny.dit(**fields, remat=remat)
        gradient = jax.jit(jax.grad(lambda p: jnp.square(net.apply(p, x, t, cond)).sum()))
        return gradient.lower(params).compile().memory_analysis().temp_size_in_bytes

    none, elementwise, dots, full = map(temporaries, ("none", "elementwise", "dots", "full"))
    unit = 8 * 64 * 64 * 4 * 8  # one [B, N, D] in each of 8 blocks: of these qkv, attention, mlp are 3 + 1 + 1 + 4 + 1
    assert none > elementwise + 5 * unit and elementwise > dots > full
    assert 8.2 * unit < elementwise - full < 10.5 * unit  # the repeated parts take some room of their own


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_conditions_matter(conditioning):
    """A block that ignores time, label or the order of the batch."""
    x, t, cond = inputs()
    net = tiny.dit(conditioning)
    params = init(net, x, t, cond)
    y = net.apply(params, x, t, cond)
    assert y.shape == (3, 8, 8, 2) and y.dtype == jnp.float32
    assert jnp.abs(net.apply(params, x, t + 100, cond) - y).max() > 1e-3
    assert jnp.abs(net.apply(params, x, t, {"label": cond["label"] + 1}) - y).max() > 1e-3
    np.testing.assert_allclose(net.apply(params, x[::-1], t[::-1], {"label": cond["label"][::-1]})[::-1], y, atol=1e-5)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_starts_at_zero(conditioning):
    """An output layer, or an adaLN-Zero gate, that is not zero at the start."""
    x, t, cond = inputs()
    net = tiny.dit(conditioning)
    params = net.init(jax.random.key(0), x, t, cond)
    assert jnp.abs(net.apply(params, x, t, cond)).max() == 0


def test_initial_distributions():
    """Bounds that come from a reshaped kernel instead of the paper's matrix, or another distribution."""
    net = tiny.dit(width=256, heads=4, depth=3, patch_size=4)
    x, t, cond = inputs(channels=3)
    p = net.init(jax.random.key(0), x, t, cond)["params"]

    def uniform(kernel, fan_in, fan_out):
        bound = math.sqrt(6 / (fan_in + fan_out))
        assert 0.98 * bound < jnp.abs(kernel).max() <= bound
        assert kernel.std() == pytest.approx(bound / math.sqrt(3), rel=0.03)

    d = 256
    uniform(p["blocks"]["attention"]["qkv"]["kernel"], d, 3 * d)
    uniform(p["blocks"]["attention"]["out"]["kernel"], d, d)
    uniform(p["blocks"]["mlp"]["in"]["kernel"], d, 4 * d)
    uniform(p["blocks"]["mlp"]["out"]["kernel"], 4 * d, d)
    uniform(p["patch_embedding"]["kernel"], 4 * 4 * 3, d)
    for table in (p["label_embedding"]["embedding"], p["time_embedding"]["in"]["kernel"], p["time_embedding"]["out"]["kernel"]):
        assert table.std() == pytest.approx(0.02, rel=0.05) and jnp.abs(table).max() > 0.05
    assert p["label_embedding"]["embedding"].shape == (11, d)
    for module in (p["blocks"]["modulation"], p["final"]["modulation"], p["final"]):
        assert not any(x.any() for x in jax.tree.leaves(module["linear"]))
    for path, x in jax.tree_util.tree_leaves_with_path(p):
        assert path[-1].key != "bias" or not x.any()
    assert not jnp.allclose(p["blocks"]["mlp"]["in"]["kernel"][0], p["blocks"]["mlp"]["in"]["kernel"][1])


def test_bfloat16_is_close():
    """A sum or norm that overflows or loses its digits in 16 bits; a parameter that is stored in 16 bits."""
    x, t, cond = inputs()
    params = init(tiny.dit(), x, t, cond)
    y = tiny.dit().apply(params, x, t, cond)
    half = tiny.dit(dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(half.init(jax.random.key(0), x, t, cond))} == {jnp.dtype("float32")}
    assert tiny.distance(half.apply(params, x, t, cond), y) < 0.05


@pytest.mark.parametrize(
    "fields, text",
    [
        ({"heads": 5}, "does not divide"),
        ({"patch_size": 3}, "not a multiple of model.patch_size = 3"),
        ({"conditioning": "film"}, "must be one of adaln_zero"),
        ({"remat": "some"}, "must be one of auto, none"),
        ({"depth": 0}, "at least 1"),
    ],
)
def test_bad_fields(fields, text):
    """A mistake in the model section that surfaces as a shape error from within a layer."""
    with pytest.raises(UserError, match=text):
        tiny.dit(**fields).init(jax.random.key(0), *inputs())
