"""U-Nets against diffusers' UNet2DModel (ADM) and UNet2DConditionModel (LDM), with random weights and sizes of our own."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import unet_oracle
from flax import traverse_util
from unet_oracle import KINDS

from dit_jax.interop import unet as interop
from dit_jax.models.convolutional import enlarged
from dit_jax.models.unet import UNet

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")


@cache
def both(kind):
    """(our network, our parameters, their module, their class table)."""
    net = unet_oracle.network(kind)
    theirs, table, config = unet_oracle.module(net)
    tensors, sections = interop.read(unet_oracle.tensors_of(theirs, table), "diffusers", "the oracle", config)
    model = {name: value for name, value in sections["model"].items() if name not in ("name", "dtype", "param_dtype")}
    read = UNet(**model, out_channels=net.out_channels)
    params = traverse_util.unflatten_dict({path: jnp.asarray(tensor.load()) for path, tensor in tensors.items()}, sep="/")
    return read, params, theirs, table


def far(ours, theirs):
    """Largest difference over the largest value."""
    return float(np.abs(np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)).max() / np.abs(theirs).max())


@pytest.mark.parametrize("kind", KINDS)
def test_the_forward_and_the_gradients_are_those_of_diffusers(kind):
    """Catches a scale for a shift, a skip of the wrong stage, attention over the wrong heads, an epsilon, a cosine for a sine."""
    net, params, theirs, table = both(kind)
    x, t, cond = unet_oracle.inputs(net)
    weights = np.random.default_rng(5).normal(size=(*x.shape[:3], net.out_channels)).astype(np.float32)

    def loss(params):
        output = net.apply({"params": params}, x, t, cond)
        return (output * weights).sum(), output

    gradients, output = jax.jit(jax.grad(loss, has_aux=True))(params)
    wanted = unet_oracle.their_output(theirs, table, net, x, t, cond)
    theirs.zero_grad()
    (wanted * torch.from_numpy(weights)).sum().backward()
    assert output.dtype == jnp.float32
    assert far(output, wanted.detach().numpy()) < 1e-5

    flat = traverse_util.flatten_dict(gradients, sep="/")
    arrays = {name: tensor.grad.numpy() for name, tensor in theirs.named_parameters()}
    if table is not None:
        arrays[interop.LDM_TABLE] = table.grad.numpy()
    largest = max(np.abs(array).max() for array in arrays.values())
    for path, link in interop.links(net, "diffusers", 3, False).items():
        wanted_gradient = link.to_ours([arrays[name] for name in link.names])
        distance = np.abs(np.asarray(flat[path]) - wanted_gradient).max()
        assert distance < 1e-5 * max(np.abs(wanted_gradient).max(), 1e-2 * largest), path


def test_the_forward_in_bfloat16_is_near():
    """Catches a norm or a softmax in bfloat16, whose errors are several times as large."""
    net, params, theirs, table = both("ldm")
    x, t, cond = unet_oracle.inputs(net)
    output = jax.jit(lambda params: net.clone(dtype=jnp.bfloat16).apply({"params": params}, x, t, cond))(params)
    assert output.dtype == jnp.float32
    assert far(output, unet_oracle.their_output(theirs, table, net, x, t, cond).detach().numpy()) < 0.04


@pytest.mark.parametrize("small, size", [((3, 5), (12, 20)), ((4, 4), (6, 9)), ((8, 8), (6, 5))])
def test_the_low_resolution_image_is_resized_as_in_torch(small, size):
    """Catches aligned corners, antialiasing, or zeros beyond the edge."""
    x = np.random.default_rng(0).normal(size=(2, *small, 3)).astype(np.float32)
    theirs = torch.nn.functional.interpolate(torch.from_numpy(x).permute(0, 3, 1, 2), size, mode="bilinear")
    np.testing.assert_allclose(enlarged(x, size), theirs.permute(0, 2, 3, 1).numpy(), atol=2e-6)
