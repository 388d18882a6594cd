"""Weights of HDiT in k-diffusion's layout; `tests/models/test_hourglass_parity` compares what they compute."""

import json

import jax
import numpy as np
import pytest
from dit_files import held

from dit_jax.errors import UserError
from dit_jax.interop import hourglass
from dit_jax.models.hourglass import HourglassDiT

FIELDS = {
    "patch_size": 2, "widths": (16, 32), "depths": (2, 3), "num_classes": 7, "attentions": ("neighborhood", "global"),
    "kernel_size": 3, "head_width": 8, "mlp_ratio": 3.0, "mapping_width": 12, "mapping_depth": 1,
}  # fmt: skip
SHAPE = (8, 12, 3)


def ours(fields=FIELDS, dtype=np.float32):
    """{path: random array} of the network's own initialisation."""
    net = HourglassDiT(**fields, out_channels=3)
    cond = {"label": np.zeros(1, np.int32)} if fields["num_classes"] else {}
    abstract = jax.eval_shape(net.init, jax.random.key(0), np.zeros((1, *SHAPE), np.float32), np.zeros(1), cond)["params"]
    rng = np.random.default_rng(2)
    leaves = jax.tree_util.tree_leaves_with_path(abstract)
    return {"/".join(key.key for key in path): held(rng.standard_normal(leaf.shape).astype(dtype)) for path, leaf in leaves}


def arrays(tensors):
    return {name: tensor.load() for name, tensor in tensors.items()}


@pytest.mark.parametrize("classes, dtype", [(7, np.float32), (0, np.float16)])
def test_round_trip(classes, dtype):
    """Catches a tensor that is lost, transposed or cast; fields that the config does not carry; levels of other names."""
    fields = FIELDS | {"num_classes": classes}
    tensors = ours(fields, dtype)
    theirs, config = hourglass.write(tensors, "official", fields, SHAPE)
    assert hourglass.recognises(theirs, "official") and not hourglass.recognises(theirs, "diffusers")
    metadata = {"config": json.dumps(config)}
    back, sections = hourglass.read(theirs, "official", "a file", metadata)
    assert back.keys() == tensors.keys()
    for name, array in arrays(back).items():
        assert array.dtype == dtype and array.shape == back[name].shape
        np.testing.assert_array_equal(array, tensors[name].load())
    model = sections["model"]
    assert model["name"] == "hourglass" and model["param_dtype"] == np.dtype(dtype).name
    assert {name: model[name] for name in FIELDS} == fields
    assert sections["transform"]["size"] == (8, 12) and sections["process"] == {"name": "edm", "sigma_data": 1.0}


def test_names_are_those_of_k_diffusion():
    """Catches names of a checkpoint of k-diffusion that are not read, and the order (qkv, head, E) of rows."""
    tensors = ours()
    theirs, _ = hourglass.write(tensors, "official", FIELDS, SHAPE)
    shapes = {name: tensor.shape for name, tensor in theirs.items()}
    for name, shape in {
        "patch_in.proj.weight": (16, 12),
        "time_emb.weight": (6, 1),
        "aug_emb.weight": (6, 9),
        "class_emb.weight": (8, 12),
        "mapping.blocks.0.up_proj.weight": (72, 12),
        "down_levels.0.1.self_attn.norm.linear.weight": (16, 12),
        "down_levels.0.1.self_attn.pos_emb.freqs": (2, 1),
        "up_levels.0.0.ff.up_proj.weight": (96, 16),
        "mid_level.2.self_attn.qkv_proj.weight": (96, 32),
        "merges.0.proj.weight": (32, 64),
        "splits.0.fac": (1,),
        "patch_out.proj.weight": (12, 16),
    }.items():
        assert shapes[name] == shape
    kernel, weight = tensors["middle/attention/qkv/kernel"].load(), theirs["mid_level.2.self_attn.qkv_proj.weight"].load()
    np.testing.assert_array_equal(weight.reshape(3, 4, 8, 32)[1, 2, 5], kernel[2, :, 1, 2, 5])


def changed(**model):
    return lambda theirs, config: config["model"].update(model)


@pytest.mark.parametrize(
    "change, words",
    [
        (changed(type="image_v1"), "a model of type 'image_v1'"),
        (changed(mapping_cond_dim=8), "model.mapping_cond_dim is 8"),
        (changed(patch_size=[2, 4]), r"patch_size is \[2, 4\]"),
        (changed(self_attns=[{"type": "none"}, {"type": "global"}]), "one of neighborhood, shifted-window, global"),
        (changed(d_ffs=[48, 64]), "one ratio for all levels"),
        (changed(depths=[1, 3]), "extra down_levels"),
        (changed(widths=[16, 64], d_ffs=[48, 192]), "misshapen"),
        (lambda theirs, config: config.clear(), "no config of k-diffusion"),
        (lambda theirs, config: theirs.pop("splits.0.fac"), "missing splits.0.fac"),
        (
            lambda theirs, config: theirs.update({"mid_level.0.self_attn.pos_emb.freqs": held(np.ones((4, 1), np.float32))}),
            "mid_level.0.self_attn.pos_emb.freqs differs",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change, words):
    """Catches weights of another network, or other frequencies, that are read as if they were these."""
    theirs, config = hourglass.write(ours(), "official", FIELDS, SHAPE)
    change(theirs, config)
    with pytest.raises(UserError, match=words):
        hourglass.read(theirs, "official", "a file", config)
