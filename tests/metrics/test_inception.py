"""Inception-v3 beside torch-fidelity's outputs in golden/extractors.npz, and its poolings beside the definition."""

import json

import jax
import metric_networks
import numpy as np
import pytest
from paths import GOLDEN as GOLDEN_FOLDER

from dit_jax.interop import inception as interop
from dit_jax.interop.tensors import write_foreign
from dit_jax.metrics.inception import INPUT_SIZE, Conv, Convolution, Inception, InceptionV3, Mixed, _block_8
from dit_jax.metrics.resize import bilinear_tensorflow

GOLDEN = np.load(GOLDEN_FOLDER / "extractors.npz")
NAMES = {"2048": "features", "logits_unbiased": "logits"}  # torch-fidelity's to ours


@pytest.fixture(scope="module")
def params(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "x.safetensors"
    write_foreign(path, metric_networks.tensors(metric_networks.inception()), {})
    return jax.device_put(interop.load(path))


@pytest.fixture(scope="module")
def outputs(params):
    """{size: outputs} of the three sizes of the golden file; one compilation for the network."""
    forward = jax.jit(lambda params, x: InceptionV3().apply({"params": params}, x))
    return {
        size: jax.tree.map(
            np.asarray, forward(params, (bilinear_tensorflow(metric_networks.photographs(*sides), INPUT_SIZE) - 128) / 128)
        )
        for size, sides in {"shrunk": (331, 217), "enlarged": (64, 50), "unchanged": (299, 299)}.items()
    }


@pytest.mark.parametrize("size", ["shrunk", "enlarged", "unchanged"])
@pytest.mark.parametrize("layer", ["64", "192", "768", "spatial", "2048", "logits_unbiased"])
def test_every_layer_is_torch_fidelitys(layer, size, outputs):
    """A pooling, padding, epsilon, branch order, resize or range that differs from the network of all published numbers."""
    wanted = GOLDEN[f"inception/{size}/{layer}"]
    found = outputs[size][NAMES.get(layer, layer)]
    found = found if size == "unchanged" else found[:, ::8]
    assert wanted.std(0).max() > 0.01  # the two images differ
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


def test_the_extractor_is_resize_network_and_softmax(monkeypatch):
    """Another range or resize before the network, a softmax over the wrong axis, grey refused, a recipe that no file can hold."""
    seen = []

    class Network:
        def apply(self, variables, x):
            seen.append((variables, x))
            return {"features": x.mean((1, 2)), "spatial": x[:, 0, 0], "logits": jax.numpy.arange(6.0).reshape(2, 3), "64": None}

    monkeypatch.setattr("dit_jax.metrics.inception.InceptionV3", Network)
    images = metric_networks.photographs(331, 217)[..., :1]
    found = Inception()({"fc": 1}, images)
    variables, x = seen[0]
    assert variables == {"params": {"fc": 1}}
    np.testing.assert_allclose(x, np.repeat((bilinear_tensorflow(images, 299) - 128) / 128, 3, axis=-1))
    assert found.keys() == {"features", "spatial", "probabilities"}
    np.testing.assert_allclose(found["probabilities"], [np.exp([0, 1, 2]) / np.exp([0, 1, 2]).sum()] * 2, rtol=1e-5)
    assert "TensorFlow 1" in json.loads(json.dumps(Inception().recipe()))["resize"]


def test_the_mean_leaves_out_the_padding():
    """The padding of an average pool counted as zeros, as in torchvision; or the bias averaged with it."""
    x = np.random.default_rng(0).normal(size=(1, 5, 4, 3)).astype(np.float32)
    layer = Convolution(Conv(2, 1, 1), pooled=True)
    params = {"kernel": np.array([[1, 0], [0, 1], [2, -1]], np.float32)[None, None], "bias": np.float32([10, 20])}
    found = layer.apply({"params": params}, x)[0]
    for i in range(5):
        for j in range(4):
            around = x[0, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2].mean((0, 1))
            np.testing.assert_allclose(found[i, j], np.maximum(around @ params["kernel"][0, 0] + params["bias"], 0), rtol=1e-5)


@pytest.mark.parametrize("pool", ["average", "max"])
def test_the_last_block_pools_by_maximum(pool):
    """The average in the last block, as in Szegedy's paper and torchvision, where the graph has the maximum."""
    block = Mixed(_block_8(pool))
    x = np.random.default_rng(0).normal(size=(1, 3, 3, 4)).astype(np.float32)
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(block.init, jax.random.key(0), x))["params"]
    params["branch_pool"] = {"kernel": np.ones((1, 1, 4, 192), np.float32), "bias": np.full(192, 50, np.float32)}
    found = block.apply({"params": params}, x)[0, 1, 1, -1]
    around = x[0].reshape(9, 4)
    wanted = (around.mean(0) if pool == "average" else around.max(0)).sum() + 50
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
