"""Tensors that are read when asked for: files, parts, and what is said when they do not fit."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from dit_files import held
from safetensors.numpy import load_file, save_file

from dit_jax.errors import UserError
from dit_jax.interop import tensors as t


def test_what_is_written_the_library_reads(tmp_path):
    """A wrong offset, an unpadded header, a transposed array written in memory order."""
    arrays = {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "a": np.arange(3).astype(jnp.bfloat16),
        "scalar": np.array(2, np.float16),
    }
    t.write_safetensors(tmp_path / "new" / "x.safetensors", {name: held(array) for name, array in arrays.items()}, {"k": "v"})
    for found in (
        load_file(tmp_path / "new" / "x.safetensors"),
        {k: v.load() for k, v in t.open_safetensors(tmp_path / "new" / "x.safetensors")[0].items()},
    ):
        assert found.keys() == arrays.keys()
        for name, array in arrays.items():
            assert found[name].dtype == array.dtype
            np.testing.assert_array_equal(found[name], array)
    assert t.open_safetensors(tmp_path / "new" / "x.safetensors")[1] == {"k": "v"}


def test_differences_are_listed_in_full_and_equal_ones_together():
    """Only the first difference told, or hundreds of lines for one mistake."""
    expected = {f"blocks.{i}.a": (2,) for i in range(12)} | {"x": (1,), "y": (1,)}
    found = {"y": held(np.ones(2)), "z": held(np.ones(1)), "blocks.3.a": held(np.ones(2))}
    with pytest.raises(UserError) as error:
        t.check(found, expected, "f")
    assert [line.strip() for line in str(error.value).splitlines()] == [
        "f does not fit the model: 14 differences in 14 tensors:",
        "extra z [1]",
        "misshapen y: [2] instead of [1]",
        "missing blocks.[0,1,2,4,5,6,7,8,9,10,11].a [2]",
        "missing x [1]",
    ]


@pytest.mark.parametrize("dtypes", [("float32", "float16"), ("float64",), ("int64",)])
def test_mixed_or_strange_dtypes_are_refused(dtypes):
    """A silent cast."""
    with pytest.raises(UserError, match="same dtype"):
        t.common_dtype({str(i): held(np.ones(1, dtype)) for i, dtype in enumerate(dtypes)}, "f")


@pytest.fixture
def index(tmp_path):
    save_file({"a": np.ones(1)}, tmp_path / "1.safetensors")
    save_file({"b": np.zeros(1)}, tmp_path / "2.safetensors")
    path = tmp_path / "x.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))
    return path


def test_parts_are_read_together(index):
    """A part left out."""
    found, files = t.open_sharded(index)
    assert {name: tensor.load()[0] for name, tensor in found.items()} == {"a": 1, "b": 0}
    assert [file.name for file in files] == ["1.safetensors", "2.safetensors"]


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"a": "1.safetensors"}, None),
        ({"a": "1.safetensors", "b": "1.safetensors"}, "disagree about b"),
        ({"a": "1.safetensors", "b": "3.safetensors"}, "3.safetensors does not exist"),
        ({"a": "../1.safetensors"}, "outside"),
        ({"a": "/etc/passwd"}, "outside"),
        ({"a": 1}, "not a text"),
        ([], "weight_map is .*, not an object"),
    ],
)
def test_an_index_that_lies_is_refused(places, message, index):
    """A tensor missing from its part, or a path that leaves the folder."""
    index.write_text(json.dumps({"weight_map": places}))
    if message is None:
        assert t.open_sharded(index)[0].keys() == {"a"}
    else:
        with pytest.raises(UserError, match=message):
            t.open_sharded(index)


def test_a_truncated_file_is_refused(tmp_path):
    """A partial download read as if it were whole."""
    save_file({"a": np.ones(100)}, tmp_path / "x.safetensors")
    content = (tmp_path / "x.safetensors").read_bytes()
    for length in (0, 5, 60, len(content) - 1):
        (tmp_path / "x.safetensors").write_bytes(content[:length])
        with pytest.raises(UserError, match="not a complete safetensors file"):
            t.open_safetensors(tmp_path / "x.safetensors")


def test_eight_bit_floats_are_refused(tmp_path):
    """Catches an 8-bit file that is read as other numbers, or an error that does not say what to give in its place."""
    header = json.dumps({"a": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}).encode()
    header += b" " * (-len(header) % 8)
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(UserError, match=r"a has dtype F8_E4M3; .* give the same weights in bfloat16 or float16"):
        t.open_safetensors(tmp_path / "x.safetensors")
