"""PyTorch files without PyTorch: what is read, and what is refused."""

import argparse
import pickle
import struct
import tracemalloc
import zipfile
from collections import OrderedDict

import numpy as np
import pytest

from dit_jax.errors import UserError
from dit_jax.interop import pt_reader

CANARY = "canary"


def op_global(module, name):
    return b"c" + f"{module}\n{name}\n".encode()


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value):
    return pickle.dumps(value, 2)[2:-1]


def storage(key="0", size=4, kind="FloatStorage"):
    return b"(" + text("storage") + op_global("torch", kind) + text(key) + text("cpu") + number(size) + b"tQ"


def tensor(shape=(4,), strides=(1,), offset=0, metadata=b"", **of):
    """metadata: a pickled last argument of _rebuild_tensor_v2."""
    return (
        op_global("torch._utils", "_rebuild_tensor_v2")
        + b"("
        + storage(**of)
        + number(offset)
        + number(shape)
        + number(strides)
        + b"\x89}"
        + metadata
        + b"tR"
    )


def write_zip(path, body, data=b"\0" * 16, compression=zipfile.ZIP_STORED):
    """A .pt with one pickle and one storage."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + body + b".")
        archive.writestr("archive/data/0", data)
    return path


def write_legacy(path, body, data=b"\0" * 16):
    start = b"".join(pickle.dumps(value, 2) for value in (pt_reader.LEGACY_MAGIC, 1001, {"little_endian": True}))
    path.write_bytes(start + b"\x80\x02" + body + b"." + pickle.dumps(["0"], 2) + struct.pack("<q", len(data) // 4) + data)
    return path


def leaves(tree):
    if isinstance(tree, dict):
        return {f"{k}.{name}" if name else str(k): leaf for k, value in tree.items() for name, leaf in leaves(value).items()}
    return {"": tree}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_what_torch_saves_is_read_exactly(zipped, tmp_path):
    """A wrong offset, stride, dtype or format, or a training checkpoint's options and optimizer stopping the reader."""
    torch = pytest.importorskip("torch")
    base = torch.arange(24.0).reshape(4, 6)
    state = {
        "whole": base,
        "transposed": base.T,
        "inner": base[1:3, 2:5],
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "half": torch.randn(5).half(),
        "brain": torch.randn(5).bfloat16(),
        "double": torch.randn(2).double(),
        "long": torch.arange(3),
        "bool": torch.tensor([True, False]),
    }
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    optimizer.param_groups[0]["params"][0].grad = torch.ones(2)
    optimizer.step()
    module = torch.nn.Linear(2, 3)
    saved = {
        "ema": state,
        "model": module.state_dict(),
        "opt": optimizer.state_dict(),
        "args": argparse.Namespace(model="DiT-XL/2", lr=1e-4),
        "order": OrderedDict(a=1),
    }
    torch.save(saved, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    assert pt_reader.is_pt(tmp_path / "x.pt")
    found = pt_reader.read(tmp_path / "x.pt")
    assert found["order"] == {"a": 1}
    assert found["opt"]["param_groups"][0]["betas"] == (0.9, 0.999)
    for name, expected in leaves({"ema": state, "model": saved["model"]}).items():
        actual = leaves({"ema": found["ema"], "model": found["model"]})[name]
        array = expected.detach()
        array = array.float().numpy() if expected.dtype == torch.bfloat16 else array.numpy()
        assert actual.shape == tuple(expected.shape)
        assert actual.dtype.name == str(expected.dtype).removeprefix("torch.")
        np.testing.assert_array_equal(actual.load().astype(array.dtype), array, err_msg=name)


CALL = text(f"touch {CANARY}") + b"\x85R"  # a tuple of one argument, then the call
PAYLOADS = {
    "system": op_global("posix", "system") + CALL,
    "eval": op_global("builtins", "eval") + text(f"open('{CANARY}', 'w')") + b"\x85R",
    "stack_global": text("os") + text("system") + b"\x93" + CALL,
    "inst": b"(" + text(f"touch {CANARY}") + b"iposix\nsystem\n",
    "obj": b"(" + op_global("posix", "system") + text(f"touch {CANARY}") + b"o",
    "getattr": op_global("builtins", "getattr") + op_global("collections", "OrderedDict") + text("mro") + b"\x86R",
    "dotted": text("collections") + text("OrderedDict.__init__.__globals__") + b"\x93",
    "torch_load": op_global("torch", "load") + text("other.pt") + b"\x85R",
    "numpy": op_global("numpy.core.multiarray", "_reconstruct") + b"(tR",
    "extension": b"\x82\x01",
}


@pytest.mark.parametrize("write", [write_zip, write_legacy])
@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_payload_is_refused_and_nothing_runs(payload, write, tmp_path, monkeypatch):
    """Any way to call a function that is not one of the reader's own."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="which is refused"):
        pt_reader.read(write(tmp_path / "x.pt", PAYLOADS[payload]))
    assert not (tmp_path / CANARY).exists()


@pytest.mark.parametrize(
    "target",
    [op_global("torch._utils", "_rebuild_tensor_v2"), op_global("torch", "FloatStorage"), storage(), tensor()],
    ids=["function", "storage type", "storage", "tensor"],
)
def test_a_pickle_cannot_change_what_it_was_handed(target, tmp_path):
    """BUILD setting attributes: the shape of a checked tensor, the defaults of a function, a NumPy dtype."""
    state = b"}" + text("shape") + number((10**12,)) + b"s"
    for body in (target + state + b"b", target + b"N" + state + b"\x86b"):
        with pytest.raises(UserError, match=r"x\.pt"):
            pt_reader.read(write_zip(tmp_path / "x.pt", body))
    found = pt_reader.read(write_zip(tmp_path / "x.pt", tensor()))
    assert found.load().tolist() == [0, 0, 0, 0]


BAD_TENSORS = {
    "huge": tensor(shape=(10**12,)),
    "huge by repetition": tensor(shape=(10**12,), strides=(0,)),
    "past the end": tensor(offset=1),
    "long stride": tensor(shape=(2,), strides=(4,)),
    "negative stride": tensor(strides=(-1,)),
    "negative size": tensor(shape=(-1,)),
    "negative offset": tensor(offset=-4),
    "ranks": tensor(shape=(2, 2), strides=(2,)),
    "storage too large": tensor(size=10**12, shape=(10**12,)),
    "storage too small": tensor(size=2, shape=(2,)),
    "other dtype": tensor(kind="DoubleStorage"),
    "absent": tensor(key="1"),
    "memo": b"}r\0\0\0\x02",
    "many dimensions": tensor(shape=(1,) * 100, strides=(1,) * 100),
    "endless size": tensor(shape=(2**80,)),
    "far offset": tensor(offset=2**40),
    "2^40 parts": b")q\0" + b"".join(b"h%ch%c\x86q%c0" % (i, i, i + 1) for i in range(40)) + b"h\x28",
    "2^40 parts as a storage": b")q\0" + b"".join(b"h%ch%c\x86q%c0" % (i, i, i + 1) for i in range(40)) + b"h\x28Q",
    "2^40 parts as a key": b"}" + b")q\0" + b"".join(b"h%ch%c\x86q%c0" % (i, i, i + 1) for i in range(40)) + b"h\x28Ns",
    "a key 10^6 deep": b"})" + b"\x85" * 10**6 + b"Ns",
    "an offset in 2^30 parts": op_global("torch._utils", "_rebuild_tensor_v2")
    + b"("
    + storage()
    + b"]q\0"
    + b"".join(b"]q%c" % (i + 1) for i in range(30))
    + b"".join(b"h%c(h%ch%ce0" % (i + 1, i, i) for i in reversed(range(30)))
    + b"2h\x1e"
    + number((1,))
    + number((1,))
    + b"\x89}tR",
    "conjugated": tensor(metadata=number({"conj": True})),
    "negated truths": tensor(size=16, kind="BoolStorage", metadata=number({"neg": True})),
    "unknown metadata": tensor(metadata=number({"neg": True, "scale": 2})),
    "text length": b"X\xff\xff\xff\x7f",
    "no storage": op_global("torch._utils", "_rebuild_tensor_v2")
    + b"("
    + number("x")
    + number(0)
    + number((1,))
    + number((1,))
    + b"\x89}tR",
}


@pytest.mark.parametrize("write", [write_zip, write_legacy])
@pytest.mark.parametrize("bad", BAD_TENSORS)
def test_a_tensor_that_does_not_fit_is_refused_before_allocation(bad, write, tmp_path):
    """A crafted shape reading outside its storage, or exhausting memory."""
    path = write(tmp_path / "x.pt", BAD_TENSORS[bad])
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"x\.pt"):
            pt_reader.read(path)
        assert tracemalloc.get_traced_memory()[1] < 4e6
    finally:
        tracemalloc.stop()


def test_a_compressed_member_is_refused(tmp_path):
    """A zip bomb."""
    path = write_zip(tmp_path / "x.pt", tensor(size=10**7, shape=(10**7,)), b"\0" * 4 * 10**7, zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="which PyTorch never does"):
        pt_reader.read(path)


def test_a_compressed_byteorder_is_refused(tmp_path):
    """A zip bomb in the one member that is read before the pickle."""
    path = write_zip(tmp_path / "x.pt", tensor())
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/byteorder", b"\0" * 10**7)
    with pytest.raises(UserError, match="which PyTorch never does"):
        pt_reader.read(path)


@pytest.mark.parametrize("write", [write_zip, write_legacy])
@pytest.mark.parametrize(("kind", "dtype"), [("FloatStorage", np.float32), ("IntStorage", np.int32)])
def test_a_lazily_negated_tensor_has_its_own_sign(kind, dtype, write, tmp_path):
    """The negative bit of a tensor dropped: every value with the wrong sign."""
    stored = np.array([1, -2, 3, 0], dtype)
    path = write(tmp_path / "x.pt", tensor(kind=kind, metadata=number({"neg": True})), stored.tobytes())
    found = pt_reader.read(path).load()
    assert found.dtype == dtype
    assert found.tolist() == [-1, 2, -3, 0]
    path = write(tmp_path / "y.pt", tensor(kind=kind, metadata=number({"neg": False})), stored.tobytes())
    assert pt_reader.read(path).load().tolist() == [1, -2, 3, 0]


def test_what_torch_negates_lazily_is_read_exactly(tmp_path):
    """Another place of the negative bit in the file than the one read here."""
    torch = pytest.importorskip("torch")
    lazy = torch._neg_view(torch.arange(4.0))
    assert lazy.is_neg()
    torch.save({"w": lazy, "z": torch.zeros(1, dtype=torch.float32)}, tmp_path / "x.pt")
    assert pt_reader.read(tmp_path / "x.pt")["w"].load().tolist() == [0, -1, -2, -3]


def test_the_stride_of_a_single_row_does_not_matter(tmp_path):
    """NumPy's own error for a stride that no step ever takes."""
    found = pt_reader.read(write_zip(tmp_path / "x.pt", tensor(shape=(1, 4), strides=(2**61, 1))))
    assert found.load().shape == (1, 4)


@pytest.mark.parametrize("write", [write_zip, write_legacy])
def test_a_truncated_file_is_refused_wherever_it_ends(write, tmp_path):
    """A partial download read as if it were whole."""
    path = write(tmp_path / "x.pt", tensor())
    whole = path.read_bytes()
    assert pt_reader.read(path).load().shape == (4,)
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"x\.pt"):
            pt_reader.read(path).load()


def test_a_flipped_bit_is_found_when_the_tensor_is_read(tmp_path):
    """The archive's checksum ignored."""
    path = write_zip(tmp_path / "x.pt", tensor(), np.arange(4, dtype=np.float32).tobytes())
    content = bytearray(path.read_bytes())
    content[content.index(np.arange(4, dtype=np.float32).tobytes())] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        pt_reader.read(path).load()


def test_the_callbacks_of_a_lightning_checkpoint(tmp_path):
    """The checkpoints of latent diffusion, which have a class as a key; a class that a file can call or change."""
    key = op_global("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint")
    body = (
        b"}("
        + text("callbacks")
        + b"}"
        + key
        + text("best.ckpt")
        + b"s"
        + text("state_dict")
        + b"}"
        + text("w")
        + tensor()
        + b"su"
    )
    stored = pt_reader.read(write_zip(tmp_path / "model.ckpt", body))
    assert stored["callbacks"] == {"ModelCheckpoint": "best.ckpt"} and stored["state_dict"]["w"].shape == (4,)
    for use in (b")R", b"}" + text("x") + text("y") + b"sb"):  # a call, and a change of its attributes
        with pytest.raises(UserError, match="not a complete PyTorch file"):
            pt_reader.read(write_zip(tmp_path / "bad.ckpt", key + use))
