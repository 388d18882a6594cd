"""MM-DiT and PixArt: published sizes, what `check` refuses, skipped blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from dit_jax.errors import UserError
from dit_jax.models.mmdit import MMDiT
from dit_jax.models.pixart import PixArt
from dit_jax.plan.published import counts

SIZES = {  # parameters and GMACs, counted on the modules of diffusers (PixArt-Sigma's GMACs: on ours)
    "SD3-medium@1024": (MMDiT, 2_028_328_000, 4_452),
    "SD3.5-medium@1024": (MMDiT, 2_243_171_520, 5_625),
    "SD3.5-large@1024": (MMDiT, 8_056_627_520, 15_561),
    "PixArt-alpha@256": (PixArt, 610_856_096, None),
    "PixArt-alpha@512": (PixArt, 610_856_096, None),
    "PixArt-Sigma@1024": (PixArt, 610_856_096, None),
}
SMALL = {"patch_size": 2, "depth": 3, "width": 16, "heads": 2, "out_channels": 4, "context_width": 6}


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes(name):
    """Catches a published network of other sizes, and a multiply-add that is left out or counted twice."""
    constructor, params, gmacs = SIZES[name]
    published = constructor.published[name]
    constructor(**published.fields).check(published.input_shape)
    row = counts(constructor, published)
    assert row["params"] == params
    assert gmacs is None or round(row["gmacs"]) == gmacs


def small(constructor):
    """(network, parameters, input, time, condition); no row of the condition is padding."""
    net = constructor(**SMALL, **({"pooled_width": 5, "dual_blocks": 1, "qk_norm": True} if constructor is MMDiT else {}))
    rng = np.random.default_rng(0)
    x, context = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((2, 8, 8, 4), (2, 3, 6)))
    other = {"pooled": jnp.ones((2, 5))} if constructor is MMDiT else {"context_mask": jnp.ones((2, 3))}
    cond, t = {"context": context, **other}, jnp.array([3.0, 700.0])
    shapes = jax.eval_shape(net.init, jax.random.key(0), x, t, cond)["params"]
    params = jax.tree.map(lambda leaf: jnp.asarray(0.2 * rng.standard_normal(leaf.shape), jnp.float32), shapes)
    return net, params, x, t, cond


@pytest.mark.slow
@pytest.mark.parametrize("constructor", [MMDiT, PixArt])
def test_skipped_blocks(constructor):
    """Catches a flag that skips another block or a part of one, and flags of another number of blocks."""
    net, params, x, t, cond = small(constructor)
    apply = jax.jit(lambda params, keep: net.apply({"params": params}, x, t, cond, {"keep": keep}))
    blocks = {name: params[name] for name in ("dual", "blocks", "last") if name in params}
    keep = jnp.array([True, False, True])
    changed = jax.tree.map(lambda leaf: 5 * leaf, params["blocks"])  # MM-DiT: block 1 alone; PixArt: all, of which 1 is changed
    if constructor is PixArt:
        changed = jax.tree.map(lambda a, b: a.at[1].set(b[1]), params["blocks"], changed)
    skipped = apply(params, keep)
    np.testing.assert_array_equal(skipped, apply({**params, **blocks, "blocks": changed}, keep))
    every = jnp.ones(3, bool)
    assert tiny.distance(apply({**params, "blocks": changed}, every), apply(params, every)) > 1e-3
    np.testing.assert_allclose(apply(params, every), jax.jit(net.apply)({"params": params}, x, t, cond), atol=1e-5)
    with pytest.raises(UserError, match=r"keep has shape \(2,\); it must be \(3,\)"):
        jax.eval_shape(net.apply, {"params": params}, x, t, cond, {"keep": jnp.ones(2, bool)})


@pytest.mark.parametrize(
    "fields, shape, words",
    [
        ({}, (9, 8, 4), "9 x 8, not a multiple of model.patch_size = 2"),
        ({"heads": 3}, (8, 8, 4), "heads"),
        ({"remat": "some"}, (8, 8, 4), "model.remat is 'some'"),
        ({"depth": 0}, (8, 8, 4), "model.depth is 0"),
    ],
)
def test_refusals(fields, shape, words):
    """Catches fields and inputs that fail only when the network is traced."""
    for constructor in (MMDiT, PixArt):
        with pytest.raises(UserError, match=words):
            constructor(**SMALL | fields).check(shape)


def test_refusals_of_mmdit():
    """Catches a clip with a table of positions, a table that is too small, rotations that do not fill a head."""
    for fields, shape, words in (
        ({}, (2, 8, 8, 4), "set it to 'rope' for clips"),
        ({"table_side": 3}, (8, 8, 4), "more than model.table_side = 3"),
        ({"position": "rope", "rope_widths": (2, 2, 2)}, (8, 8, 4), "the sum 8"),
        ({"dual_blocks": 3}, (8, 8, 4), "it must lie in 0 to depth - 1 = 2"),
    ):
        with pytest.raises(UserError, match=words):
            MMDiT(**SMALL | fields).check(shape)


def test_missing_text():
    """Catches a trace where the condition has no text, or text of another width."""
    for constructor in (MMDiT, PixArt):
        net, params, x, t, cond = small(constructor)
        for wrong in ({}, {**cond, "context": jnp.ones((2, 3, 7))}):
            with pytest.raises(UserError, match=r'cond\["context"\] is .* \[2, tokens, 6\] is needed'):
                jax.eval_shape(net.apply, {"params": params}, x, t, wrong)
