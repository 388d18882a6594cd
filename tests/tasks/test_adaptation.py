"""Training a part of a network: what is split off, merged, frozen; the adapters' product; every mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict

from dit_jax.errors import UserError
from dit_jax.tasks.adaptation import Adaptation, Lora, adapter_shapes, with_adapters

NETWORK = tiny.dit()


def params():
    x, t, label = jnp.zeros((1, 8, 8, 1)), jnp.zeros(1), jnp.zeros(1, jnp.int32)
    return tiny.random_params(NETWORK.init(jax.random.key(0), x, t, {"label": label})["params"])


def adaptation(**fields):
    lora = Lora(**fields.pop("lora", {}))
    return Adaptation(lora=lora, matrices=NETWORK.matrices, **fields)


def test_frozen_and_trained_parts_are_the_whole():
    """Catches a parameter that is in both parts or in none, and a merge that takes the wrong one."""
    whole, frozen = params(), adaptation(freeze=("blocks/.*", "time_embedding/(in|out)/kernel"))
    trained, base = frozen.trained(whole, jax.random.key(1)), frozen.base(whole)
    names = [set(flatten_dict(x, sep="/")) for x in (trained, base, whole)]
    assert not names[0] & names[1] and names[0] | names[1] == names[2]
    assert all(
        name.startswith("blocks/") or name.endswith("time_embedding/in/kernel") or "out/kernel" in name for name in names[1]
    )
    changed = jax.tree.map(lambda x: x + 1, trained)
    merged = flatten_dict(frozen.merged(changed, base), sep="/")
    for name, x in flatten_dict(whole, sep="/").items():
        np.testing.assert_array_equal(merged[name], x if name in names[1] else x + 1)


@pytest.mark.parametrize("name", ["blocks/attention/qkv/kernel", "blocks/attention/out/kernel", "blocks/mlp/in/kernel"])
def test_the_product_of_an_adapter_against_numpy(name):
    """Catches mixed axes of the heads or of the stack, a product without its scale, and a kernel without its adapter."""
    whole, lora = params(), adaptation(lora={"rank": 3, "alpha": 6.0, "train": ("label_embedding/embedding",)})
    trained = lora.trained(whole, jax.random.key(1))
    flat = flatten_dict(trained, sep="/")
    assert not flat[f"lora/{name}/b"].any() and flat[f"lora/{name}/a"].any() and "label_embedding/embedding" in flat
    same = flatten_dict(lora.merged(trained, lora.base(whole)), sep="/")
    np.testing.assert_array_equal(same[name], flatten_dict(whole, sep="/")[name])
    trained = tiny.random_params(trained, key=3)
    a, b = (np.asarray(flatten_dict(trained, sep="/")[f"lora/{name}/{part}"], np.float64) for part in "ab")
    merged = flatten_dict(lora.merged(trained, lora.base(whole)), sep="/")
    kernel = np.asarray(flatten_dict(whole, sep="/")[name], np.float64)
    for block in range(2):
        flat_kernel = kernel[block].reshape(a.shape[1], b.shape[2]) + 2.0 * a[block] @ b[block]
        np.testing.assert_allclose(merged[name][block].reshape(flat_kernel.shape), flat_kernel, rtol=1e-5, atol=1e-6)


def test_a_layer_with_adapters_is_the_merged_layer():
    """Catches a merge that is not x W + (alpha / r) (x a) b."""
    rng = np.random.default_rng(0)
    w, a, b, x = (rng.normal(size=size).astype(np.float32) for size in ((5, 7), (5, 2), (2, 7), (4, 5)))
    merged = with_adapters({"kernel": w}, {"kernel": {"a": a, "b": b}}, 0.5)["kernel"]
    np.testing.assert_allclose(x @ merged, x @ w + 0.5 * (x @ a) @ b, rtol=1e-5, atol=1e-5)


def test_shapes_of_adapters():
    """Catches another reading of the axes than PEFT's linear layer of the fused kernel has."""
    assert adapter_shapes((28, 1152, 3, 16, 72), "isoo", 8) == ((28, 1152, 8), (28, 8, 3456))
    assert adapter_shapes((28, 16, 72, 1152), "iio", 8) == ((28, 1152, 8), (28, 8, 1152))
    assert adapter_shapes((1152, 4608), "io", 4) == ((1152, 4), (4, 4608))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"freeze": ("nothing/.*",)}, "init.freeze: 'nothing/.*' matches no parameter"),
        ({"freeze": ("(",)}, "no regular expression"),
        ({"freeze": "blocks/.*"}, r"give a tuple of patterns, as in \('blocks"),
        ({"freeze": (".*",)}, "leave no parameter to train"),
        ({"freeze": ("blocks/.*",), "lora": {"rank": 2}}, "leave init.freeze empty"),
        ({"lora": {"rank": -1}}, "init.lora.rank is -1"),
        ({"lora": {"rank": 2, "alpha": 0.0}}, "init.lora.alpha is 0.0"),
        ({"lora": {"rank": 2, "targets": ("final/linear/kernel",)}}, "not one of the network's matrices"),
        ({"lora": {"rank": 2, "train": ("bias_of_nothing",)}}, "init.lora.train: 'bias_of_nothing' matches no parameter"),
    ],
)
def test_mistakes(fields, words):
    """Catches settings that would train something else than they say."""
    with pytest.raises(UserError, match=words):
        adaptation(**fields).trained(params(), jax.random.key(0))
