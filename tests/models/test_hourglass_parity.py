"""Our HDiT against PyPI's `hdit` with the same weights: outputs and gradients."""

import hdit_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from dit_files import held
from flax.traverse_util import flatten_dict

from dit_jax.interop import hourglass
from dit_jax.models.hourglass import HourglassDiT

torch = pytest.importorskip("torch")

COMMON = {"num_classes": 5, "out_channels": 4, "head_width": 16, "mapping_width": 24, "mapping_depth": 2, "mlp_ratio": 3.0}
PLANS = {  # hdit needs three levels
    "windows and global": {
        "patch_size": 2, "widths": (32, 48, 64), "depths": (2, 1, 1), "window_size": 4, "shape": (16, 32, 3),
        "attentions": ("shifted_window", "shifted_window", "global"),
    },
    "windows": {
        "patch_size": 1, "widths": (32, 16, 32), "depths": (1, 1, 2), "window_size": 2, "shape": (24, 8, 4),
        "attentions": ("global", "shifted_window", "shifted_window"),
    },
}  # fmt: skip


def of_plan(plan, dtype=jnp.float32):
    """(network, params, inputs) with random non-zero weights."""
    fields = {**COMMON, **PLANS[plan]}
    shape = fields.pop("shape")
    net = HourglassDiT(**fields, dtype=dtype)
    rng = np.random.default_rng(3)
    x = rng.standard_normal((3, *shape)).astype(np.float32)
    t = np.float32([-1.2, 0.1, 0.9])
    cond = {"label": np.int32([0, 5, 3]), "augmentation": rng.standard_normal((3, 9)).astype(np.float32)}
    params = tiny.random_params(jax.eval_shape(net.init, jax.random.key(0), x, t, cond)["params"], scale=0.1)
    for name, value in flatten_dict(params, sep="/").items():  # lengths must stay positive, and norms near 1
        if name.endswith("scale"):
            *parents, leaf = name.split("/")
            node = params
            for parent in parents:
                node = node[parent]
            node[leaf] = (4.0 if "attention" in name else 1.0) + value
    return net, fields | {"shape": shape}, params, (x, t, cond)


def theirs_of(fields, params):
    """{k-diffusion's name: array} of our parameters."""
    flat = {name: held(np.asarray(x)) for name, x in flatten_dict(params, sep="/").items()}
    return {name: tensor.load() for name, tensor in hourglass.write(flat, "official", fields, fields["shape"])[0].items()}


@pytest.mark.parametrize("plan", PLANS)
def test_forward_and_gradient_are_those_of_hdit(plan):
    """Catches the lerp of a skip the wrong way round, value and gate exchanged, interleaved rotations, a shift of the other
    sign or parity on the way up, masks of other windows, a scale of queries, or rows for columns."""
    net, fields, params, (x, t, cond) = of_plan(plan)
    forward, parameters = hdit_oracle.network(fields, fields["shape"][-1], theirs_of(fields, params))
    weight = np.random.default_rng(5).standard_normal((*x.shape[:-1], fields["out_channels"])).astype(np.float32)

    def loss(params):
        y = net.apply({"params": params}, x, t, cond)
        return (y * weight).sum(), y

    (_, ours), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    theirs = forward(x, t, cond["augmentation"], cond["label"])
    (theirs * torch.from_numpy(weight)).sum().backward()
    assert tiny.distance(ours, theirs.detach().numpy()) < 1e-5
    found = theirs_of(fields, gradient)
    assert len(parameters) > 30
    floor = 0.01 * max(float(parameter.grad.abs().max()) for parameter in parameters.values())
    for name, parameter in parameters.items():
        assert tiny.distance(found[name], parameter.grad.numpy(), floor) < 1e-5, name
    for constant in ("time_emb.weight", "aug_emb.weight"):
        assert not np.any(found[constant])


def test_bfloat16_is_near():
    """Catches norms, softmax, angles or Fourier features that are computed in bfloat16: they are off by more than roundings."""
    net, fields, params, (x, t, cond) = of_plan("windows and global", jnp.bfloat16)
    forward, _ = hdit_oracle.network(fields, fields["shape"][-1], theirs_of(fields, params))
    ours = jax.jit(net.apply)({"params": params}, x, t, cond)
    theirs = forward(x, t, cond["augmentation"], cond["label"])
    assert ours.dtype == jnp.float32
    error = np.asarray(ours) - theirs.detach().numpy()
    assert np.sqrt(np.mean(error**2) / np.mean(theirs.detach().numpy() ** 2)) < 0.03
