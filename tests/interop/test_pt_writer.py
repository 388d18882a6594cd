"""A .pt written without PyTorch."""

import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
from dit_files import held

from dit_jax.interop import pt_reader, pt_writer

ARRAYS = {
    "matrix.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "transposed": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    "scalar": np.array(2.5, np.float16),
    "empty": np.zeros((0, 3), np.float32),
    "brain": np.arange(300).astype(jnp.bfloat16),
    "table": np.ones((1, 70000), np.float32),
}


@pytest.fixture
def path(tmp_path):
    pt_writer.write(tmp_path / "x.pt", {name: held(array) for name, array in ARRAYS.items()})
    return tmp_path / "x.pt"


@pytest.mark.parametrize("mapped", [False, True])
def test_torch_loads_it_with_weights_only(mapped, path):
    """An opcode, name or member that PyTorch's own restricted loader refuses, or numbers in another order."""
    torch = pytest.importorskip("torch")
    found = torch.load(path, weights_only=True, mmap=mapped)
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert str(found[name].dtype) == f"torch.{array.dtype.name}"
        np.testing.assert_array_equal(found[name].float().numpy(), array.astype(np.float32))


def test_our_reader_loads_it(path):
    """Writer and reader disagreeing about a shape, a stride or a dtype."""
    found = pt_reader.read(path)
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name].load(), array)


def test_numbers_start_at_multiples_of_64(path):
    """Tensors that a memory map would hand out unaligned."""
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            archive.fp.seek(member.header_offset + 26)
            name, extra = (int.from_bytes(archive.fp.read(2), "little") for _ in range(2))
            assert (member.header_offset + 30 + name + extra) % 64 == 0


def test_a_failure_leaves_the_old_file_and_no_other(path):
    """A half-written file in place of a good one, or beside it."""

    def fail():
        raise OSError("gone")

    before = path.read_bytes()
    with pytest.raises(OSError, match="gone"):
        pt_writer.write(path, {"x": held(np.ones(3, np.float32))._replace(load=fail)})
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["x.pt"]
