"""diffusers' DiTTransformer2DModel: names, its own forward, its config."""

import json

import numpy as np
import pytest
from dit_files import our_forward, same_bits, tiny_weights
from safetensors.numpy import load_file, save_file

from dit_jax.convert import formats
from dit_jax.convert.formats import Source
from dit_jax.errors import UserError
from dit_jax.interop.network_folder import WEIGHTS_NAME


@pytest.fixture
def folder(tmp_path):
    """A folder in diffusers' layout, written by us."""
    formats.write(tiny_weights(), "diffusers", tmp_path / "theirs")
    return tmp_path / "theirs"


def edit_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def edit(folder, change):
    tensors = load_file(folder / WEIGHTS_NAME)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_NAME)


def read(folder):
    found = formats.read(Source("diffusers", folder))
    return {name: tensor.load() for name, tensor in found.tensors.items()}, found.sections


def test_the_round_trip_keeps_every_bit(folder):
    """Query, key and value joined in another order, or an embedding lost."""
    found = formats.read(Source("diffusers", folder))
    assert same_bits(found, tiny_weights())
    assert found.sections["model"] == tiny_weights().sections["model"]
    assert found.sections["transform"]["resolution"] == 64


def test_diffusers_loads_the_folder_and_computes_the_same(folder):
    """A name diffusers does not know, key taken for value, or its order of shift and scale taken for the other."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    module, info = diffusers.DiTTransformer2DModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    rng = np.random.default_rng(1)
    x, t, labels = rng.normal(size=(3, 8, 8, 4)).astype(np.float32), np.array([0, 431, 999], np.float32), np.array([0, 3, 10])
    ours = our_forward(tiny_weights(), x, t, labels)

    def forward():
        with torch.no_grad():
            out = module(torch.from_numpy(x).permute(0, 3, 1, 2), torch.from_numpy(t), torch.from_numpy(labels)).sample
        return np.abs(out.permute(0, 2, 3, 1).numpy() - ours).max(axis=(1, 2, 3)) / np.abs(ours).max()

    # At t = 0 all angles are 0; elsewhere their frequencies are not the paper's, see the module.
    assert forward()[0] < 1e-5 < forward()[1:].min()
    for block in module.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    assert forward().max() < 1e-5


def test_what_diffusers_saves_in_parts_is_read(folder, tmp_path):
    """A sharded folder read in part, or refused."""
    diffusers = pytest.importorskip("diffusers")
    module = diffusers.DiTTransformer2DModel.from_pretrained(folder)
    module.save_pretrained(tmp_path / "parts", max_shard_size="100KB")
    assert not (tmp_path / "parts" / WEIGHTS_NAME).exists()
    assert same_bits(formats.read(Source("diffusers", tmp_path / "parts")), tiny_weights())


def test_embeddings_must_be_equal_in_all_blocks(folder):
    """The first block's embedding taken for all, when another block was trained away from it."""

    def change(tensors):
        tensors["transformer_blocks.2.norm1.emb.timestep_embedder.linear_2.bias"][0] += 1

    edit(folder, change)
    with pytest.raises(UserError, match=r"transformer_blocks\.2\.\S+linear_2\.bias differs from transformer_blocks\.0"):
        read(folder)


def test_errors_speak_diffusers_names(folder):
    """A file with missing, extra and misshapen tensors, reported under names that are not in it."""

    def change(tensors):
        tensors["transformer_blocks.1.attn1.to_kk.bias"] = tensors.pop("transformer_blocks.1.attn1.to_k.bias")
        tensors["proj_out_1.bias"] = tensors["proj_out_1.bias"][:-1]

    edit(folder, change)
    with pytest.raises(UserError) as error:
        read(folder)
    lines = [line.strip() for line in str(error.value).splitlines()[1:]]
    assert lines == [
        "extra transformer_blocks.1.attn1.to_kk.bias [32]",
        "misshapen proj_out_1.bias: [63] instead of [64]",
        "missing transformer_blocks.1.attn1.to_k.bias [32]",
    ]


@pytest.mark.parametrize(
    "fields",
    [
        {"num_layers": 2},
        {"attention_head_dim": 16},
        {"norm_eps": 1e-3},
        {"attention_bias": False},
        {"activation_fn": "gelu"},
        {"out_channels": None},
        {"sample_size": None},
        {"_class_name": "PixArtTransformer2DModel"},
    ],
)
def test_a_config_of_another_network_is_refused(fields, folder):
    """Weights of a network that computes something else, converted as if it were ours."""
    edit_config(folder, **fields)
    with pytest.raises(UserError, match=next(iter(fields)).strip("_").replace("class_name", "describes a PixArt")):
        read(folder)


def test_the_published_files_older_class_and_norm_are_read(folder):
    """The published DiT-XL-2 refused, whose config names another class and an epsilon of 1e-5."""
    edit_config(folder, _class_name="Transformer2DModel", norm_eps=1e-5)
    assert read(folder)[1]["model"]["heads"] == 4


def test_a_folder_without_config_or_weights_says_what_to_do(folder):
    """A stack trace, or heads guessed."""
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json does not exist; it records what the tensors do not determine"):
        read(folder)
    (folder / WEIGHTS_NAME).unlink()
    with pytest.raises(UserError, match="has none of diffusion_pytorch_model"):
        read(folder)
