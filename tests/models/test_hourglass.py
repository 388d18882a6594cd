"""HDiT: sizes, local attention, constants, errors. `test_hourglass_parity` compares it with other code."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from flax.traverse_util import flatten_dict

from dit_jax import build
from dit_jax.errors import UserError
from dit_jax.models.hourglass import GROUPS, PUBLISHED, HourglassDiT, axial_rope, cell_centers, rotate
from dit_jax.models.local_attention import neighborhood_attention, window_attention
from dit_jax.tasks.optimizer import adamw, group_of
from dit_jax.tasks.state import count_parameters, without_constants

W, N, G = "shifted_window", "neighborhood", "global"
# Crowson et al. 2024, tables 1 to 8, and k-diffusion's config of Oxford flowers: fields, input side, parameters, what the paper
# prints in millions, and GMACs with windows of 8 x 8 in place of neighbourhoods. k-diffusion's code has these counts.
SIZES = {
    "ImageNet-128": ((4, (384, 768), (2, 11), (W, G), 1, 768, 1000), 128, 117_003_805, "117", 31.4),
    "FFHQ-1024": ((4, (128, 256, 384, 768, 1024), (2,) * 5, (W, W, W, G, G), 2, 256, 0), 1024, 85_079_300, "85", 207.8),
    "L": ((4, (384, 768, 1536), (2, 2, 16), (W, W, G), 2, 256, 1000), 256, 557_416_522, "557", 197.9),
    "M": ((4, (320, 640, 1280), (2, 2, 12), (W, W, G), 2, 256, 1000), 256, 301_836_142, "302", 115.6),
    "S": ((4, (256, 512, 1024), (2, 2, 8), (W, W, G), 2, 256, 1000), 256, 138_694_322, "139", 60.0),
    "p8 L": ((8, (768, 1536), (2, 16), (W, G), 2, 256, 1000), 256, 546_861_489, "547", 163.4),
    "p16 L": ((16, (1536,), (16,), (G,), 2, 256, 1000), 256, 507_245_696, "507", 129.5),
    "flowers": ((4, (128, 256, 512), (2, 2, 4), (W, W, G), 2, 256, 0), 256, 22_361_274, "22", 11.73),
}


def params_of(net, shape):
    cond = {"label": jnp.zeros(1, jnp.int32)} if net.num_classes else {}
    return jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, *shape)), jnp.zeros(1), cond)["params"]


SLOW = ("M", "FFHQ-1024", "p8 L", "p16 L")


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in SIZES])
def test_sizes_are_those_of_the_paper(name):
    """Catches a layer, level or bias too many, Fourier features that count as parameters, and products that are not counted."""
    (patch, widths, depths, kinds, mapping_depth, mapping_width, classes), side, parameters, printed, gmacs = SIZES[name]
    fields = {"mapping_depth": mapping_depth, "mapping_width": mapping_width, "num_classes": classes, "out_channels": 3}
    net = HourglassDiT(patch, widths, depths, attentions=kinds, **fields)
    assert count_parameters(params_of(net, (side, side, 3))) == parameters
    assert f"{parameters / 1e6:.0f}" == printed
    digits = 2 if name == "flowers" else 1
    assert round(net.macs((side, side, 3)) / 1e9, digits) == gmacs


def test_published_sizes():
    """Catches a published size with other fields than those of the table above, or windows in place of neighbourhoods."""
    for size in "SML":
        (patch, widths, depths, *_), side, *_, gmacs = SIZES[size]
        published = PUBLISHED[f"HDiT-{size}@256"]
        fields = {"patch_size": patch, "widths": widths, "depths": depths, "num_classes": 1000, "out_channels": 3}
        assert (published.fields, published.input_shape) == (fields, (side, side, 3))
        net = HourglassDiT(**published.fields)
        assert [net._kind(i).name for i in range(3)] == [N, N, G] and net.kernel_size == 7
        assert -0.01 < net.macs(published.input_shape) / 1e9 / gmacs - 1 < 0
    assert [fid.value for fid in PUBLISHED["HDiT-L@256"].fids] == [6.92, 3.21]


def naive(q, k, v, size):
    """Neighbourhood attention, token by token, in float64."""
    q, k, v = (np.float64(x) for x in (q, k, v))
    b, h, w, heads, _ = q.shape
    out = np.zeros_like(v)
    for i, j in itertools.product(range(h), range(w)):
        top, left = (min(max(at - size // 2, 0), n - size) for at, n in ((i, h), (j, w)))
        keys, values = (x[:, top : top + size, left : left + size].reshape(b, size * size, heads, -1) for x in (k, v))
        scores = np.einsum("bhe,bmhe->bhm", q[:, i, j], keys)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, i, j] = np.einsum("bhm,bmhe->bhe", weights / weights.sum(-1, keepdims=True), values)
    return out


def qkv(shape, dtype=jnp.float32):
    return [0.5 * jax.random.normal(key, shape).astype(dtype) for key in jax.random.split(jax.random.key(1), 3)]


@pytest.mark.parametrize(
    "h, w, size, block",
    [
        (9, 13, 7, None), (5, 5, 5, None), (6, 11, 1, None), (11, 10, 7, (2, 3)), (8, 7, 3, (5, 1)),
    ],
)  # fmt: skip
def test_neighbourhoods_are_the_naive_ones(h, w, size, block):
    """Catches windows that are padded or cut at the border, a last block without its neighbours, or rows for columns."""
    q, k, v = qkv((2, h, w, 2, 4))
    more = {} if block is None else {"block": block}
    ours = jax.jit(lambda q, k, v: neighborhood_attention(q, k, v, size, **more))(q, k, v)
    assert tiny.distance(ours, naive(q, k, v, size)) < 1e-6


def test_neighbourhoods_have_the_gradient_of_a_mask():
    """Catches an error in the gradient that is written out, also in bfloat16: the other form is plain attention with a mask."""
    h, w, size = 6, 9, 3
    at = [np.clip(np.arange(n) - size // 2, 0, n - size)[:, None] for n in (h, w)]
    rows, columns = ((s <= np.arange(n)) & (np.arange(n) < s + size) for s, n in zip(at, (h, w), strict=True))
    mask = (rows[:, None, :, None] & columns[None, :, None, :]).reshape(h * w, h * w)

    def masked(q, k, v):
        flat = [x.astype(jnp.float32).reshape(2, h * w, 2, 4) for x in (q, k, v)]
        scores = jnp.einsum("bnhe,bmhe->bhnm", *flat[:2])
        weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf))
        return jnp.einsum("bhnm,bmhe->bnhe", weights, flat[2]).reshape(v.shape)

    weight = jax.random.normal(jax.random.key(5), (2, h, w, 2, 4))
    for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 0.03)):
        parts = qkv(weight.shape, dtype)
        gradients = [
            jax.jit(jax.grad(lambda q, k, v, f=f: (f(q, k, v) * weight).sum(), (0, 1, 2)))(*parts)
            for f in (lambda q, k, v: neighborhood_attention(q, k, v, size), masked)
        ]
        assert gradients[0][0].dtype == dtype
        assert tiny.distance(*gradients) < tolerance


def test_neighbourhoods_keep_one_row_of_blocks():
    """Catches scores or copies of keys of the whole grid at once, forward or with the gradient: most of the time on a CPU."""
    q, k, v = qkv((1, 32, 32, 2, 16))

    def loss(q, k, v):
        return jnp.square(neighborhood_attention(q, k, v, 7)).sum()

    for f, arrays in ((loss, 8), (jax.grad(loss, (0, 1, 2)), 12)):
        memory = jax.jit(f).lower(q, k, v).compile().memory_analysis()
        assert memory.temp_size_in_bytes < arrays * q.nbytes


def test_shifted_windows_with_a_traced_shift():
    """Catches a shift that is a constant of the scan over layers."""
    q, k, v = qkv((1, 4, 8, 1, 4))
    traced = jax.jit(lambda shift: window_attention(q, k, v, 4, shift))
    for shift in (0, 2):
        np.testing.assert_allclose(traced(shift), window_attention(q, k, v, 4, shift), atol=1e-6)
    assert tiny.distance(traced(0), traced(2)) > 0.1


def test_positions_are_relative_and_keep_the_aspect():
    """Catches positions per token in place of those in [-1, 1], a stretched short side, and rotations that change lengths."""
    rows, columns = cell_centers(2, 4)
    np.testing.assert_allclose(rows, [-0.25, 0.25])
    np.testing.assert_allclose(columns, [-0.75, -0.25, 0.25, 0.75])
    fine = cell_centers(4, 8)[1]
    np.testing.assert_allclose(fine.reshape(-1, 2).mean(1), columns)
    angles = axial_rope(2, 4, 3, 16)
    assert angles.shape == (2, 4, 3, 4)
    assert math.isclose(float(angles[1, 0, 0, 0]), 0.25 * math.pi, rel_tol=1e-6)
    x = jax.random.normal(jax.random.key(0), (1, 2, 4, 3, 16))
    np.testing.assert_allclose(jnp.square(rotate(x, angles)).sum(-1), jnp.square(x).sum(-1), rtol=1e-5)


TINY = {"patch_size": 1, "widths": (16, 32), "depths": (1, 2), "head_width": 8, "mapping_width": 16, "num_classes": 10}
TINY |= {"attentions": (N, G), "kernel_size": 3}


def test_constants_are_never_trained():
    """Catches a weight decay, or a gradient, that changes the random Fourier features; constants that count as parameters."""
    net = HourglassDiT(**TINY, out_channels=1)
    params = jax.tree.map(lambda x: np.full(x.shape, 0.5, x.dtype), params_of(net, (8, 8, 1)))
    optimizer = adamw(1e-2, weight_decay=0.1)

    @jax.jit
    def step(params):
        updates, _ = optimizer.update(params, optimizer.init(params), params)
        return optax.apply_updates(params, without_constants(updates))

    new = flatten_dict(step(params), sep="/")
    same = {name for name, x in flatten_dict(params, sep="/").items() if np.array_equal(x, new[name])}
    assert same == {"time_fourier/constant", "augmentation_fourier/constant"}
    assert sum(x.size for x in jax.tree.leaves(params)) - count_parameters(params) == (1 + 9) * 8


def test_groups_are_those_of_k_diffusion():
    """Catches a matrix without decay, a scale with it, or a layer of the mapping network with the full rate."""
    found = {}
    for name in flatten_dict(params_of(HourglassDiT(**TINY, out_channels=1), (8, 8, 1)), sep="/"):
        group = group_of(GROUPS, name)
        found[name] = (1.0, None) if group is None else GROUPS[group][1:]
    slow, decayed = {n for n, (factor, _) in found.items() if factor < 1}, {n for n, (_, decay) in found.items() if decay is None}
    assert slow == {n for n in found if n.startswith("mapping/") or "_norm/kernel" in n}
    not_matrices = {n for n in found if n.endswith(("scale", "share", "embedding"))}
    assert decayed == found.keys() - not_matrices - {"time_embedding/kernel", "augmentation_embedding/kernel"}
    assert all(decay in (None, 0.0) for _, decay in found.values())


@pytest.mark.parametrize(
    "fields, shape, words",
    [
        ({"widths": (16,)}, (8, 8, 1), r"model.depths is \(1, 2\) and model.widths \(16,\)"),
        ({"attentions": ("local", G)}, (8, 8, 1), "'local'; each must be one of neighborhood, shifted_window, global"),
        ({"widths": (16, 36)}, (8, 8, 1), "36, not a multiple of model.head_width = 8"),
        ({"kernel_size": 4}, (8, 8, 1), "model.kernel_size 4"),
        ({}, (8, 6, 1), None),
        ({}, (8, 7, 1), "8 x 7, not a multiple of 2"),
        ({"kernel_size": 9}, (8, 8, 1), "level 0 has 8 x 8 tokens, fewer than model.kernel_size = 9"),
        ({"attentions": (W, G), "window_size": 6}, (8, 8, 1), "not a multiple of model.window_size = 6"),
        ({"remat": "some"}, (8, 8, 1), "model.remat is 'some'"),
    ],
)
def test_errors_of_fields(fields, shape, words):
    """Catches fields that fail inside of a trace, or windows that are cut."""
    net = HourglassDiT(**TINY | fields, out_channels=1)
    if words is None:
        return net.check(shape)
    with pytest.raises(UserError, match=words):
        net.check(shape)


def test_times_that_the_features_cannot_tell_apart():
    """Catches a training with times 0 to 999, on which random features of frequency 1 are noise."""
    c = tiny.config().unlock()
    c.model = {"name": "hourglass", **TINY}
    with pytest.raises(UserError, match=r"times from 0 to 999; .* set model.time_scale to about 0.001001"):
        build.Run(c).network
    c.model.time_scale = 1e-3
    assert build.Run(c).network.time_scale == 1e-3
    HourglassDiT(**TINY, out_channels=1).check_times(-1.5, 1.1)


def test_entries_of_a_condition():
    """Catches a misspelt entry, or a label that is forgotten, which would be zero."""
    net = HourglassDiT(**TINY, out_channels=1)
    for cond, words in (({}, "has no label"), ({"label": jnp.zeros(1, int), "text": 0}, "no cond entry 'text'")):
        with pytest.raises(UserError, match=words):
            jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)), jnp.zeros(1), cond)
