"""Every reader of files that others wrote, on damaged files: a UserError or a value, in bounded time and memory."""

import io
import json
import pickle
import resource
import struct
import tarfile
import time
import zipfile

import numpy as np
import pytest
from PIL import Image

from dit_jax.data import latents
from dit_jax.data.latent_files import SUFFIXES
from dit_jax.data.sources.tars import TarShards
from dit_jax.data.sources.tfds import check_features_file
from dit_jax.data.transforms import decode
from dit_jax.errors import UserError
from dit_jax.evaluate import images, reference, table
from dit_jax.interop import graph_def, pt_reader, pt_writer, tensors, vae, weights
from dit_jax.sample import samples_file
from dit_jax.storage import run_folder
from dit_jax.storage.sealed import digest, write_sealed

MUTATIONS, MANY = 15, 1_000  # of each kind of file: in the default suite, and when exhaustive
SECONDS, MEBIBYTES = 10, 500  # of one file


def held(array):
    return tensors.Tensor(array.shape, array.dtype, lambda: array)


def small_pt(path):
    pt_writer.write(path, {name: held(np.arange(6, dtype=np.float32).reshape(2, 3)) for name in ("a.weight", "b.weight")})


def old_pt(path):
    header = b"".join(pickle.dumps(value, 2) for value in (pt_reader.LEGACY_MAGIC, 1001, {"little_endian": True}))
    stored = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x04tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + stored + b"K\0K\x04\x85K\x01\x85\x89}tR"
    body = b"\x80\x02}X\x01\0\0\0a" + tensor + b"s."
    path.write_bytes(header + body + pickle.dumps(["0"], 2) + struct.pack("<q", 4) + bytes(16))


def safetensors(path):
    config = {name: {"name": "x"} for name in ("task", "codec", "transform")}
    metadata = {"dit_jax": "1", "config": json.dumps(config), "origin": "{}"}
    tensors.write_safetensors(path, {"a/kernel": held(np.ones((2, 3), np.float32))}, metadata)


def graph(path):
    def field(number, content):
        return bytes([number << 3 | 2, len(content)]) + content

    proto = b"\x08\x01" + field(2, field(2, b"\x08\x02")) + field(4, bytes(8))
    node = field(1, b"x") + field(2, b"Const") + field(5, field(1, b"value") + field(2, field(8, proto)))
    path.write_bytes(field(1, node) * 2)


def npz_of_images(save):
    def write(path):
        values = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 1), np.uint8)
        save(path, arr_0=values, labels=np.arange(3, dtype=np.int32), made_by=np.array('{"step": 3}'))

    return write


def statistics(path):
    arrays = {"mu": np.arange(3.0), "sigma": np.eye(3), "features": np.ones((4, 3), np.float32)}
    recipe = json.dumps(
        {"source": "x", "count": 4, "image_shape": [1, 1, 3], "images_sha256": "", "extractor": {"name": "pixels"}}
    )
    seal = reference._sha256(arrays, recipe)
    np.savez(path, **arrays, recipe=np.array(recipe), seal=np.array(seal), format=np.array(1))


def tar(form):
    def write(path):
        with tarfile.open(path, "w", format=form) as file:
            long = f"{'a' * 90}/{'a' * 60}"
            members = {f"{long}.jpg": b"image", "b.jpg": b"image", "b.cls": b"1", f"{long}.json": b'{"label": 0}'}
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))

    return write


def manifest(path):
    """Of a cache; its seal is renewed after each change, as an attacker would."""
    file = {"name": "settings.json", "bytes": 1, "sha256": ""}
    files = {kind: {**file, "name": f"00000-of-00001{SUFFIXES[kind]}"} for kind in ("moments", "labels", "index")}
    content = {"format": 1, "count": 1, "views": 1, "num_classes": 0, "class_names": [], "moments": {"shape": [1, 1, 8]}}
    content |= {"codec": {}, "transform": {}, "settings": file, "shards": [{"count": 1, "files": files}]}
    path.write_text(json.dumps({**content, "seal": digest(content)}))


def read_manifest(path):
    try:
        content = json.loads(path.read_text(errors="replace"))
        content.pop("seal", None)
        write_sealed(path.with_name("manifest.json"), content)
    except (ValueError, AttributeError):  # no object
        path.with_name("manifest.json").write_bytes(path.read_bytes())
    latents.read_manifest(path.parent)


def text(content):
    return lambda path: path.write_text(json.dumps(content))


def index_of_parts(path):
    safetensors(path.with_name("x.safetensors"))
    text({"weight_map": {"a/kernel": "x.safetensors"}})(path)


def picture(kind):
    return lambda path: Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)).save(path, kind)


def read_pt(path):
    found = pt_reader.read(path)
    for value in found.values() if isinstance(found, dict) else ():
        if isinstance(value, tensors.Tensor):
            value.load()


def read_weights(path):
    for tensor in weights.read(path).tensors.values():
        tensor.load()


def read_images(path):
    found = images.NpzImages(path)
    for batch in found.batches(0, len(found), 2):
        assert batch.dtype == np.uint8
    samples_file.made_by_of(path)


def read_tar(path):
    source = TarShards(str(path), cache_index=False)
    for i in range(len(source)):
        assert len(source[i]["image"]) <= path.stat().st_size


CONFIG = {name: {"name": "x"} for name in ("task", "model", "codec", "process", "transform")}
FEATURES = {
    "pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
    "featuresDict": {"features": {"image": {"pythonClassName": "tensorflow_datasets.core.features.image_feature.Image"}}},
}
VAE = {"_class_name": "AutoencoderKL", "block_out_channels": [32, 32], "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
VAE |= {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
RESULT = {"fid": 1.0, "samples_sha256": "a"}
KINDS = {
    "pt": ("x.pt", small_pt, read_pt),
    "old pt": ("x.pt", old_pt, read_pt),
    "safetensors": ("x.safetensors", safetensors, read_weights),
    "graph": ("x.pb", graph, lambda path: [tensor.load() for tensor in graph_def.read_constants(path).values()]),
    "npz": ("x.npz", npz_of_images(np.savez), read_images),
    "packed npz": ("x.npz", npz_of_images(np.savez_compressed), read_images),
    "statistics": ("x.npz", statistics, reference.read),
    "tar": ("x.tar", tar(tarfile.USTAR_FORMAT), read_tar),
    "gnu tar": ("x.tar", tar(tarfile.GNU_FORMAT), read_tar),
    "pax tar": ("x.tar", tar(tarfile.PAX_FORMAT), read_tar),
    "cache": ("sealed.json", manifest, read_manifest),
    "config": ("config.json", text(CONFIG), lambda path: run_folder.read_config(path.parent)),
    "vae": ("config.json", text(VAE), lambda path: vae.read_codec(path.parent)),
    "features": ("features.json", text(FEATURES), check_features_file),
    "index": ("x.index.json", index_of_parts, tensors.open_sharded),
    "result": ("x.json", text(RESULT), lambda path: table.read_result(str(path))),
    **{
        kind: (f"x.{kind}", picture(kind), lambda path: decode(path.read_bytes(), 3, "x"))
        for kind in ("png", "jpeg", "gif", "bmp", "tiff", "webp", "ppm")
    },
}


def damaged(data: bytes, rng) -> bytes:
    """A bit flipped, bytes replaced, a number made large, a part removed or repeated, or the end cut off."""
    data, place = bytearray(data), int(rng.integers(len(data)))
    length = int(rng.integers(1, 9))
    match rng.integers(6):
        case 0:
            data[place] ^= 1 << int(rng.integers(8))
        case 1:
            data[place : place + length] = rng.bytes(length)
        case 2:
            data[place : place + length] = rng.choice([b"\xff", b"\0", b"9", b"["]) * length
        case 3:
            del data[place : place + length]
        case 4:
            data[place:place] = data[place : place + 20 * length]
        case 5:
            del data[place:]
    return bytes(data)


def check(kind, folder, seed):
    name, make, read = KINDS[kind]
    file = folder / name
    make(file)
    read(file)
    good, rng = file.read_bytes(), np.random.default_rng(seed)
    for _ in range(MANY if seed else MUTATIONS):
        bad = damaged(good, rng)
        file.write_bytes(bad)
        start = time.monotonic()
        try:
            read(file)
        except UserError as error:
            assert len(str(error)) < 4_000
        except Exception as error:
            error.add_note(f"{kind}: {bad!r}")
            raise
        assert time.monotonic() - start < SECONDS


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_ends_in_one_line_or_a_value(kind, tmp_path):
    """A stack trace, endless work or all memory for a file that is not what it should be."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    check(kind, tmp_path, seed=0)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEBIBYTES << 10


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_many_damaged_files(kind, seed, tmp_path):
    """As above, a rarer one."""
    check(kind, tmp_path, seed)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_a_damaged_index_of_a_tar_is_built_again(seed, tmp_path):
    """Bytes of another place, or a stack trace, because the index next to a tar was damaged or made by somebody else."""
    tar(tarfile.PAX_FORMAT)(tmp_path / "x.tar")
    TarShards(str(tmp_path / "x.tar"))
    (kept,) = tmp_path.glob("*.npz")
    with np.load(kept) as file:
        arrays = dict(file)
    rng = np.random.default_rng(seed)
    for _ in range(300 if seed else MUTATIONS):
        name = str(rng.choice(sorted(arrays)))
        changed = np.frombuffer(damaged(arrays[name].tobytes(), rng), np.uint8)
        whole = len(changed) // arrays[name].itemsize * arrays[name].itemsize
        np.savez(kept, **arrays | {name: changed[:whole].view(arrays[name].dtype)})
        try:
            source = TarShards(str(tmp_path / "x.tar"))
            found = [source[i] for i in range(len(source))]
        except UserError:
            continue
        assert all(len(example["image"]) < 20_000 for example in found)


def test_a_zip_of_nothing_else(tmp_path):
    """A zip with a good directory and members of another kind, given as each kind of zip that is read."""
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("../../arr_0.npy", b"x")
        archive.writestr("arr_0.npy", b"x")
    for read in (images.NpzImages, reference.read, pt_reader.read):
        with pytest.raises(UserError):
            read(tmp_path / "x.npz")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.npz"]
