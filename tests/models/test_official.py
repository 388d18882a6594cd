"""Our network with the official weights against what the official DiT and SiT networks computed: see golden/make_network.py."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dit_files import held
from flax import traverse_util
from paths import GOLDEN as GOLDEN_FOLDER

from dit_jax.diffusion.guidance import Guidance
from dit_jax.interop import official, tensors
from dit_jax.models.dit import DiT
from dit_jax.parallel.rules import path_name

GOLDEN = dict(np.load(GOLDEN_FOLDER / "network.npz"))
WEIGHTS = {name.removeprefix("weights/"): held(a) for name, a in GOLDEN.items() if name.startswith("weights/")}
KINDS = ("dit", "sit")
X, LABEL = GOLDEN["in/x"], GOLDEN["in/label"]
NULL, PAIRS = 10, 3


@cache
def network(dtype="float32"):
    """(x, t, cond) -> output, of our DiT with the official weights."""
    found = official.infer(WEIGHTS, "golden/network.npz")
    net = DiT(found.patch_size, found.depth, found.width, 3, found.num_classes, found.out_channels, dtype=jnp.dtype(dtype))
    abstract = jax.eval_shape(net.init, jax.random.key(0), X, GOLDEN["dit/t"], {"label": LABEL})["params"]
    shapes = {path_name(keys): leaf.shape for keys, leaf in jax.tree_util.tree_flatten_with_path(abstract)[0]}
    tensors.check(WEIGHTS, official.expected(shapes, found.patch_size, 3), "golden/network.npz")
    ours = {path: tensor.load() for path, tensor in official.to_ours(WEIGHTS, shapes).items()}
    params = traverse_util.unflatten_dict(ours, sep="/")
    return jax.jit(lambda x, t, cond: net.apply({"params": params}, x, t, cond))


def distance(ours, name):
    """Per example: largest difference over largest value; SiT's ignored half is left out."""
    theirs = GOLDEN[name]
    assert ours.shape[:-1] == theirs.shape[:-1]
    return np.abs(ours[..., : theirs.shape[-1]] - theirs).max((1, 2, 3)) / np.abs(theirs).max((1, 2, 3))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 0.05)])
def test_the_forward_is_the_official_one(kind, dtype, tolerance):
    """Shift for scale, query for key, sines for cosines, rows for columns, or a null label elsewhere, at any time."""
    output = network(dtype)(X, GOLDEN[f"{kind}/t"], {"label": LABEL})
    assert output.dtype == jnp.float32
    assert (distance(output, f"{kind}/output") < tolerance).all()


def test_the_positions_are_the_official_ones():
    """A table of other frequencies, or columns first."""
    official.check_position(WEIGHTS["pos_embed"], "golden/network.npz")


@pytest.mark.parametrize("kind", KINDS)
def test_guidance_is_forward_with_cfg(kind):
    """A scale counted from 0, the variance of the wrong half, or guidance on the fourth channel."""
    x, time, label = X[:PAIRS], GOLDEN[f"{kind}/t"][-PAIRS:], LABEL[-PAIRS:]
    guided = Guidance(4.0, channels=3)(network(), {"label": label}, {"label": np.full_like(label, NULL)})
    # Guidance multiplies the rounding of the two outputs by 4 and 3.
    assert (distance(guided(x, 0.5, time), f"{kind}/guided") < 4e-5).all()
    assert (distance(network()(x, time, {"label": label}), f"{kind}/guided")[:-1] > 0.1).all()  # the last label is null
