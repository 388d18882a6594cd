"""The paper's layout: names, shapes, positions, and what the network computes."""

import numpy as np
import pytest
from dit_files import held, official_forward, our_forward, same_bits, tiny_weights

from dit_jax.errors import UserError
from dit_jax.interop import official

SHAPES = {  # of a network of width 32, patch 2, 4 channels, from the paper's code
    "pos_embed": (1, 16, 32),
    "x_embedder.proj.weight": (32, 4, 2, 2),
    "t_embedder.mlp.0.weight": (32, 256),
    "y_embedder.embedding_table.weight": (11, 32),
    "blocks.2.attn.qkv.weight": (96, 32),
    "blocks.0.mlp.fc1.weight": (128, 32),
    "blocks.1.adaLN_modulation.1.weight": (192, 32),
    "final_layer.linear.weight": (32, 32),
    "final_layer.linear.bias": (32,),
}


@pytest.fixture(scope="module")
def ours():
    return tiny_weights()


@pytest.fixture(scope="module")
def theirs(ours):
    return official.to_theirs(ours.tensors, 2, 4)


def test_the_round_trip_keeps_every_bit(ours, theirs):
    """A tensor transposed one way and not the other, or lost."""
    shapes = {name: tensor.shape for name, tensor in ours.tensors.items()}
    assert {name: tensor.shape for name, tensor in theirs.items()} == official.expected(shapes, 2, 4)
    assert same_bits(ours, ours._replace(tensors=official.to_ours(theirs, shapes)))


def test_names_and_shapes_are_the_papers(theirs):
    """A name or an axis order that the paper's code would refuse to load."""
    assert len(theirs) == 10 + 2 + 3 * 10
    assert {name: theirs[name].shape for name in SHAPES} == SHAPES
    official.check_position(theirs["pos_embed"], "test")


def test_the_sizes_are_read_off_the_tensors(theirs):
    """Depth off by one, the null label counted as a class, width and channels swapped."""
    assert official.infer(theirs, "test") == official.Architecture(2, 3, 32, 128, 10, 4, 8, np.dtype(np.float32))
    assert official.grid_side(theirs, "test") == 4


def test_pytorch_computes_the_same_from_it(ours, theirs):
    """Query taken for key, heads interleaved otherwise, a patch's pixels in another order, shift taken for scale."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(1)
    x, t, labels = rng.normal(size=(3, 8, 8, 4)).astype(np.float32), np.array([0, 431, 999], np.float32), np.array([0, 3, 10])
    state = {name: torch.from_numpy(np.ascontiguousarray(tensor.load())) for name, tensor in theirs.items()}
    with torch.no_grad():
        expected = official_forward(state, torch.from_numpy(x).permute(0, 3, 1, 2), torch.from_numpy(t), labels, heads=4)
    actual = our_forward(ours, x, t, labels)
    assert np.abs(actual - expected.permute(0, 2, 3, 1).numpy()).max() < 1e-5 * np.abs(actual).max()


def test_another_position_table_is_refused(theirs):
    """Weights with trained positions converted as if they had ours."""
    table = theirs["pos_embed"].load().copy()
    official.check_position(held(table.astype(np.float16)), "test")
    table[0, 3, 5] += 2e-5
    with pytest.raises(UserError, match="differs by 2e-05"):
        official.check_position(held(table), "test")
    table[0, 3, 5] = np.nan
    with pytest.raises(UserError, match="differs by nan"):
        official.check_position(held(table), "test")


@pytest.mark.parametrize("model", [{"conditioning": "adaln"}, {"conditioning": "in_context"}, {"num_classes": 0}])
def test_networks_without_a_name_there_are_refused(model):
    """A block of another kind, or no label table, written under names that mean something else."""
    found = tiny_weights(**model)
    with pytest.raises(UserError, match="adaln_zero"):
        official.to_theirs(found.tensors, 2, 4)
