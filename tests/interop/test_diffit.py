"""DiffiT's weights in the layout of the paper's code: names, shapes, constants, and `convert` both ways."""

import json

import numpy as np
import pytest
import tiny
from dit_files import held
from flax.traverse_util import flatten_dict

import dit_jax
from dit_jax import recipes
from dit_jax.build import Run
from dit_jax.convert import formats, other_networks
from dit_jax.errors import UserError
from dit_jax.interop import diffit, peft, weights
from dit_jax.interop.tensors import Tensor, open_safetensors
from dit_jax.models.diffit import DiffiT
from dit_jax.models.position import sincos_2d

SHAPES = {  # of a network of width 32, patch 2, 1 channel, depth 2, 4 heads, 4 x 4 tokens, from the paper's code
    "pos_embed": (1, 16, 32),
    "x_embedder.proj.weight": (32, 1, 2, 2),
    "t_embedder.mlp.2.bias": (32,),
    "y_embedder.embedding_table.weight": (11, 32),
    "blocks.1.attn.qkv.weight": (96, 32),
    "blocks.0.attn.qkv_temb.weight": (96, 32),
    "blocks.0.attn.qkv_temb.bias": (96,),
    "blocks.1.attn.proj.weight": (32, 32),
    "blocks.1.attn.relative_position_bias_table": (49, 4),
    "blocks.1.attn.relative_position_index": (16, 16),
    "blocks.0.mlp.fc1.weight": (128, 32),
    "final_layer.linear.weight": (8, 32),
}


@pytest.fixture(scope="module")
def ours():
    c = tiny.diffit()
    params = tiny.random_params(formats.network_params(c))
    tensors = {path: held(np.asarray(x)) for path, x in flatten_dict(params, sep="/").items()}
    return weights.Weights(tensors, weights.sections_of(c.to_dict()), {"from": "a test"})


@pytest.fixture(scope="module")
def theirs(ours):
    return diffit.write(ours.tensors, "official", ours.sections["model"], (8, 8, 1))[0]


def test_names_and_shapes(theirs):
    """Catches a name or an axis order that the paper's code would refuse to load."""
    assert {name: theirs[name].shape for name in SHAPES} == SHAPES and len(theirs) == 2 + 4 + 1 + 1 + 2 + 2 * 12
    index = theirs["blocks.0.attn.relative_position_index"].load()
    assert index.dtype == np.int64 and index[0, 0] == 24 and index[0, 1] == 23 and index[4, 0] == 31  # query (1, 0), key (0, 0)
    assert diffit.recognises(theirs, "official") and not diffit.recognises({"blocks.0.attn.qkv.weight"}, "official")


def test_the_round_trip_keeps_every_bit(ours, theirs):
    """Catches a tensor that is transposed one way and not the other, or sizes that are read wrongly."""
    again, sections = diffit.read(theirs, "official", "a test")
    assert {path: x.shape for path, x in again.items()} == {path: x.shape for path, x in ours.tensors.items()}
    for path, tensor in ours.tensors.items():
        np.testing.assert_array_equal(again[path].load(), tensor.load(), err_msg=path)
    model = ours.sections["model"]
    assert {name: sections["model"][name] for name in model} == {**model, "grid": (4, 4)}
    assert sections["process"]["variance"] == "learned_range"


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("blocks.1.attn.relative_position_index", lambda x: x.T, "relative_position_index is not the index .* 4 x 4 grid"),
        ("pos_embed", lambda x: x + 0.1, "other position embeddings are not supported"),
        ("blocks.0.attn.relative_position_bias_table", lambda x: x[:-1], r"misshapen blocks.0.attn.relative_position_bias_table"),
        ("blocks.1.attn.qkv_temb.bias", None, "missing blocks.1.attn.qkv_temb.bias"),
    ],
)
def test_other_files_are_refused(theirs, name, change, words):
    """Catches weights of another form of the network that are read as if they were of this one."""
    changed = dict(theirs)
    tensor = changed.pop(name)
    if change is not None:
        changed[name] = held(change(np.array(tensor.load())))
    with pytest.raises(UserError, match=words):
        diffit.read(changed, "official", "a test")


@pytest.mark.parametrize(("fields", "words"), [({"grid": (2, 4)}, "squares only"), ({"num_classes": 0}, "has classes")])
def test_networks_without_a_name_there_are_refused(ours, fields, words):
    """Catches a network that the layout cannot say, written all the same."""
    with pytest.raises(UserError, match=words):
        diffit.write(ours.tensors, "official", {**ours.sections["model"], **fields}, (8, 8, 1))


def test_convert(ours, tmp_path):
    """Catches a converter that does not know the network, and a file that no other verb takes."""
    formats.write(ours, "dit_jax", tmp_path / "ours.safetensors")
    opened = formats.read(formats.Source("dit_jax", tmp_path / "ours.safetensors"))
    formats.write(opened, "official", tmp_path / "theirs.safetensors")
    source = formats.Source("official", tmp_path / "theirs.safetensors", like=tmp_path / "ours.safetensors")
    again = formats.read(source)
    for path, tensor in ours.tensors.items():
        np.testing.assert_array_equal(again.tensors[path].load(), tensor.load(), err_msg=path)
    with pytest.raises(UserError, match="--like"):
        formats.read(formats.Source("official", tmp_path / "theirs.safetensors"))
    with pytest.raises(UserError, match="'diffit' draws only the size that it was trained on"):
        dit_jax.load(tmp_path / "ours.safetensors", resolution=12)


def test_the_released_sizes_get_the_recipe():
    """Catches a recipe whose network is not the released one, or that conversion does not find."""
    published = DiffiT.published["DiffiT@256"]
    fields = {name: value for name, value in published.fields.items() if name != "out_channels"}
    expected = diffit._expected(diffit._shapes(fields, 4, 8), 2, 16)
    known = {diffit.official.POSITION: sincos_2d(1152, 16, 16)[None]}
    known |= {name: diffit.position_index(16) for name in expected if name.endswith("index")}

    def tensor(name, shape):
        return held(known[name]) if name in known else Tensor(shape, np.dtype(np.float32), lambda: pytest.fail("read"))

    tensors = {name: tensor(name, shape) for name, shape in expected.items()}
    found = other_networks.read(diffit, formats.Source("official", "diffit_256.safetensors"), tensors, [], None, None)
    recipe = recipes.diffit(256)
    assert {**found.sections["model"], "param_dtype": "float32"} == {
        **json.loads(json.dumps(recipe.model.to_dict())),
        "dtype": "float32",
    }
    assert (
        found.sections["guidance"] == json.loads(json.dumps(recipe.guidance.to_dict()))
        and found.sections["transform"]["resolution"] == 256
    )
    with pytest.raises(UserError, match="256 or 512, not 384"):
        recipes.diffit(384)


def test_adapters(ours, tmp_path):
    """Catches an adapter of attention or of its condition that PEFT's folder loses."""
    network = Run(formats.config_of(ours.sections)).network
    shapes = {path: tensor.shape for path, tensor in ours.tensors.items()}
    rng, pairs = np.random.default_rng(0), {}
    for name, width in (("attention/condition", 96), ("attention/qkv", 96), ("mlp/in", 128)):
        a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 32, 3), (2, 3, width)))
        pairs[f"blocks/{name}/kernel"] = a, b
    peft.write(tmp_path / "adapter", peft.Adapter(pairs, {}, 1.0), None, shapes, network)
    assert f"{peft.PREFIX}blocks.1.attention.condition.lora_B.weight" in open_safetensors(tmp_path / "adapter" / peft.FILE)[0]
    merged = formats.with_adapter(ours, tmp_path / "adapter")
    for path, tensor in ours.tensors.items():
        added = np.matmul(*pairs[path]).reshape(tensor.shape) if path in pairs else 0
        np.testing.assert_allclose(merged.tensors[path].load(), tensor.load() + added, atol=1e-5)
