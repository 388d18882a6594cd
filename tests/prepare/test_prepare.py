"""Prepared data sets: what TFDS and our source read back, the same bytes after an interruption, and what is refused."""

import hashlib
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from kill_points import SHARES, check_every_kill
from PIL import Image
from tar_files import encoded, write_ilsvrc_train, write_ilsvrc_validation, write_tar
from verbs import ROOT, refused, run_verbs

from dit_jax.data.sources import TFDS
from dit_jax.data.transforms import center_crop, decode
from dit_jax.errors import UserError
from dit_jax.prepare import array_records, datasets
from dit_jax.prepare.datasets import Request, prepare
from dit_jax.storage.claim import claim

CLASSES = ("ant", "bee", "cat")


@pytest.fixture
def photos(tmp_path):
    """20 images of each of three classes, each its own bytes."""
    for label, name in enumerate(CLASSES):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(20):
            (tmp_path / "photos" / name / f"{i}.jpg").write_bytes(encoded(100 * label + i, "JPEG", (70, 60)))
    return tmp_path / "photos"


def request(tmp_path, out="out", **more):
    return Request(tmp_path / out, "shots", **{"shard_bytes": 40_000, **more})


def files_of(folder: Path) -> dict:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in (folder / "shots" / "1.0.0").iterdir()}


def read(out, split="train", **more):
    source = TFDS("shots", str(out), split, **more)
    return [source[i] for i in range(len(source))]


def test_bytes_labels_and_names(photos, tmp_path):
    """An image re-encoded, a label of another image, shards sorted by class, or counts that do not add up."""
    result = prepare(request(tmp_path), {"train": str(photos)})
    examples = read(tmp_path / "out")
    assert sorted((e["image"], e["label"]) for e in examples) == sorted(
        (file.read_bytes(), CLASSES.index(file.parent.name)) for file in photos.rglob("*.jpg")
    )
    assert TFDS("shots", str(tmp_path / "out"), "train").class_names == CLASSES
    shards = sorted((tmp_path / "out").rglob("*.array_record*"))
    assert result["splits"]["train"] == {"records": 60, "shards": len(shards), "bytes": sum(s.stat().st_size for s in shards)}
    assert len(shards) > 2 and all({e["label"] for e in examples[i : i + 10]} == {0, 1, 2} for i in range(0, 60, 10))
    assert (result["classes"], result["bad_records"]) == (3, [])


def test_plain_tfds_reads_it(photos, tmp_path):
    """A data set that only our own source can read."""
    import tensorflow_datasets as tfds

    prepare(request(tmp_path), {"train": str(photos)})
    records = tfds.data_source("shots", data_dir=tmp_path / "out", split="train")
    assert len(records) == 60 and records[0]["image"].shape == (60, 70, 3) and 0 <= records[0]["label"] < 3
    assert "tensorflow" not in sys.modules
    assert len(tfds.data_source("shots", data_dir=tmp_path / "out", split="train[:50%]")) == 30


def test_records_are_what_tfds_writes():
    """A tf.train.Example that TFDS's own parser reads otherwise, for one-byte and long lengths and labels."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.proto import tf_example_pb2

    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "caption": tfds.features.Text(),
            "label": tfds.features.ClassLabel(num_classes=70000),
        }
    )
    for size, label in ((0, 0), (127, 127), (128, 128), (70000, 69999)):
        record = {"image": bytes(size), "label": label, "caption": "snö"}
        theirs = tf_example_pb2.Example.FromString(features.serialize_example(record))
        ours = array_records.tf_example({**record, "caption": record["caption"].encode()})
        assert ours == theirs.SerializeToString(deterministic=True)


def test_the_same_command_gives_the_same_bytes(photos, tmp_path):
    """A record order, a field order or a time stamp that differs between runs or numbers of threads."""
    prepare(request(tmp_path), {"train": str(photos)})
    prepare(request(tmp_path, "again", num_threads=1), {"train": str(photos)})
    prepare(request(tmp_path, "other", seed=1), {"train": str(photos)})
    first, again, other = (files_of(tmp_path / name) for name in ("out", "again", "other"))
    assert first == again
    assert not any(other[name] == digest for name, digest in first.items() if "array_record" in name)
    assert sorted(e["image"] for e in read(tmp_path / "other")) == sorted(e["image"] for e in read(tmp_path / "out"))


@pytest.mark.parametrize("at", ["record", "rename", "metadata", "done"])
def test_interrupted_and_continued(at, photos, tmp_path, monkeypatch):
    """A shard lost, doubled or other after an interruption in a record, between file and name, or before the metadata."""
    prepare(request(tmp_path), {"train": str(photos)})
    expected = files_of(tmp_path / "out")
    calls = itertools.count()

    def failing(real, when):
        def call(*args, **kwargs):
            if next(calls) == when:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if at == "record":
            patch.setattr(datasets, "_record", failing(datasets._record, 60 + 35))  # the first 60 measure the size
        elif at == "rename":
            patch.setattr(os, "replace", failing(os.replace, 4))  # the second shard's, after its plan
        elif at == "metadata":
            patch.setattr(datasets, "write_metadata", failing(datasets.write_metadata, 0))
        else:
            patch.setattr(datasets, "_verified", failing(datasets._verified, 0))
        prepare(request(tmp_path, "cut"), {"train": str(photos)})
    found = files_of(tmp_path / "cut")
    if at in ("record", "rename"):
        assert 0 < sum("array_record" in name for name in found) < sum("array_record" in name for name in expected)
    assert found != expected or at == "done"
    written = {file: file.stat().st_mtime_ns for file in (tmp_path / "cut").rglob("*0-of-*")}
    result = prepare(request(tmp_path, "cut"), {"train": str(photos)})
    assert files_of(tmp_path / "cut") == expected and result["splits"]["train"]["records"] == 60
    assert all(file.stat().st_mtime_ns == when for file, when in written.items())  # finished shards are kept


@pytest.mark.parametrize("share", SHARES)
def test_killed_before_any_file_operation(tmp_path, share):
    """A plan that no later start accepts, metadata of half a data set, a partial file or folder that stays."""
    (tmp_path / "photos" / "ant").mkdir(parents=True)
    for i in range(4):
        (tmp_path / "photos" / "ant" / f"{i}.jpg").write_bytes(encoded(i, "JPEG", (20, 16)))
    (tmp_path / "photos" / "ant" / "empty.jpg").touch()

    def write(folder):
        prepare(
            Request(folder, "shots", shard_bytes=1_500, max_bad_share=0.5, num_threads=1), {"train": str(tmp_path / "photos")}
        )

    operations = check_every_kill(tmp_path, write, share, times=2)
    assert len(operations) > 30 and any("bad_records" in name for name in operations)


def test_a_strange_file_in_an_unfinished_data_set(photos, tmp_path, monkeypatch):
    """Work that goes on in a folder where somebody else has begun to write."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(datasets, "write_shard", lambda *args: exec("raise KeyboardInterrupt"))
        prepare(request(tmp_path), {"train": str(photos)})
    (tmp_path / "out" / "shots" / "1.0.0" / "notes.txt").touch()
    with pytest.raises(UserError, match=r"contains notes.txt, which this command did not write"):
        prepare(request(tmp_path), {"train": str(photos)})


@pytest.mark.slow
def test_the_verb_killed_and_continued(photos, tmp_path):
    """A verb that is killed outright and does not go on, ends with other bytes, or prints no result."""
    flags = ["--source=photos", "--dataset=shots", "--shard_mib=0.2", "--resolution=200", "--out=data"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(
        [sys.executable, "-m", "dit_jax.prepare", *flags, "--num_threads=1"], cwd=tmp_path, env=env, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not list((tmp_path / "data").rglob("*array_record-00001*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
    outcomes = run_verbs(tmp_path, [["prepare", *flags], ["prepare", *flags, "--seed=3"], ["prepare", *flags[:-1]]])
    whole = prepare(request(tmp_path, "whole", shard_bytes=round(0.2 * 2**20), size=(200, 200)), {"train": str(photos)})
    assert outcomes[0][0] == 0 and json.loads(outcomes[0][1].splitlines()[-1]) == whole | {"out": "data"}, outcomes[0]
    assert files_of(tmp_path / "data") == files_of(tmp_path / "whole") and whole["splits"]["train"]["records"] == 60
    refused(outcomes[1], "seed: 0 there, 3 requested")
    refused(outcomes[2], "--out")


def test_complete_already(photos, tmp_path, capfd):
    """A finished data set that is written again, or not looked at."""
    result = prepare(request(tmp_path), {"train": str(photos)})
    written = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*[0-9n]") if file.is_file()}
    capfd.readouterr()
    assert prepare(request(tmp_path), {"train": str(photos)}) == result
    assert "already complete; verifying" in capfd.readouterr().err
    assert len(written) > 3 and all(file.stat().st_mtime_ns == when for file, when in written.items())


def test_imagenet_tars(tmp_path, monkeypatch):
    """Train and validation with labels that do not mean the same, or a split that a second command cannot add."""
    wnids = ["n00000001", "n00000002"]
    train = write_ilsvrc_train(tmp_path / "t.tar", {wnids[1]: 5, wnids[0]: 4})
    validation = write_ilsvrc_validation(tmp_path / "v.tar", 3)
    monkeypatch.setattr("dit_jax.prepare.ilsvrc._tfds_list", lambda name: [wnids[1], wnids[0], wnids[1]])
    prepare(request(tmp_path), {"train": str(tmp_path / "t.tar"), "validation": str(tmp_path / "v.tar")})
    prepare(request(tmp_path, "apart"), {"train": str(tmp_path / "t.tar")})
    result = prepare(request(tmp_path, "apart"), {"validation": str(tmp_path / "v.tar")})
    assert {split: facts["records"] for split, facts in result["splits"].items()} == {"train": 9, "validation": 3}
    assert files_of(tmp_path / "out") == files_of(tmp_path / "apart")
    assert sorted((e["image"], wnids[e["label"]]) for e in read(tmp_path / "out")) == sorted(
        (data, name.split("_")[0]) for name, data in train.items()
    )
    assert {e["image"]: e["label"] for e in read(tmp_path / "out", "validation")} == dict(
        zip(validation.values(), [1, 0, 1], strict=True)
    )


@pytest.mark.parametrize("source", ["tars", "folder"])
def test_captions_and_no_labels(source, tmp_path):
    """Captions lost or paired with other images, or labels invented."""
    import tensorflow_datasets as tfds

    files = {"a.png": encoded(1), "a.txt": "ein Hünd".encode(), "b.png": encoded(2)}
    (tmp_path / "w").mkdir()
    if source == "tars":
        write_tar(tmp_path / "w" / "a.tar", files)
    else:
        for name, data in files.items():
            (tmp_path / "w" / name).write_bytes(data)
    assert prepare(request(tmp_path), {"train": str(tmp_path / "w")})["classes"] == 0
    examples = read(tmp_path / "out", label_key=None, caption_key="caption")
    assert {e["image"]: e["caption"] for e in examples} == {encoded(1): "ein Hünd", encoded(2): ""}
    assert "label" not in tfds.data_source("shots", data_dir=tmp_path / "out", split="train")[0]


@pytest.mark.parametrize("size, recorded", [((16, 16), 16), ((12, 20), [12, 20])])
def test_resolution_stores_the_crop(photos, tmp_path, size, recorded):
    """A stored crop that training would see otherwise than the crop of the original; width before height in the metadata."""
    prepare(request(tmp_path, size=size), {"train": str(photos)})
    assert json.loads((tmp_path / "out/shots/1.0.0/preparation.json").read_text())["resolution"] == recorded
    features = json.loads((tmp_path / "out/shots/1.0.0/features.json").read_text())["featuresDict"]["features"]
    assert features["image"]["image"]["shape"]["dimensions"] == [*map(str, size), "3"]
    expected = {center_crop(decode(file.read_bytes(), 3), size).tobytes() for file in photos.rglob("*.jpg")}
    examples = read(tmp_path / "out")
    assert {decode(e["image"], 3).tobytes() for e in examples} == expected
    assert {Image.open(io.BytesIO(e["image"])).format for e in examples} == {"PNG"}


def test_bad_records(photos, tmp_path):
    """A file that is no image in the data set, one that is left out unnoticed, or an odd image that is left out."""
    (photos / "ant" / "0.jpg").write_bytes(b"")
    (photos / "bee" / "0.jpg").write_bytes(b"hello, I am a text")
    odd = {photos / "cat" / "0.jpg": encoded(0, "PNG"), photos / "cat" / "1.jpg": encoded(1, "JPEG", mode="CMYK")}
    for file, data in odd.items():
        file.write_bytes(data)
    with pytest.raises(UserError, match=r"more than the share of 0\.001 of 60"):
        prepare(request(tmp_path), {"train": str(photos)})
    result = prepare(request(tmp_path, max_bad_share=0.04), {"train": str(photos)})
    assert result["splits"]["train"]["records"] == 58 and set(odd.values()) <= {e["image"] for e in read(tmp_path / "out")}
    reasons = {Path(bad["name"]).parent.name: bad["reason"] for bad in result["bad_records"]}
    assert set(reasons) == {"ant", "bee"} and "zero bytes" in reasons["ant"] and "b'hello, I'" in reasons["bee"]
    assert (tmp_path / "out/shots/1.0.0/bad_records.txt").read_text().count("\n") == 2
    assert prepare(request(tmp_path, max_bad_share=0.04), {"train": str(photos)}) == result


def test_a_full_disk(photos, tmp_path, monkeypatch):
    """A disk that fills: no clear word, a half shard under its final name, or no way on."""
    import array_record.python.array_record_module as module

    class Full(module.ArrayRecordWriter):
        def close(self):
            super().close()
            raise RuntimeError("write() failed: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "ArrayRecordWriter", Full)
        with pytest.raises(UserError, match=r"No space left on device.*same command"):
            prepare(request(tmp_path), {"train": str(photos)})
    assert not list((tmp_path / "out").rglob("*array_record*"))
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
        with pytest.raises(UserError, match="MiB free"):
            prepare(request(tmp_path), {"train": str(photos)})
    assert prepare(request(tmp_path), {"train": str(photos)})["splits"]["train"]["records"] == 60


def test_damage_after_the_end(photos, tmp_path):
    """A complete data set with a shard gone, cut or overwritten that is said to be whole."""
    prepare(request(tmp_path), {"train": str(photos)})
    expected = files_of(tmp_path / "out")
    shards = sorted((tmp_path / "out").rglob("*array_record*"))
    shards[0].unlink()
    os.truncate(shards[1], 1000)
    prepare(request(tmp_path), {"train": str(photos)})
    assert files_of(tmp_path / "out") == expected
    size = shards[2].stat().st_size
    shards[2].write_bytes(np.random.default_rng(0).bytes(size))
    with pytest.raises(UserError, match=r"cannot be read.*remove it and run the command again"):
        prepare(request(tmp_path), {"train": str(photos)})
    assert array_records.write_shard(shards[2], [b"one record"]) == (1, size)  # small files are padded to the same size
    with pytest.raises(UserError, match=r"has 1 records.*remove it and run the command again"):
        prepare(request(tmp_path), {"train": str(photos)})


def test_names_that_are_not_utf_8(photos, tmp_path):
    """A class that cannot be written to the list of labels, found after all shards; a bad file that cannot be listed."""
    os.rename(photos / "ant", os.fsencode(photos) + b"/cl\xe9")
    with pytest.raises(UserError, match=r"such as 'cl\\udce9': rename the folder"):
        prepare(request(tmp_path), {"train": str(photos)})
    assert not (tmp_path / "out").exists()
    os.rename(os.fsencode(photos) + b"/cl\xe9", photos / "ant")
    os.rename(photos / "ant/0.jpg", os.fsencode(photos) + b"/ant/\xe9.jpg")
    with open(os.fsencode(photos) + b"/ant/\xe9.jpg", "wb"):
        pass
    result = prepare(request(tmp_path, max_bad_share=0.04), {"train": str(photos)})
    assert r"\udce9.jpg" in result["bad_records"][0]["name"]


@pytest.mark.parametrize("text", ["[]", "null", "{}", '{"format": 1}', '{"format": 1, "splits": 3}', "[" * 100_000])
def test_another_plan_is_one_line(text, photos, tmp_path):
    """A stack trace because preparation.json is something else."""
    folder = tmp_path / "out/shots/1.0.0"
    folder.mkdir(parents=True)
    (folder / "preparation.json").write_text(text)
    with pytest.raises(UserError, match=r"preparation\.json.*start again"):
        prepare(request(tmp_path), {"train": str(photos)})


def test_a_split_of_a_plan_is_a_name(photos, tmp_path):
    """Shards written outside of the folder, because a split is called ../../x."""
    prepare(request(tmp_path), {"train": str(photos)})
    plan = tmp_path / "out/shots/1.0.0/preparation.json"
    plan.write_text(plan.read_text().replace('"train"', '"../../train"'))
    with pytest.raises(UserError, match="has a split"):
        prepare(request(tmp_path), {"train": str(photos)})


def test_refused(photos, tmp_path):
    """Another source or setting mixed into the shards of a data set, or files of others overwritten."""
    prepare(request(tmp_path), {"train": str(photos)})
    for more, text in (
        ({"seed": 1}, "seed: 0 there, 1 requested"),
        ({"shard_bytes": 9}, "shard_bytes"),
        ({"size": (8, 8)}, "res"),
    ):
        with pytest.raises(UserError, match=text):
            prepare(request(tmp_path, **more), {"train": str(photos)})
    (photos / "ant" / "new.jpg").write_bytes(encoded(7, "JPEG"))
    with pytest.raises(UserError, match="split train: source"):
        prepare(request(tmp_path), {"train": str(photos)})
    (photos / "dog").mkdir()
    (photos / "dog" / "1.jpg").write_bytes(encoded(8, "JPEG"))
    with pytest.raises(UserError, match=r"only in .*: dog"):
        prepare(request(tmp_path), {"test": str(photos)})
    with pytest.raises(UserError, match="split='all'"):
        prepare(request(tmp_path), {"all": str(photos)})
    (tmp_path / "theirs/shots/1.0.0").mkdir(parents=True)
    (tmp_path / "theirs/shots/1.0.0/precious").touch()
    with pytest.raises(UserError, match="precious"):
        prepare(request(tmp_path, "theirs"), {"train": str(photos)})
    with claim(tmp_path / "busy/shots/1.0.0", "a test"), pytest.raises(UserError, match="another command"):
        prepare(request(tmp_path, "busy"), {"train": str(photos)})
    write_tar(photos / "x.tar", {"a.jpg": b"1"})
    with pytest.raises(UserError, match="both tars"):
        prepare(request(tmp_path, "both"), {"train": str(photos)})


@pytest.mark.parametrize(
    "more, text",
    [
        ({"dataset": "imagenet2012"}, "TFDS has code"),
        ({"dataset": "My-Set"}, "lower-case"),
        ({"seed": -1}, "at least 0"),
        ({"max_bad_share": 1.0}, r"\[0, 1\)"),
        ({"num_threads": 0}, "at least 1"),
        ({"size": (0, 8)}, "at least 1 pixel"),
    ],
)
def test_bad_requests(more, text, tmp_path):
    """A data set that is written for hours under a name that TFDS takes for its own."""
    with pytest.raises(UserError, match=text):
        Request(**{"out": tmp_path, "dataset": "shots", **more})


def test_clips_are_refused(tmp_path):
    """An archive of clips that ends in an error of the image decoder, or a folder that is called empty."""
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.mp4").write_bytes(b"x")
    with pytest.raises(UserError, match=r"holds clips, such as a\.mp4.*data\.name=clips"):
        prepare(request(tmp_path), {"train": str(tmp_path / "clips")})
    pytest.importorskip("av")
    write_tar(tmp_path / "x.tar", {"a.mp4": b"x"})
    with pytest.raises(UserError, match=r"holds clips, and prepare packs images"):
        prepare(request(tmp_path), {"train": str(tmp_path / "x.tar")})
