"""DiffiT: its sizes, its relative positions, and what it computes beside a PyTorch stand-in that takes the released names."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict, unflatten_dict
from traced import traced_macs

from dit_jax.errors import UserError
from dit_jax.interop import diffit as layout
from dit_jax.interop.tensors import Tensor
from dit_jax.models.diffit import DiffiT, kernel_of, position_bias

FIELDS = {"patch_size": 2, "depth": 2, "width": 24, "heads": 3, "num_classes": 10, "out_channels": 6, "grid": (3, 3)}


def network(**fields):
    return DiffiT(**FIELDS | fields)


def inputs(batch=3, height=6, width=6):
    x = jax.random.normal(jax.random.key(1), (batch, height, width, 3))
    return x, jnp.array([0.0, 431.25, 999.0])[:batch], {"label": jnp.array([10, 0, 7])[:batch]}


def random_params(net, *given):
    return tiny.random_params(jax.eval_shape(net.init, jax.random.key(0), *given))


@pytest.mark.parametrize("name, params, gmacs", [("DiffiT@256", 561_035_232, 118.51), ("DiffiT@512", 562_382_816, 524.42)])
def test_published_sizes(name, params, gmacs):
    """Catches a bias or a table that is missing, or a layer that DiT has and DiffiT does not."""
    published = DiffiT.published[name]
    net = DiffiT(**published.fields)
    given = jnp.zeros((1, *published.input_shape)), jnp.zeros(1), {"label": jnp.zeros(1, jnp.int32)}
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(jax.eval_shape(net.init, jax.random.key(0), *given))) == params
    assert net.macs(published.input_shape) / 1e9 == pytest.approx(gmacs, abs=0.005)
    without_products = net.macs((32, 32, 4)) - 28 * 2 * 256**2 * 1152
    assert name != "DiffiT@256" or round(without_products / 1e9) == 114  # the paper's number
    net.check(published.input_shape)


def test_macs_are_the_products_of_the_program():
    """Catches a product that the count forgets, such as those of the condition."""
    net, (x, t, cond) = network(depth=3), inputs(1)
    params = jax.eval_shape(net.init, jax.random.key(0), x, t, cond)
    assert traced_macs(net.apply, params, x, t, cond) == net.macs((6, 6, 3))


@pytest.mark.parametrize("rows, columns", [(3, 3), (2, 5), (4, 1)])
def test_position_bias_is_swins_index(rows, columns):
    """Catches rows and columns that are exchanged, key and query exchanged, and a table that is read from another end."""
    rng, heads = np.random.default_rng(0), 3
    table = rng.normal(size=((2 * rows - 1) * (2 * columns - 1), heads)).astype(np.float32)
    tokens = [(y, x) for y in range(rows) for x in range(columns)]
    expected = [
        [table[(y - v + rows - 1) * (2 * columns - 1) + x - u + columns - 1] for v, u in tokens] for y, x in tokens
    ]  # [query, key, head]
    found = position_bias(jnp.asarray(table), (rows, columns))
    np.testing.assert_array_equal(found, np.moveaxis(np.asarray(expected), 2, 0))
    if rows == columns:
        np.testing.assert_array_equal(found, np.moveaxis(table[layout.position_index(rows)], 2, 0))


def stand_in(torch, state, x, t, label, heads, patch):
    """The released network as a function of its state_dict: x [B, C, H, W] -> [B, out, H, W]."""
    functional = torch.nn.functional

    def linear(name, x):
        return functional.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    width, depth = state["pos_embed"].shape[-1], 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))

    def norm(x):
        return functional.layer_norm(x, (width,), eps=1e-6)

    frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
    angles = t[:, None] * frequencies
    c = linear("t_embedder.mlp.2", functional.silu(linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], -1))))
    c = c + state["y_embedder.embedding_table.weight"][label]
    x = functional.conv2d(x, state["x_embedder.proj.weight"], state["x_embedder.proj.bias"], stride=patch)
    (batch, _, rows, columns), x = x.shape, x.flatten(2).transpose(1, 2)
    x = x + state["pos_embed"]
    for block in (f"blocks.{i}" for i in range(depth)):
        qkv = linear(f"{block}.attn.qkv", norm(x)) + linear(f"{block}.attn.qkv_temb", c)[:, None]
        q, k, v = qkv.reshape(batch, -1, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        table, index = (state[f"{block}.attn.relative_position_{part}"] for part in ("bias_table", "index"))
        scores = (q * (width // heads) ** -0.5) @ k.transpose(-2, -1) + table[index].permute(2, 0, 1)
        x = x + linear(f"{block}.attn.proj", (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, -1, width))
        hidden = functional.gelu(linear(f"{block}.mlp.fc1", norm(x)), approximate="tanh")
        x = x + linear(f"{block}.mlp.fc2", hidden)
    x = linear("final_layer.linear", functional.silu(norm(x)))
    return torch.einsum("bhwpqc->bchpwq", x.reshape(batch, rows, columns, patch, patch, -1)).flatten(2, 3).flatten(3, 4)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 5e-2)])
def test_pytorch_computes_the_same(dtype, tolerance):
    """Catches a condition that passes a SiLU, a modulated final layer, queries and keys or heads exchanged, a scaled bias: of the
    output and of the gradient of every parameter."""
    torch = pytest.importorskip("torch")
    net, (x, t, cond) = network(), inputs()
    params = random_params(net, x, t, cond)["params"]
    flat = {path: np.asarray(leaf) for path, leaf in flatten_dict(params, sep="/").items()}
    ours = {path: Tensor(leaf.shape, leaf.dtype, lambda leaf=leaf: leaf) for path, leaf in flat.items()}
    theirs, _ = layout.write(ours, "official", FIELDS, (6, 6, 3))
    state = {name: torch.from_numpy(np.array(tensor.load())) for name, tensor in theirs.items()}
    trained = {name: x.requires_grad_() for name, x in state.items() if x.is_floating_point() and name != "pos_embed"}
    given = (
        torch.from_numpy(np.array(x)).permute(0, 3, 1, 2),
        torch.from_numpy(np.array(t)),
        torch.from_numpy(np.array(cond["label"])),
    )
    output = stand_in(torch, state, *given, heads=3, patch=2)
    weight = np.random.default_rng(2).normal(size=(3, 6, 6, 6)).astype(np.float32)
    (output.permute(0, 2, 3, 1) * torch.from_numpy(weight)).sum().backward()
    half = network(dtype=jnp.dtype(dtype))

    def loss(params):
        y = half.apply({"params": params}, x, t, cond)
        return (y * weight).sum(), y

    (_, y), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    expected = output.detach().permute(0, 2, 3, 1).numpy()
    assert y.dtype == jnp.float32 and np.abs(y - expected).max() < tolerance * np.abs(expected).max()
    held = {name: Tensor(tuple(x.shape), np.dtype(np.float32), lambda x=x: x.grad.numpy()) for name, x in trained.items()}
    for path, gradient in flatten_dict(gradients, sep="/").items():
        theirs_here = layout._gather(path, gradient.shape, held).load()
        assert tiny.distance(gradient, theirs_here) < 2 * tolerance, path


@pytest.mark.slow
def test_the_start():
    """Catches a residual branch or a gate that is zero, an output that is not, and a table of another distribution."""
    net, (x, t, cond) = network(width=96, grid=(8, 8)), inputs(height=16, width=16)
    params = jax.jit(net.init)(jax.random.key(0), x, t, cond)["params"]
    flat = flatten_dict(params, sep="/")
    assert {path for path, leaf in flat.items() if not leaf.any()} == {
        p for p in flat if p.endswith("bias") and "position" not in p
    } | {"final/linear/kernel"}
    bound = math.sqrt(6 / (96 + 3 * 96))
    for name in ("qkv", "condition"):
        kernel = flat[f"blocks/attention/{name}/kernel"]
        assert 0.97 * bound < jnp.abs(kernel).max() <= bound
    table = flat["blocks/attention/position_bias"]
    assert table.shape == (2, 15 * 15, 3) and table.std() == pytest.approx(0.02, rel=0.1) and jnp.abs(table).max() > 0.05
    assert not jnp.allclose(table[0], table[1])


@pytest.mark.exhaustive
def test_forms_agree():
    """Catches scanned, unrolled and rematerialised forms that compute different things, and a block that is not skipped."""
    x, t, cond = inputs()
    params = random_params(network(), x, t, cond)

    def value(net, control=None):
        return jax.jit(jax.value_and_grad(lambda p: jnp.square(net.apply(p, x, t, cond, control)).sum()))(params)

    plain = value(network(remat="none"))
    for fields in ({"unroll": True}, {"remat": "full"}, {"remat": "dots"}, {"remat": "elementwise"}, {"remat": "offload"}):
        assert tiny.distance(value(network(**fields)), plain) < 2e-5
    flat = flatten_dict(params["params"], sep="/")
    first = {path: leaf[:1] if path.startswith("blocks/") else leaf for path, leaf in flat.items()}
    alone = network(depth=1).apply({"params": unflatten_dict(first, sep="/")}, x, t, cond)
    skipped = network().apply(params, x, t, cond, {"keep": jnp.array([True, False])})
    np.testing.assert_allclose(skipped, alone, atol=1e-5)


@pytest.mark.slow
def test_a_rectangle():
    """Catches a grid whose sides are exchanged, and positions or biases of a square."""
    net, (x, t, cond) = network(grid=(2, 4)), inputs(height=4, width=8)
    params = random_params(net, x, t, cond)
    apply = jax.jit(net.apply)
    y = apply(params, x, t, cond)
    assert y.shape == (3, 4, 8, 6) and net.num_tokens((4, 8, 3)) == 8
    assert flatten_dict(params["params"], sep="/")["blocks/attention/position_bias"].shape == (2, 3 * 7, 3)
    np.testing.assert_allclose(apply(params, x[::-1], t[::-1], {"label": cond["label"][::-1]})[::-1], y, atol=1e-5)
    assert jnp.abs(apply(params, x, t + 100, cond) - y).max() > 1e-3


@pytest.mark.parametrize(
    "fields, text",
    [
        ({"grid": (3, 4)}, r"has 3 x 3 tokens, and model.grid is \(3, 4\): .* Set --config.model.grid='\(3, 3\)'"),
        ({"grid": (3,)}, r"must be \(rows, columns\)"),
        ({"patch_size": 4}, "not a multiple of model.patch_size = 4"),
        ({"heads": 5}, "does not divide"),
        ({"remat": "some"}, "must be one of auto, none"),
        ({"attention": "cudnn"}, "an even number of tokens"),
        ({"width": 30, "heads": 3}, "not a multiple of 4"),
    ],
)
def test_bad_fields(fields, text):
    """Catches a mistake that surfaces as a shape error from within a layer."""
    with pytest.raises(UserError, match=text):
        network(**fields).init(jax.random.key(0), *inputs())


def test_the_kernel():
    """Catches cuDNN chosen for an odd number of tokens, which its gradient of the bias refuses."""
    assert kernel_of("auto", "bfloat16", 72, 256, "gpu") == "cudnn" and kernel_of("auto", "bfloat16", 72, 9, "gpu") == "xla"
    assert network(dtype=jnp.bfloat16, width=48, grid=(2, 2)).for_platform("gpu").attention == "cudnn"
    assert network(dtype=jnp.bfloat16, width=48).for_platform("gpu").attention == "xla"
