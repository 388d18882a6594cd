"""Inception's weights from the PyTorch port and from the TensorFlow graph."""

import struct
import tracemalloc

import metric_networks
import numpy as np
import pytest
from metric_networks import tensors

from dit_jax.convert import formats
from dit_jax.convert.formats import Source
from dit_jax.errors import UserError
from dit_jax.interop import inception, pt_writer
from dit_jax.interop.graph_def import read_constants
from dit_jax.interop.tensors import open_safetensors, write_safetensors
from dit_jax.interop.vae import weights_sha256


def varint(value: int) -> bytes:
    found = b""
    while value > 127:
        found, value = found + bytes([value & 127 | 128]), value >> 7
    return found + bytes([value])


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def constant(name: str, shape, numbers: bytes, kind: int = 1, op: bytes = b"Const") -> bytes:
    """A node of a GraphDef; `numbers` are the fields of TensorProto that hold them."""
    dims = b"".join(field(2, b"\x08" + varint(size)) for size in shape)
    proto = b"\x08" + varint(kind) + field(2, dims) + numbers
    kind_attribute = field(5, field(1, b"dtype") + field(2, b"\x30" + varint(kind)))
    value = field(5, field(1, b"value") + field(2, field(8, proto)))
    return field(1, field(1, name.encode()) + field(2, op) + kind_attribute + value)


def graph(arrays, **extra) -> bytes:
    """The frozen graph of weights in the port's layout, with a few of its other nodes."""
    nodes = [
        field(1, field(1, b"Cast") + field(2, b"Cast") + field(3, b"DecodeJpeg")),
        constant("DecodeJpeg/contents", (), field(8, b"jpeg"), kind=7),
        constant("Sub/y", (), b"\x2d" + struct.pack("<f", 128)),
        constant("ResizeBilinear/size", (2,), field(4, struct.pack("<2i", 299, 299)), kind=3),
    ]
    parts = {
        "conv.weight": "conv2d_params",
        "bn.weight": "batchnorm/gamma",
        "bn.bias": "batchnorm/beta",
        "bn.running_mean": "batchnorm/moving_mean",
        "bn.running_var": "batchnorm/moving_variance",
    }
    found = {"softmax/weights": arrays["fc.weight"].T, "softmax/biases": arrays["fc.bias"]}
    for name, (place, *_) in inception.CONVOLUTIONS.items():
        for ours, theirs in parts.items():
            array = arrays[f"{name}.{ours}"]
            found[f"{place}/{theirs}"] = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array
    nodes += [constant(name, array.shape, field(4, array.tobytes())) for name, array in (found | extra).items()]
    return b"".join(nodes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """port.safetensors and graph.safetensors, from the same numbers."""
    folder = tmp_path_factory.mktemp("inception")
    arrays = metric_networks.inception()
    counts = {"Conv2d_1a_3x3.bn.num_batches_tracked": np.array(0)}
    pt_writer.write(folder / "pt.pth", tensors(arrays | counts))
    (folder / "graph.pb").write_bytes(graph(arrays))
    for layout, name, out in (("inception", "pt.pth", "port"), ("inception_tf", "graph.pb", "graph")):
        formats.write(formats.read(Source(layout, folder / name)), "dit_jax", folder / f"{out}.safetensors")
    (folder / "pt.pth").unlink()
    (folder / "graph.pb").unlink()
    return folder


def test_both_sources_give_the_same_bits(folder):
    """A layer of the graph under another's name, a kernel transposed, a tensor lost or changed on the way."""
    arrays = metric_networks.inception()
    for name in ("port", "graph"):
        found, metadata = open_safetensors(folder / f"{name}.safetensors")
        assert found.keys() == arrays.keys()
        assert all(found[key].load().tobytes() == array.tobytes() for key, array in arrays.items())
        assert '"sha256"' in metadata["origin"]
    hashes = {weights_sha256(inception.load(folder / f"{name}.safetensors")) for name in ("port", "graph")}
    assert len(hashes) == 1


def test_names_of_the_graph():
    """Towers or convolutions counted otherwise than in the graph of 2015, written down from torch-fidelity's table."""
    assert {
        name: inception.CONVOLUTIONS[name][0]
        for name in (
            "Conv2d_3b_1x1",
            "Mixed_5b.branch3x3dbl_3",
            "Mixed_6a.branch3x3",
            "Mixed_6a.branch3x3dbl_2",
            "Mixed_6d.branch1x1",
            "Mixed_6e.branch7x7dbl_5",
            "Mixed_7a.branch3x3_2",
            "Mixed_7a.branch7x7x3_1",
            "Mixed_7b.branch3x3_2b",
            "Mixed_7c.branch3x3dbl_3a",
            "Mixed_7c.branch_pool",
        )
    } == {
        "Conv2d_3b_1x1": "conv_3",
        "Mixed_5b.branch3x3dbl_3": "mixed/tower_1/conv_2",
        "Mixed_6a.branch3x3": "mixed_3/conv",
        "Mixed_6a.branch3x3dbl_2": "mixed_3/tower/conv_1",
        "Mixed_6d.branch1x1": "mixed_6/conv",
        "Mixed_6e.branch7x7dbl_5": "mixed_7/tower_1/conv_4",
        "Mixed_7a.branch3x3_2": "mixed_8/tower/conv_1",
        "Mixed_7a.branch7x7x3_1": "mixed_8/tower_1/conv",
        "Mixed_7b.branch3x3_2b": "mixed_9/tower/mixed/conv_1",
        "Mixed_7c.branch3x3dbl_3a": "mixed_10/tower_1/mixed/conv",
        "Mixed_7c.branch_pool": "mixed_10/tower_2/conv",
    }
    assert len(inception.CONVOLUTIONS) == 94


@pytest.mark.parametrize(
    "changes, text",
    [
        (
            {"fc__bias": None, "Mixed_5b__branch1x1__bn__bias": np.zeros(3, np.float32), "aux": np.zeros(2, np.float32)},
            "3 differences",
        ),
        ({"fc__weight": np.zeros((1000, 2048), np.float32)}, "torchvision's.*--download=inception"),
        ({"Conv2d_1a_3x3__bn__running_var": np.full(32, -1, np.float32)}, "variance cannot be negative"),
        ({"fc__bias": np.full(1008, np.nan, np.float32)}, "NaN"),
        ({"fc__bias": np.zeros(1008, np.float16)}, "same dtype"),
    ],
)
def test_what_the_network_cannot_have(changes, text):
    """Another network's weights, damaged ones, or a tensor passed over."""
    with pytest.raises(UserError, match=f"x.pt.*{text}"):
        inception.from_port(tensors(metric_networks.inception(), **changes), "x.pt")


def test_a_graph_with_more_or_less_is_refused(tmp_path):
    """A constant of the graph that nobody looked at, or zeros for one that is not there."""
    few = graph(
        {name: np.zeros([1] * len(shape), np.float32) for name, shape in inception.LAYOUT.items()},
        **{"aux/weights": np.zeros((2, 2), np.float32)},
    )
    (tmp_path / "x.pb").write_bytes(few)
    with pytest.raises(UserError) as error:
        formats.read(Source("inception_tf", tmp_path / "x.pb"))
    assert "extra aux/weights [2, 2]" in str(error.value)
    assert "misshapen fc.weight: [1, 1] instead of [1008, 2048]" in str(error.value)
    with pytest.raises(UserError, match="is a folder"):
        formats.read(Source("inception_tf", tmp_path))


def test_numbers_are_found_wherever_a_graph_keeps_them(tmp_path):
    """A list of numbers, packed or not, a single one for all, or doubles read as nothing."""
    packed, loose = struct.pack("<2f", 1, 2), b"".join(b"\x2d" + struct.pack("<f", x) for x in (1, 2))
    (tmp_path / "x.pb").write_bytes(
        constant("packed", (2,), field(5, packed))
        + constant("loose", (2, 1), loose)
        + constant("raw", (1, 2), field(4, packed))
        + constant("all", (3,), b"\x2d" + struct.pack("<f", 7))
        + constant("double", (2,), field(6, struct.pack("<2d", 1, 2)), 2)
        + constant("int", (1,), field(7, b"\x01"), kind=3)
        + constant("variable", (2,), field(5, packed), op=b"Variable")
    )
    found = {name: tensor.load().tolist() for name, tensor in read_constants(tmp_path / "x.pb").items()}
    assert found == {"packed": [1, 2], "loose": [[1], [2]], "raw": [[1, 2]], "all": [7, 7, 7], "double": [1, 2]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x1f\x8b\x08\x00nonsense",
        b"<html>moved</html>",
        b"\xff" * 30,
        constant("x", (2,), field(4, b"12345678"))[:-3],
        constant("x", (3,), field(4, b"12345678")),
        constant("x", (1 << 60,), field(4, b"1234")),
        constant("x", (0, 1 << 63), b""),
        field(1, b"\x08" + varint(10**10) + field(2, b"Const")),
        field(1, field(2, b"Const") + field(5, field(1, b"value") + b"\x10" + varint(10**10))),
        constant("x", (2,), b"\x28" + varint(10**10)),
        field(1, b"\x08\x01" * 500_000),
        constant("x", (2**28,), field(4, b"1234")),
    ],
    ids=range(13),
)
def test_damaged_graphs_are_named(content, tmp_path):
    """A stack trace, endless memory or made-up numbers for a file that is cut short, packed or no graph."""
    (tmp_path / "x.pb").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.pb.*unpacked classify_image_graph_def\.pb"):
        read_constants(tmp_path / "x.pb")


def test_a_constant_of_one_number_is_unpacked_when_it_is_read(tmp_path):
    """100 constants that claim 2^24 copies of a number each: 6 GB before their names and shapes are looked at."""
    nodes = (constant(f"{i}", (1 << 24,), field(4, struct.pack("<f", i))) for i in range(100))
    (tmp_path / "x.pb").write_bytes(b"".join(nodes))
    tracemalloc.start()
    found = read_constants(tmp_path / "x.pb")
    assert tracemalloc.get_traced_memory()[1] < 1 << 24
    tracemalloc.stop()
    assert len(found) == 100


def test_wrong_files_are_named(tmp_path):
    """A stack trace from deep inside instead of the path and the remedy."""
    with pytest.raises(UserError, match=r"nowhere.*--download=inception"):
        inception.load(tmp_path / "nowhere")
    (tmp_path / "x.pth").touch()
    with pytest.raises(UserError, match=r"--from=inception --weights=.*x\.pth"):
        inception.load(tmp_path / "x.pth")
    write_safetensors(tmp_path / "x.safetensors", {}, {})
    with pytest.raises(UserError, match="472 differences"):
        inception.load(tmp_path / "x.safetensors")
