"""The lpips package's weights in."""

import json

import lpips_weights
import numpy as np
import pytest

from dit_jax.errors import UserError
from dit_jax.interop import lpips, pt_writer
from dit_jax.interop.tensors import open_safetensors, write_foreign, write_safetensors


@pytest.fixture
def file(tmp_path):
    write_foreign(tmp_path / "x.safetensors", lpips.from_package(lpips_weights.tensors(), "random"), {"from": "lpips"})
    return tmp_path / "x.safetensors"


def test_every_tensor_arrives(file):
    """A kernel transposed wrongly, two layers exchanged, a name that is not the package's, or copies that double the file."""
    params, arrays = lpips.load(file), lpips_weights.arrays()
    tensors, metadata = open_safetensors(file)
    assert tensors.keys() == {name for name in arrays if not name.startswith("lins.")}
    assert all(tensors[name].load().tobytes() == arrays[name].tobytes() for name in tensors)
    assert json.loads(metadata["origin"]) == {"from": "lpips"}
    for stage, places in lpips_weights.PLACES.items():
        for layer, place in enumerate(places, 1):
            found, name = params[f"conv{stage}_{layer}"], f"net.slice{stage}.{place}"
            np.testing.assert_array_equal(found["kernel"], np.einsum("oihw->hwio", arrays[f"{name}.weight"]))
            np.testing.assert_array_equal(found["bias"], arrays[f"{name}.bias"])
        np.testing.assert_array_equal(params[f"lin{stage}"], arrays[f"lin{stage - 1}.model.1.weight"].ravel())
    for name, values in lpips_weights.SCALING.items():
        assert params["scaling"][name].tolist() == np.float32(values).tolist()
    assert len(params) == 13 + 5 + 1


def test_all_differences_are_listed(file):
    """A missing, extra or misshapen tensor skipped, or hidden behind the first one reported."""
    tensors = lpips_weights.tensors(
        lin0__model__1__weight=None,
        lins__0__model__1__weight=None,
        fc__bias=np.zeros(3, np.float32),
        net__slice1__0__bias=np.zeros(63, np.float32),
    )
    with pytest.raises(UserError) as error:
        lpips.from_package(tensors, "x.pt")
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("lins.")}
    write_safetensors(file, tensors, {})
    with pytest.raises(UserError) as error_of_load:
        lpips.load(file)
    for message in (str(error.value), str(error_of_load.value)):
        assert "3 differences" in message
        for part in ("missing lin0.model.1.weight", "extra fc.bias", "misshapen net.slice1.0.bias: [63] instead of [64]"):
            assert part in message


def negative():
    array = lpips_weights.arrays()["lin2.model.1.weight"].copy()
    array[0, 5] = -0.5
    return array


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"lin2__model__1__weight": negative(), "lins__2__model__1__weight": None}, "holds -0.5"),
        ({"net__slice5__28__bias": np.full(512, np.nan, np.float32)}, "NaN"),
        ({"scaling_layer__scale": np.zeros((1, 3, 1, 1), np.float32)}, "is a divisor"),
        ({"lins__1__model__1__weight": np.ones((1, 128, 1, 1), np.float32)}, "differs from lin1.model.1.weight"),
        ({"net__slice1__0__bias": np.zeros(64, np.float16)}, "same dtype"),
        ({"net__slice1__0__weight": np.zeros((64, 3, 11, 11), np.float32)}, 'AlexNet.*net="vgg"'),
    ],
)
def test_what_lpips_cannot_have(changes, text):
    """A distance that can be negative or NaN, or another network's weights."""
    with pytest.raises(UserError, match=text):
        lpips.from_package(lpips_weights.tensors(**changes), "x.pt")


def test_wrong_files_are_named(file, tmp_path):
    """A stack trace from deep inside instead of the path and the remedy."""
    with pytest.raises(UserError, match=r"nowhere.*--from=lpips"):
        lpips.load(tmp_path / "nowhere")
    pt_writer.write(tmp_path / "x.pt", lpips_weights.tensors())
    with pytest.raises(UserError, match=r"--weights=.*x\.pt"):
        lpips.load(tmp_path / "x.pt")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="not a complete safetensors"):
        lpips.load(file)
    with pytest.raises(UserError, match=r"must end in \.safetensors"):
        write_foreign(tmp_path / "x.pt", {}, {})
