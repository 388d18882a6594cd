"""VideoDiT: published sizes, identities, a stand-in of Latte in PyTorch and one of W.A.L.T in NumPy, refusals."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from dit_jax.errors import UserError
from dit_jax.models import dit, position, video_dit
from dit_jax.models.video_dit import FULL, LATTE, VideoDiT
from dit_jax.plan.published import counts
from dit_jax.programs import jaxpr_flops

SIZES = {  # parameters; GMACs
    "Latte-XL/2@UCF101": (673_799_072, 1862.83),  # 673.8 M, and 1,862.6 without the modulation's 0.22
    "WALT-L@UCF101": (313_238_408, 404.71),  # 313 M in table 3 of Gupta et al. 2023
    "WALT-XL@UCF101": (460_019_080, 594.59),  # 460 M
}
SMALL = {"patch_size": 2, "depth": 4, "width": 16, "heads": 2, "out_channels": 3}
WALT = {"windows": ((1, 2, 2), (0, 1, 2)), "position": "learned", "grid": (3, 2, 4), "relative_bias": True, "qk_norm": True}
WALT |= {"modulation": "lora", "rank": 3, "context_width": 6, "self_conditioning": True, "known_frames": True}
SHAPE = (3, 4, 8, 3)  # 3 x 2 x 4 tokens


def draw(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def built(fields, cond=(), shape=SHAPE, seed=1):
    """(network, random parameters, x_t, t)."""
    net, x, t = VideoDiT(**SMALL | fields), draw((2, *shape)), jnp.array([3.0, 700.0])
    shapes = jax.eval_shape(net.init, jax.random.key(0), x, t, dict(cond))["params"]
    rng = np.random.default_rng(seed)
    return net, jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), jnp.float32), shapes), x, t


def run(net, params, *args):
    return jax.jit(net.apply)({"params": params}, *args)


@pytest.mark.parametrize("name", VideoDiT.published)
def test_published_sizes(name):
    """Catches a published network of other sizes, windows that do not fit its input, and a multiply-add counted twice."""
    published = VideoDiT.published[name]
    VideoDiT(**published.fields).check(published.input_shape)
    row = counts(VideoDiT, published)
    params, gmacs = SIZES.get(name, (row["params"], round(row["gmacs"], 2)))
    assert (row["params"], round(row["gmacs"], 2)) == (params, gmacs)


TEXT = {"context": draw((2, 5, 6), 3)}


@pytest.mark.parametrize(
    "fields, cond", [({"windows": FULL}, {}), ({}, {}), (WALT, TEXT), ({**WALT, "low_res_channels": 3}, TEXT)]
)
def test_multiply_adds(fields, cond):
    """Catches a product that `macs` leaves out, counted on the traced program."""
    net, params, x, t = built(fields, cond)
    cond = dict(cond)
    if net.known_frames:
        cond |= {"known": x, "known_mask": jnp.ones((*x.shape[:-1], 1))}
    if net.low_res_channels:
        cond["low_res"] = x[:, :, ::2, ::2]
    shapes = {name: value.shape[1:] for name, value in cond.items()}

    def without_resizing(params, full):  # bilinear weights are a product too
        return net.apply({"params": params}, x, t, cond | ({"low_res": full} if net.low_res_channels else {}))

    program = jax.make_jaxpr(without_resizing)(params, x)
    assert jaxpr_flops.count(program) == 2 * 2 * net.macs(SHAPE, shapes)


def test_one_window_is_dit():
    """Catches an order of tokens, or a block, that differs from DiT's where the window is the whole clip."""
    net, params, x, t = built({"windows": FULL, "num_classes": 10}, {"label": jnp.zeros(2, int)})
    cond = {"label": jnp.array([3, 10])}
    embedded = net.apply({"params": params}, x, t, cond, method="embed")
    frames = [position.sincos_1d(16, np.arange(3)).repeat(8, axis=0)]
    tokens = embedded.x + jnp.asarray(frames[0], jnp.float32)
    other = dit.DiT(2, 4, 16, 2, 10, 3)
    theirs = {**params, "blocks": params["blocks"]["window_0"]}
    inputs = dit.Embedded(tokens, embedded.conditions.c, tokens[:, :1])
    wanted = other.apply({"params": theirs}, inputs, method="run_blocks")
    np.testing.assert_allclose(net.apply({"params": params}, embedded, method="run_blocks"), wanted, atol=2e-5)


@pytest.mark.parametrize("fields, cond", [({}, {}), (WALT, TEXT)])
def test_an_image_is_a_clip_of_one_frame(fields, cond):
    """Catches an image with other numbers than the clip of one frame."""
    net, params, x, t = built(fields, cond)
    image = run(net, params, x[:, 0], t, cond)
    np.testing.assert_array_equal(image, run(net, params, x[:, :1], t, cond)[:, 0])


@pytest.mark.slow
def test_frames_of_an_image_are_not_mixed():
    """Catches W.A.L.T's blocks over time that mix the positions of an image: their queries, keys and bias must not matter."""
    net, params, x, t = built(WALT, TEXT)
    blocks = params["blocks"]
    attention = dict(blocks["window_1"]["attention"])
    attention["qkv"] = {name: leaf.at[:, ..., :2, :, :].mul(3.0) for name, leaf in attention["qkv"].items()}
    attention["position_bias"] = attention["position_bias"] + 5 * draw(attention["position_bias"].shape)
    changed = {**params, "blocks": {**blocks, "window_1": {**blocks["window_1"], "attention": attention}}}
    np.testing.assert_array_equal(run(net, params, x[:, 0], t, TEXT), run(net, changed, x[:, 0], t, TEXT))
    assert tiny.distance(run(net, params, x, t, TEXT), run(net, changed, x, t, TEXT)) > 1e-3


def test_nothing_known_is_no_condition():
    """Catches an embedding with a bias, or one of the values under the mask; an estimate that is not zero by default."""
    net, params, x, t = built(WALT, TEXT)
    plain = run(net, params, x, t, TEXT)
    nothing = TEXT | {"known": draw(x.shape, 5), "known_mask": jnp.zeros((*x.shape[:-1], 1)), "estimate": jnp.zeros(x.shape)}
    np.testing.assert_array_equal(plain, run(net, params, x, t, nothing))
    for change in ({"known_mask": jnp.ones((*x.shape[:-1], 1))}, {"estimate": draw(x.shape, 6)}):
        assert tiny.distance(run(net, params, x, t, nothing | change), plain) > 1e-3


@pytest.mark.slow
def test_rank_zero_shares_the_modulation():
    """Catches AdaLN-LoRA whose shared part is not that of all blocks."""
    net, params, x, t = built({"modulation": "lora", "rank": 0})
    apart = VideoDiT(**SMALL)
    blocks = {
        name: {**block, "modulation": jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), params["modulation"])}
        for name, block in params["blocks"].items()
    }
    theirs = {name: leaf for name, leaf in params.items() if name != "modulation"} | {"blocks": blocks}
    np.testing.assert_allclose(run(net, params, x, t, {}), run(apart, theirs, x, t, {}), atol=1e-5)


@pytest.mark.exhaustive
def test_every_form_of_the_loop():
    """Catches a loop, or recomputation, with other numbers than unrolled blocks, also of the gradient; bfloat16 that is off."""

    def numbers(**form):
        net, params, x, t = built(WALT | form, TEXT)
        gradient = jax.jit(jax.grad(lambda p: jnp.square(net.apply({"params": p}, x, t, TEXT)).sum()))
        return run(net, params, x, t, TEXT), gradient(params)

    wanted = numbers(unroll=True, remat="none")
    for form in ({"unroll": False, "remat": "none"}, {"unroll": False, "remat": "full"}, {"unroll": False}):
        assert tiny.distance(numbers(**form), wanted, 1e-4) < 2e-5, form
    assert 1e-5 < tiny.distance(numbers(dtype=jnp.bfloat16)[0], wanted[0]) < 0.05


@pytest.mark.slow
def test_skipped_blocks():
    """Catches a flag that skips another block than the one of its number."""
    net, params, x, t = built({})
    keep = jnp.array([True, False, True, True])  # block 1 is the first of window_1
    skipped = run(net, params, x, t, {}, {"keep": keep})
    changed = jax.tree.map(lambda leaf: leaf.at[0].mul(5.0), params["blocks"]["window_1"])
    changed = {**params, "blocks": {**params["blocks"], "window_1": changed}}
    np.testing.assert_array_equal(skipped, run(net, changed, x, t, {}, {"keep": keep}))
    assert tiny.distance(run(net, changed, x, t, {}), run(net, params, x, t, {})) > 1e-3


@pytest.mark.slow
def test_lower_resolution():
    """Catches a lower resolution that is resized to another place, its level that is ignored, and one that is left out."""
    net, params, x, t = built({"low_res_channels": 2})
    low = draw((2, 3, 2, 4, 2), 4)
    full = jnp.repeat(jnp.repeat(low, 2, axis=2), 2, axis=3)
    flat = jnp.ones_like(low) * low[:, :, :1, :1]
    same = [run(net, params, x, t, {"low_res": z}) for z in (flat, jnp.ones_like(full) * full[:, :, :1, :1])]
    np.testing.assert_allclose(*same, atol=1e-5)
    plain = run(net, params, x, t, {"low_res": low})
    for change in ({"low_res": -low}, {"low_res": low, "low_res_level": jnp.full(2, 0.3)}):
        assert tiny.distance(run(net, params, x, t, change), plain) > 1e-3
    with pytest.raises(UserError, match=r'cond\["low_res"\] is missing; .* \[2, f, h, w, 2\]'):
        run(net, params, x, t, {})


def modulated(x, shift, scale):
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-6) * (1 + scale[:, None]) + shift[:, None]


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def silu(x):
    return x / (1 + np.exp(-x))


def norm_of_heads(x, scale):
    return modulated(x, np.zeros((len(x), 1, 1)), np.zeros((len(x), 1, 1))) * scale


def test_walt_stand_in():
    """Catches a window, a relative position, a modulation, or keys of text other than W.A.L.T's. The stand-in is in float64,
    without windows: every pair of tokens has a score, and those of other windows are removed by the tokens' coordinates."""
    net, params, x, t = built(WALT, TEXT)
    estimate = draw(x.shape, 7)
    mask = jnp.array([[1, 1, 1, 0, 0], [1, 0, 1, 1, 1]], bool)
    found = run(net, params, x, t, {**TEXT, "context_mask": mask, "estimate": estimate})
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    places = np.array(list(itertools.product(range(3), range(2), range(4))))
    both = np.concatenate([np.asarray(x, np.float64), np.asarray(estimate, np.float64)], axis=-1)
    patches = [[both[:, f, 2 * r : 2 * r + 2, 2 * s : 2 * s + 2].reshape(2, -1) for f, r, s in places]]
    z = np.stack(patches[0], axis=1) @ p["patch_embedding"]["kernel"] + p["patch_embedding"]["bias"]
    z = z + p["time_table"][places[:, 0]] + p["space_table"][places[:, 1] * 4 + places[:, 2]]
    frequencies = np.exp(-np.log(10000.0) * np.arange(128) / 128)
    angles = np.asarray(t, np.float64)[:, None] * frequencies
    c, time = np.concatenate([np.cos(angles), np.sin(angles)], axis=-1), p["time_embedding"]
    c = silu(c @ time["in"]["kernel"] + time["in"]["bias"]) @ time["out"]["kernel"] + time["out"]["bias"]

    def vectors(layer):
        return np.einsum("bd,dke->bke", silu(c), layer["kernel"]) + layer["bias"]

    text = np.asarray(TEXT["context"], np.float64) @ p["context_embedding"]["kernel"] + p["context_embedding"]["bias"]
    shared = vectors(p["modulation"]["linear"])
    for block in range(4):
        w = jax.tree.map(lambda leaf, i=block // 2: leaf[i], p["blocks"][f"window_{block % 2}"])
        sides = ((1, 2, 2), (3, 1, 2))[block % 2]
        window = places // np.array(sides)
        same = (window[:, None] == window[None]).all(-1)
        v = shared + np.einsum("br,rke->bke", c @ w["modulation_down"]["kernel"], w["modulation_up"]["kernel"])
        y, a = modulated(z, v[:, 0], v[:, 1]), w["attention"]
        q, k, values = np.moveaxis(np.einsum("bnd,dkhe->bnkhe", y, a["qkv"]["kernel"]) + a["qkv"]["bias"], 2, 0)
        q, k = norm_of_heads(q, a["norm_query"]["scale"]), norm_of_heads(k, a["norm_key"]["scale"])
        offsets = places[:, None] - places[None] + np.array(sides) - 1
        offsets = np.where(same[..., None], offsets, 0)
        bias = a["position_bias"][offsets[..., 0], offsets[..., 1], offsets[..., 2]]  # [N, N, A]
        scores = np.einsum("bnhe,bmhe->bhnm", q, k) / np.sqrt(8) + np.moveaxis(bias, -1, 0)
        weights = softmax(np.where(same, scores, -np.inf))
        y = np.einsum("bhnm,bmhe,hed->bnd", weights, values, a["out"]["kernel"]) + a["out"]["bias"]
        z = z + v[:, 2, None] * y
        if block % 2 == 0:
            a, y = w["cross_attention"], modulated(z, np.zeros((2, 16)), np.zeros((2, 16)))
            q = norm_of_heads(np.einsum("bnd,dhe->bnhe", y, a["query"]["kernel"]) + a["query"]["bias"], a["norm_query"]["scale"])
            both = np.einsum("bnd,dkhe->bnkhe", np.concatenate([y, text], 1), a["key_value"]["kernel"]) + a["key_value"]["bias"]
            k, values = norm_of_heads(both[:, :, 0], a["norm_key"]["scale"]), both[:, :, 1]
            seen = np.broadcast_to(same, (2, 24, 24))
            seen = np.concatenate([seen, np.broadcast_to(np.asarray(mask)[:, None], (2, 24, 5))], axis=-1)
            scores = np.einsum("bnhe,bmhe->bhnm", q, k) / np.sqrt(8)
            weights = softmax(np.where(seen[:, None], scores, -np.inf))
            z = z + np.einsum("bhnm,bmhe,hed->bnd", weights, values, a["out"]["kernel"]) + a["out"]["bias"]
        y, m = modulated(z, v[:, 3], v[:, 4]), w["mlp"]
        y = gelu(y @ m["in"]["kernel"] + m["in"]["bias"]) @ m["out"]["kernel"] + m["out"]["bias"]
        z = z + v[:, 5, None] * y
    v = vectors(p["final"]["modulation"]["linear"])
    z = modulated(z, v[:, 0], v[:, 1]) @ p["final"]["linear"]["kernel"] + p["final"]["linear"]["bias"]
    wanted = np.zeros((2, *SHAPE))
    for token, (f, r, s) in enumerate(places):
        wanted[:, f, 2 * r : 2 * r + 2, 2 * s : 2 * s + 2] = z[:, token].reshape(2, 2, 2, 3)
    assert tiny.distance(found, wanted) < 1e-5


def test_latte_stand_in():
    """Catches attention over other tokens than Latte's, and a position of frames that is added elsewhere: beside blocks of
    PyTorch on folded axes, as Latte's code has them, with torch's own attention."""
    torch = pytest.importorskip("torch")
    net, params, x, t = built({"num_classes": 10}, {"label": jnp.zeros(2, int)})
    found = run(net, params, x, t, {"label": jnp.array([4, 7])})
    p = jax.tree.map(lambda leaf: torch.tensor(np.asarray(leaf)).double(), params)
    gelu, silu = torch.nn.GELU(approximate="tanh"), torch.nn.functional.silu

    def linear(y, layer):
        return y @ layer["kernel"].flatten(1).reshape(y.shape[-1], -1) + layer["bias"].flatten()

    def modulate(y, shift, scale):
        return torch.nn.functional.layer_norm(y, y.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    def block(y, c, w):
        v = linear(silu(c), w["modulation"]["linear"]).chunk(6, dim=1)
        rows, tokens, width = y.shape
        qkv = (
            linear(modulate(y, v[0], v[1]), w["attention"]["qkv"]).reshape(rows, tokens, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        )
        out = torch.nn.functional.scaled_dot_product_attention(*qkv).transpose(1, 2).reshape(rows, tokens, width)
        out = out @ w["attention"]["out"]["kernel"].reshape(width, width) + w["attention"]["out"]["bias"]
        y = y + v[2][:, None] * out
        return y + v[5][:, None] * linear(gelu(linear(modulate(y, v[3], v[4]), w["mlp"]["in"])), w["mlp"]["out"])

    frames, rows, columns = 3, 2, 4
    patches = torch.tensor(np.asarray(x)).double().reshape(2 * frames, rows, 2, columns, 2, 3).permute(0, 1, 3, 2, 4, 5)
    y = linear(patches.reshape(2 * frames, rows * columns, 12), p["patch_embedding"])
    y = y + torch.tensor(position.sincos_2d(16, rows, columns))
    angles = torch.tensor(np.asarray(t)).double()[:, None] * torch.exp(-np.log(10000.0) * torch.arange(128).double() / 128)
    c = torch.cat([angles.cos(), angles.sin()], dim=1)
    c = linear(silu(linear(c, p["time_embedding"]["in"])), p["time_embedding"]["out"])
    c = c + p["label_embedding"]["embedding"][[4, 7]]
    of_frames, of_places = c.repeat_interleave(frames, 0), c.repeat_interleave(rows * columns, 0)
    for i in range(2):
        spatial, temporal = (jax.tree.map(lambda leaf, i=i: leaf[i], p["blocks"][f"window_{k}"]) for k in (0, 1))
        y = block(y, of_frames, spatial).reshape(2, frames, -1, 16).transpose(1, 2).reshape(-1, frames, 16)
        y = y + torch.tensor(position.sincos_1d(16, np.arange(frames))) if i == 0 else y
        y = block(y, of_places, temporal).reshape(2, -1, frames, 16).transpose(1, 2).reshape(2 * frames, -1, 16)
    v = linear(silu(of_frames), p["final"]["modulation"]["linear"]).chunk(2, dim=1)
    y = linear(modulate(y, *v), p["final"]["linear"]).reshape(2, frames, rows, columns, 2, 2, 3).permute(0, 1, 2, 4, 3, 5, 6)
    assert tiny.distance(found, y.reshape(2, *SHAPE).numpy()) < 1e-5


@pytest.mark.parametrize(
    "fields, shape, words",
    [
        ({}, (3, 5, 8, 3), "5 x 8, not a multiple of model.patch_size = 2"),
        ({"windows": ((1, 2, 3), (0, 1, 1))}, SHAPE, "a window of 1 x 2 x 3 tokens .* does not divide .* 3 x 2 x 4"),
        ({"windows": ((1, 2),)}, SHAPE, "it needs one or several"),
        ({"depth": 3}, SHAPE, "model.depth = 3 is not a multiple of the 2 windows"),
        ({"position": "learned"}, SHAPE, "model.grid is not set"),
        ({"position": "learned", "grid": (2, 2, 4)}, SHAPE, r"3 x 2 x 4 tokens .* more than model.grid = \(2, 2, 4\)"),
        ({"position": "rope"}, SHAPE, "model.position is 'rope'; it must be one of sincos, learned"),
        ({"modulation": "both"}, SHAPE, "model.modulation is 'both'"),
        ({"rank": -1}, SHAPE, "model.rank is -1"),
        ({"heads": 3}, SHAPE, "model.heads = 3"),
    ],
)  # fmt: skip
def test_refusals(fields, shape, words):
    """Catches fields and inputs that fail only when the network is traced."""
    with pytest.raises(UserError, match=words):
        VideoDiT(**SMALL | fields).check(shape)


def test_conditions_of_another_shape():
    """Catches text, known frames or an estimate that broadcast, and an entry that the network has no field for."""
    net, params, x, t = built(WALT, TEXT)
    for cond, words in (
        ({}, r'cond\["context"\] is missing'),
        (TEXT | {"known": x, "known_mask": jnp.ones((2, 1, 1, 1, 1))}, r'cond\["known_mask"\] is float32\[2, 1, 1, 1, 1\]'),
        (TEXT | {"estimate": x[..., :1]}, r'cond\["estimate"\] is .* \[2, 3, 4, 8, 3\] is needed'),
        (TEXT | {"label": jnp.zeros(2, int)}, "has no cond entry 'label'"),
    ):
        with pytest.raises(UserError, match=words):
            jax.eval_shape(net.apply, {"params": params}, x, t, cond)


def test_windows_smaller_than_the_table():
    """Catches a table of relative positions that is read from its corner for a clip smaller than its grid."""
    table = draw((5, 3, 7, 2))
    whole, part = video_dit.relative_bias(table, (3, 2, 4)), video_dit.relative_bias(table, (2, 2, 3))
    places, few = (list(itertools.product(*map(range, sides))) for sides in ((3, 2, 4), (2, 2, 3)))
    rows = np.array([places.index(place) for place in few])
    np.testing.assert_array_equal(part, whole[:, rows[:, None], rows[None]])


def test_every_parameter_has_a_rule():
    """Catches a layer without a sharding rule, and attention or MLP kernels that Muon and LoRA do not reach."""
    from dit_jax.parallel.rules import path_name, rule_of
    from dit_jax.tasks.muon import kinds_of

    net, params, _, _ = built({**WALT, "low_res_channels": 2, "num_classes": 4}, TEXT | {"label": jnp.zeros(2, int)})
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        name = path_name(path)
        assert len(rule_of(name, leaf.shape, net.rules)) <= leaf.ndim
        if name.startswith("blocks") and name.endswith("kernel") and "modulation_" not in name:
            kinds = kinds_of(net.matrices, name)
            assert kinds and len(kinds) == leaf.ndim - 1, name
    assert VideoDiT.windows == LATTE


def test_windows_by_coordinates():
    """Catches windows that mix axes where several of them are split, and a way back that is not the inverse."""
    grid, window = video_dit.Grid(4, 4, 6), (2, 2, 3)
    places = np.array(list(itertools.product(range(4), range(4), range(6))))
    split = grid.split(jnp.asarray(places)[None], window)
    assert split.shape == (1, 8, 12, 3)
    np.testing.assert_array_equal(grid.join(split, window)[0], places)
    corners = list(itertools.product((0, 2), (0, 2), (0, 3)))
    inner = np.array(list(itertools.product(range(2), range(2), range(3))))
    for found, corner in zip(np.asarray(split[0]), corners, strict=True):
        np.testing.assert_array_equal(found, inner + corner)
