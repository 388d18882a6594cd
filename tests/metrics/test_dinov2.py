"""DINOv2 beside its own code's outputs in golden/extractors.npz, and transformers' where it is installed."""

import json

import jax
import metric_networks
import numpy as np
import pytest
from paths import GOLDEN as GOLDEN_FOLDER

from dit_jax.convert import formats
from dit_jax.convert.formats import Source
from dit_jax.interop import dinov2 as interop
from dit_jax.interop.tensors import write_foreign
from dit_jax.metrics.dinov2 import DINOv2, network, position_weights

GOLDEN = np.load(GOLDEN_FOLDER / "extractors.npz")


def load(path, kind, **changes):
    tensors = interop.from_published(metric_networks.tensors(metric_networks.dinov2(kind, **changes)), "random")
    write_foreign(path, tensors, {})
    return interop.load(path)


@pytest.mark.parametrize("kind", metric_networks.DINOV2)
def test_features_are_dinov2s_own(kind, tmp_path):
    """An interpolation of positions, a scale, a norm, a gate or a token order that is not the published network's."""
    params = load(tmp_path / "x.safetensors", kind)
    shapes = jax.eval_shape(network(params).init, jax.random.key(0), np.zeros((1, 28, 28, 3), np.float32))["params"]
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), params)
    extractor = DINOv2()
    assert json.loads(json.dumps(extractor.recipe()))["input_size"] == 224
    found = jax.jit(extractor)(params, metric_networks.photographs(256, 300))["features"]
    wanted = GOLDEN[f"dinov2/{kind}"]
    assert np.abs(wanted[0] - wanted[1]).max() > 0.1
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("registers", [False, True])
def test_positions_are_an_average(registers):
    """Weights that do not sum to one, or reach beyond the grid."""
    for side in (16, 37, 40):
        weights = position_weights(37, side, registers)
        assert weights.shape == (side, 37)
        np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-6)
    assert position_weights(37, 16, registers)[0].argmax() in (0, 1)


@pytest.mark.parametrize("gated", [False, True])
def test_transformers_layout_is_read(gated, tmp_path):
    """Query, key and value in another order, or a layer of the other layout mistaken."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=70, patch_size=14, use_swiglu_ffn=gated
    )
    model = transformers.Dinov2Model(config).eval()
    for name, parameter in model.named_parameters():
        parameter.data.add_(torch.randn_like(parameter) * (0.3 if "embed" in name else 0.05))
    model.save_pretrained(tmp_path)
    formats.write(formats.read(Source("dinov2", tmp_path / "model.safetensors")), "dit_jax", tmp_path / "x.safetensors")
    params = interop.load(tmp_path / "x.safetensors")
    x = np.random.default_rng(0).normal(size=(2, 70, 70, 3)).astype(np.float32)
    with torch.no_grad():
        wanted = model(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).pooler_output.numpy()
    found = network(params).apply({"params": params}, x)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
