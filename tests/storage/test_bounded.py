"""JSON and NumPy files that anybody may have written."""

import json
import tracemalloc
import zipfile

import numpy as np
import pytest

from dit_jax.data import latents
from dit_jax.errors import UserError
from dit_jax.evaluate import images, reference, table
from dit_jax.interop import diffusers_dit, tensors, vae, weights
from dit_jax.sample import samples_file
from dit_jax.storage import bounded, run_folder
from dit_jax.storage.sealed import read_sealed, write_sealed

BAD_JSON = {
    "list": "[]",
    "null": "null",
    "number": "7",
    "empty": "",
    "deep": "[" * 100_000,
    "deep object": '{"a":' * 100_000,
    "cut": '{"task": {"name"',
    "no keys": "{}",
    "wrong kinds": json.dumps({"task": [], "model": 3, "weight_map": [1], "samples_sha256": 1, "format": "x", "_class_name": []}),
    "not text": "\udc80\udcff",
}


def write(path, text):
    path.write_bytes(text.encode(errors="surrogateescape"))
    return path


READERS = {
    "run": ("config.json", lambda path: run_folder.read_config(path.parent)),
    "index": ("x.safetensors.index.json", tensors.open_sharded),
    "vae": ("config.json", lambda path: vae.read_codec(path.parent)),
    "diffusers": ("config.json", lambda path: diffusers_dit.read_config(path.parent / "x.safetensors")),
    "result": ("x.json", lambda path: table.read_result(str(path))),
    "sealed": ("x.json", read_sealed),
    "cache": ("manifest.json", lambda path: latents.read_manifest(path.parent)),
}


@pytest.mark.parametrize("bad", BAD_JSON)
@pytest.mark.parametrize("reader", READERS)
def test_other_json_than_expected_is_one_line(reader, bad, tmp_path):
    """A stack trace for a list, null, a missing field or deep nesting, wherever JSON of others is read."""
    name, read = READERS[reader]
    if (reader, bad) == ("vae", "no keys"):
        pytest.skip("every field has a default")
    with pytest.raises(UserError, match=name) as caught:
        read(write(tmp_path / name, BAD_JSON[bad]))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("bad", BAD_JSON)
def test_other_json_in_the_header_of_weights_is_one_line(bad, tmp_path):
    """A stack trace for a weights file whose header holds something else."""
    text = BAD_JSON[bad] if bad != "not text" else "\x00"
    for config, origin in ((text, "{}"), (json.dumps(CONFIG), text)):
        if (origin, bad) in ((text, "no keys"), (text, "wrong kinds")):
            continue  # any object is an origin
        file = tmp_path / "x.safetensors"
        tensors.write_safetensors(file, {}, {"dit_jax": "1", "config": config, "origin": origin})
        with pytest.raises(UserError, match="header of") as caught:
            weights.read(file)
        assert "\n" not in str(caught.value)


CONFIG = {name: {"name": "x"} for name in ("task", "codec", "transform")}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"task": {"name": "diffusion"}}, "has no model"),
        ({"codec": None}, "codec is None, not an object"),
        ({"transform": {}}, "has no transform.name"),
        ({"sampler": {"name": ["ddim"]}}, "sampler.name is"),
        ({"imports": [{"name": "x.py"}]}, r"has no imports\[0\].sha256"),
        ({"imports": 3}, "imports is 3, not a list"),
    ],
)
def test_a_config_without_its_sections_is_named(change, says, tmp_path):
    """An AttributeError of the first place that looks at a section."""
    write(tmp_path / "config.json", json.dumps(CONFIG))
    run_folder.read_config(tmp_path)
    write(tmp_path / "config.json", json.dumps(CONFIG | change))
    with pytest.raises(UserError, match=says):
        run_folder.read_config(tmp_path)


def test_long_json_is_refused_before_it_is_parsed(tmp_path, monkeypatch):
    """Gigabytes of parsed lists."""
    monkeypatch.setattr(bounded, "MAX_JSON_BYTES", 1000)
    bounded.read_json(write(tmp_path / "x.json", '{"a": ' + " " * 900 + "1}"))
    with pytest.raises(UserError, match="more than 1,000"):
        bounded.read_json(write(tmp_path / "x.json", '{"a": ' + " " * 1900 + "1}"))


MANIFEST_PLACES = ("count", "views", "num_classes", "class_names", "moments", "codec", "transform", "settings", "shards")


@pytest.mark.parametrize("place", MANIFEST_PLACES)
@pytest.mark.parametrize("value", [None, [], {}, -1, [{"count": 1, "files": {}}], 2**70])
def test_a_sealed_manifest_of_other_content_is_refused(place, value, tmp_path):
    """Somebody's manifest with a right seal, and a KeyError or a negative size inside of the reader."""
    file = {"name": "settings.json", "bytes": 1, "sha256": ""}
    manifest = {"format": 1, "count": 1, "views": 1, "num_classes": 0, "class_names": [], "moments": {"shape": [1, 1, 8]}}
    manifest |= {"codec": {}, "transform": {}, "settings": file}
    manifest["shards"] = [
        {
            "count": 1,
            "files": {
                kind: {**file, "name": f"00000-of-00001{latents.SUFFIXES[kind]}"} for kind in ("moments", "labels", "index")
            },
        }
    ]
    write_sealed(tmp_path / "manifest.json", manifest)
    latents.read_manifest(tmp_path)
    if manifest[place] == value or (place == "num_classes" and value == -1):
        return
    write_sealed(tmp_path / "manifest.json", manifest | {place: value})
    try:
        found = latents.read_manifest(tmp_path)
    except UserError as error:
        assert "manifest.json" in str(error)
    else:
        assert (place, value) in (("codec", {}), ("transform", {}), ("class_names", []), ("num_classes", 2**70)), found


def packed(path, name="mu", shape=(2**22,), data=None):
    """An npz whose array unpacks to 32 MB, from a hundredth of it; or one with other data."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive, archive.open(f"{name}.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": shape})
        for _ in range(4 if data is None else 0):
            file.write(bytes(2**23))
        file.write(data or b"")
    return path


def npz_with_text(path, **texts):
    np.savez(path, arr_0=np.zeros((2, 4, 4, 1), np.uint8), **{name: np.array(text) for name, text in texts.items()})
    return path


def test_an_npz_that_unpacks_to_much_more_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    """4 MB of file that take 4 GB of memory."""
    monkeypatch.setattr(bounded, "MAX_UNPACKED_BYTES", 1 << 24)
    bomb = {name: packed(tmp_path / f"{name}.npz", name) for name in ("mu", "made_by")}
    assert bomb["mu"].stat().st_size < 1e6
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="more than the 16,777,216 that"):
            reference.read(bomb["mu"])
        assert samples_file.made_by_of(bomb["made_by"]) is None
        assert tracemalloc.get_traced_memory()[1] < 1e7
    finally:
        tracemalloc.stop()


def test_images_that_unpack_to_a_thousand_times_their_size_are_refused(tmp_path, monkeypatch):
    """Gigabytes of black images in a few megabytes, unpacked and scored."""
    np.savez_compressed(tmp_path / "x.npz", np.zeros((64, 256, 256, 1), np.uint8))
    assert len(images.NpzImages(tmp_path / "x.npz")) == 64  # small, whatever its ratio
    monkeypatch.setattr(images, "MAX_UNPACKED_BYTES", 1 << 20)
    with pytest.raises(UserError, match="arr_0 unpacks from"):
        images.NpzImages(tmp_path / "x.npz")


@pytest.mark.parametrize(
    "make",
    [
        lambda path: packed(path, shape=(2**40,), data=bytes(80)),
        lambda path: packed(path, shape=(4,), data=bytes(80)),
        lambda path: path.write_bytes(b"PK\x03\x04"),
        lambda path: path.write_bytes(b""),
        lambda path: np.savez(path, mu=np.array([{}], object)),
        lambda path: np.savez(path, mu=np.eye(3), sigma=np.eye(3)),
    ],
    ids=["long shape", "short shape", "cut", "empty", "pickle", "matrix"],
)
def test_a_damaged_npz_is_one_line(make, tmp_path):
    """A trace of NumPy or zipfile, a pickle, or an array of the size that its header claims."""
    make(tmp_path / "x.npz")
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"x\.npz"):
            reference.read(tmp_path / "x.npz")
        assert tracemalloc.get_traced_memory()[1] < 1e7
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("bad", ["list", "null", "deep", "cut"])
def test_other_json_in_an_npz_is_one_line(bad, tmp_path):
    """A stack trace for the settings in a file of samples."""
    path = npz_with_text(tmp_path / "x.npz", made_by=BAD_JSON[bad])
    with pytest.raises(UserError, match=r"x\.npz"):
        images.NpzImages(path)
    assert samples_file.made_by_of(path) is None


@pytest.mark.parametrize("text", ["[]", "{}", '{"source": 3}', "[" * 100_000])
def test_a_recipe_of_other_content_is_one_line(text, tmp_path):
    """Statistics with a right seal whose recipe is something else."""
    arrays = {"mu": np.zeros(3), "sigma": np.eye(3)}
    seal = reference._sha256(arrays, text)
    np.savez(tmp_path / "x.npz", recipe=np.array(text), seal=np.array(seal), format=np.array(1), **arrays)
    with pytest.raises(UserError, match=r"recipe in .*x\.npz"):
        reference.read(tmp_path / "x.npz")
