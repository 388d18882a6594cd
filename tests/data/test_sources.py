"""Sources: what they count, name and number, and what they say when the data are not what they should be."""

import hashlib
import io
import json
import os
import pickle
import shutil

import numpy as np
import pytest
from PIL import Image

from dit_jax.data.sources import TFDS, Digits, ImageFolder
from dit_jax.data.transforms import ImageTransform
from dit_jax.errors import Unavailable, UserError


def encoded(value: int, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (12, 10), (value, value, value)).save(file, kind)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Two classes, four images, one deep, odd suffixes, and files that are no part of the data set."""
    root = tmp_path / "photos"
    for value, name in enumerate(["cat/b.JPG", "cat/a.png", "cat/more/c.jpeg", "dog/d.WebP"]):
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(50 * value, {"g": "JPEG", "b": "WEBP"}.get(name[-1].lower(), "PNG")))
    for name in ["README.txt", "cat/labels.csv", "dog/.hidden.png", ".cache/x.png"]:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"no image")
    return root


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    """A data_dir with `shades`: splits train (3 + 2 records in two shards) and test (1), written without TensorFlow."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter

    root = tmp_path_factory.mktemp("tfds")
    version = root / "shades" / "1.0.0"
    version.mkdir(parents=True)
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=["dark", "light"]),
            "file_name": tfds.features.Text(),
        }
    )
    template = tfds.core.ShardedFileTemplate(
        template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        dataset_name="shades",
        data_dir=str(version),
        filetype_suffix="array_record",
    )
    shards = {"train": [[0, 40, 80], [160, 200]], "test": [[255]]}
    for split, values in shards.items():
        for i, shard in enumerate(values):
            path = version / f"shades-{split}.array_record-{i:05d}-of-{len(values):05d}"
            writer = ArrayRecordWriter(str(path), "group_size:1")
            for v in shard:
                record = {"image": encoded(v), "label": int(v > 127), "file_name": f" a grey of {v} \u00b1 0\n"}
                writer.write(features.serialize_example(features.encode_example(record)))
            writer.close()
    tfds.folder_dataset.write_metadata(
        data_dir=str(version),
        features=features,
        check_data=False,
        split_infos=[
            tfds.core.SplitInfo(name=s, shard_lengths=[len(x) for x in v], num_bytes=0, filename_template=template)
            for s, v in shards.items()
        ],
    )
    return root


def shade(example) -> int:
    return int(ImageTransform(8, 3, False)(example)["image"][0, 0, 0])


def test_digits_are_scikit_learns_scaled_to_255():
    """Catches truncation instead of rounding, transposed images, and splits that overlap or lose digits."""
    from sklearn.datasets import load_digits

    reference = load_digits()
    source = Digits()
    assert (len(source), len(Digits(split="train")), len(Digits(split="test"))) == (1797, 1500, 297)
    for i in (0, 1499, 1500, 1796):
        example = source[i]
        assert example["image"].shape == (8, 8, 1) and example["image"].dtype == np.uint8
        assert np.abs(example["image"][:, :, 0] - reference.images[i] * 255 / 16).max() <= 0.5
        assert example["label"] == reference.target[i]
    np.testing.assert_array_equal(Digits(split="test")[0]["image"], source[1500]["image"])


def test_digits_fingerprints_differ_by_split():
    """Catches resuming on another split unnoticed, and a fingerprint that changes from run to run."""
    assert len({Digits(split=s).fingerprint for s in ("all", "train", "test")}) == 3
    assert Digits(split="train").fingerprint == Digits(split="train").fingerprint
    with pytest.raises(UserError, match=r"'validation'.*all, train, test"):
        Digits(split="validation")


def test_folder_numbers_images_by_sorted_path(folder):
    """Catches labels that follow the file system's order, lost upper-case suffixes, and hidden files read as images."""
    source = ImageFolder(folder)
    assert source.class_names == ("cat", "dog") and source.num_classes == 2
    names = [os.path.relpath(source[i]["name"], folder) for i in range(len(source))]
    assert names == ["cat/a.png", "cat/b.JPG", "cat/more/c.jpeg", "dog/d.WebP"]
    assert [source[i]["label"] for i in range(4)] == [0, 0, 0, 1]
    assert [round(shade(source[i]) / 50) for i in range(4)] == [1, 0, 2, 3]


def test_folder_fingerprint_follows_files(folder, tmp_path):
    """Catches a fingerprint that depends on where the folder lies, or misses a replaced file."""
    before = ImageFolder(folder).fingerprint
    moved = folder.rename(tmp_path / "moved")
    assert ImageFolder(moved).fingerprint == before
    (moved / "dog" / "d.WebP").write_bytes(encoded(7, "WEBP") + b"\0\0")
    assert ImageFolder(moved).fingerprint != before


def test_folder_refuses_what_it_cannot_label(folder, tmp_path):
    """Catches images skipped in silence: outside any class, empty classes, no classes, no folder."""
    with pytest.raises(UserError, match="does not exist"):
        ImageFolder(tmp_path / "nowhere")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "notes.txt").write_text("no image")
    with pytest.raises(UserError, match="no class folders and no images"):
        ImageFolder(tmp_path / "bare")
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match="'empty' holds no images"):
        ImageFolder(folder)
    (folder / "loose.jpg").write_bytes(encoded(0, "JPEG"))
    with pytest.raises(UserError, match=r"loose\.jpg are in no class folder"):
        ImageFolder(folder)


def test_slices_of_a_folder_divide_it(folder):
    """Catches a held-out part that overlaps the training part, depends on the order of the file system or on what is in the other
    part, or holds one class only; and a slice that is empty or too long."""

    def names(split):
        source = ImageFolder(folder, split)
        return [os.path.relpath(source[i]["name"], folder) for i in range(len(source))], source

    every, whole = names("")
    first, kept = names("[:3]")
    rest, other = names("[3:]")
    assert sorted(first + rest) == every and len(first) == 3 and first == sorted(first)
    hashes = {name: hashlib.sha256(name.encode()).hexdigest() for name in every}
    assert max(hashes[name] for name in first) < min(hashes[name] for name in rest)
    assert kept.class_names == other.class_names == whole.class_names
    labels = dict(zip(every, whole.labels, strict=True))
    assert [labels[name] for name in first] == list(kept.labels) and kept.fingerprint != other.fingerprint
    assert names("[:50%]")[0] == names(f"[:{len(every) // 2}]")[0]
    for wrong in ("[5:5]", "[0:1000]", "[200%:]"):
        with pytest.raises(UserError, match="it must hold at least one image and end at"):
            ImageFolder(folder, wrong)
    with pytest.raises(UserError, match=r"write a slice as in train\[:90%\]"):
        ImageFolder(folder, "[a:3]")


def test_flat_folder_has_no_labels(folder):
    """Catches a flat folder refused or given a class, and suffixes that are left out."""
    flat, kinds = folder / "dog", {"GIF": "GIF", "bmp": "BMP", "tif": "TIFF", "iff": "TIFF", "PEG": "JPEG"}
    for i, name in enumerate(["b.GIF", "c.bmp", "e.tif", "a.tiff", "f.JPEG"]):
        (flat / name).write_bytes(encoded(40 * i, kinds[name[-3:]]))
    source = ImageFolder(flat)
    assert source.num_classes == 0 and source.class_names == () and len(source) == 6
    assert [os.path.basename(source[i]["name"]) for i in range(6)] == ["a.tiff", "b.GIF", "c.bmp", "d.WebP", "e.tif", "f.JPEG"]
    assert [source[i]["label"] for i in range(6)] == [0] * 6
    assert [round(shade(source[i]) / 10) for i in range(6)] == [12, 0, 4, 15, 8, 16]
    assert source.fingerprint != ImageFolder(folder).fingerprint


def test_text_beside_an_image_is_its_caption(folder):
    """Catches captions of another image, unstripped or mis-decoded ones, a fingerprint that misses them, and one that
    changes for a text that describes no image; a long caption that is taken for the short one.
    """
    before = ImageFolder(folder).fingerprint
    (folder / "cat" / "README.txt").write_text("about this folder")
    assert ImageFolder(folder).fingerprint == before
    (folder / "cat" / "b.txt").write_bytes("\ufeff  eine Kätzin \r\n".encode())
    (folder / "cat" / "more" / "c.txt").write_bytes("ein Käfig".encode("latin-1"))
    source = ImageFolder(folder)
    assert source.fingerprint != before
    assert [source[i].get("caption") for i in (0, 1, 3)] == [None, "eine Kätzin", None]
    assert "caption_long" not in source[1]
    short = source.fingerprint
    (folder / "cat" / "b.long.txt").write_text("eine Kätzin, die schläft", encoding="utf-8")
    source = ImageFolder(folder)
    assert source.fingerprint != short and source[1]["caption"] == "eine Kätzin"
    assert source[1]["caption_long"] == "eine Kätzin, die schläft" and "caption_long" not in source[0]
    with pytest.raises(UserError, match=r"c\.txt is not UTF-8 \(.*at byte 5\): save it"):
        source[2]
    (folder / "cat" / "b.txt").unlink()
    with pytest.raises(UserError, match=r"b\.txt: No such file.*restore it"):
        source[1]


def test_folder_names_a_file_that_vanished(folder):
    """Catches a bare FileNotFoundError without the remedy when the folder changes under a run."""
    source = ImageFolder(folder)
    (folder / "cat" / "a.png").unlink()
    with pytest.raises(UserError, match=r"a\.png: No such file.*restore it"):
        source[0]


def test_tfds_reads_encoded_images_at_random(tfds_dir):
    """Catches records out of order over shards, decoded images (which need TensorFlow), and shifted labels."""
    source = TFDS("shades", str(tfds_dir), "train")
    assert len(source) == 5 and source.class_names == ("dark", "light") and source.num_classes == 2
    assert isinstance(source[0]["image"], bytes)
    assert [shade(source[i]) for i in (4, 0, 3, 1, 2)] == [200, 0, 160, 40, 80]
    assert [source[i]["label"] for i in range(5)] == [0, 0, 0, 1, 1]
    assert [shade(TFDS("shades", str(tfds_dir), "train[60%:]")[i]) for i in range(2)] == [160, 200]


def test_tfds_travels_to_workers_closed(tfds_dir):
    """Catches a source whose open readers or locks cannot be pickled, and one that does not reopen."""
    source = TFDS("shades", str(tfds_dir), "train")
    shade(source[0])
    copy = pickle.loads(pickle.dumps(source))
    assert shade(copy[4]) == 200 and copy.fingerprint == source.fingerprint


def test_tfds_on_storage_that_goes_away(tfds_dir, monkeypatch):
    """A shard that is away for a moment taken for a damaged one, or a reader that fails for ever after one error."""
    source = TFDS("shades", str(tfds_dir), "train")
    moved = tfds_dir.rename(tfds_dir.with_name("away"))
    try:
        for _ in range(2):
            with pytest.raises(Unavailable, match="shades split 'train' record 0"):
                source[0]
        with pytest.raises(Unavailable):  # a worker opens the data set anew
            pickle.loads(pickle.dumps(source))[0]
    finally:
        moved.rename(tfds_dir)
    assert shade(source[0]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(type(source._records), "__getitem__", lambda self, i: _raise(ValueError("INTERNAL: Input/output error")))
        with pytest.raises(Unavailable):
            source[1]
    assert shade(source[1]) == 40


def _raise(error):
    raise error


def test_tfds_without_labels(tfds_dir):
    """Catches an unlabelled data set that claims classes: 0 of them, so that label 0 is the null label."""
    source = TFDS("shades", str(tfds_dir), "test", label_key=None)
    assert source.num_classes == 0 and source.class_names == () and source[0]["label"] == 0


def test_tfds_captions(tfds_dir):
    """Catches captions as bytes or of another record, ones nobody asked for, and a fingerprint that misses them."""
    source = TFDS("shades", str(tfds_dir), "train", caption_key="file_name")
    assert [source[i]["caption"] for i in (4, 0)] == ["a grey of 200 ± 0", "a grey of 0 ± 0"]
    both = TFDS("shades", str(tfds_dir), "train", caption_key="file_name", caption_long_key="file_name")
    assert both[4]["caption_long"] == "a grey of 200 ± 0" and both.fingerprint != source.fingerprint
    assert "caption_long" not in source[4]
    plain = TFDS("shades", str(tfds_dir), "train")
    assert "caption" not in plain[0] and plain.fingerprint != source.fingerprint


def test_tfds_fingerprint_follows_the_split(tfds_dir):
    """Catches resuming on another part of the data unnoticed."""
    splits = ["train", "test", "train[:2]", "train[2:4]"]
    assert len({TFDS("shades", str(tfds_dir), s).fingerprint for s in splits}) == len(splits)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": "hues"}, r"'hues' is not prepared in .*holds shades.*download_and_prepare"),
        ({"dataset": "mnist"}, r"'mnist' is not prepared in .*holds shades"),
        ({"split": "validation"}, r"no split 'validation': it has train, test"),
        ({"split": "train[:1"}, r"no split 'train\[:1'"),
        ({"image_key": "picture"}, r"image_key='picture' names no Image feature of shades \(.*image: Image"),
        ({"label_key": "file_name"}, r"label_key='file_name' names no ClassLabel.*label_key=None"),
        ({"caption_key": "label"}, r"caption_key='label' names no Text.*caption_key=None reads it without captions"),
        ({"path": "/nowhere/at/all"}, r"/nowhere/at/all does not exist"),
    ],
)
def test_tfds_says_what_is_missing(tfds_dir, arguments, message):
    """Catches TFDS's own stack traces, and a silent download, for the mistakes users make."""
    with pytest.raises(UserError, match=message):
        TFDS(**({"dataset": "shades", "path": str(tfds_dir), "split": "train"} | arguments))


def test_tfds_missing_and_broken_shards(tfds_dir, tmp_path):
    """Catches a lost shard found only hours later, and a truncated record without the name of the data set."""
    shutil.copytree(tfds_dir / "shades", tmp_path / "shades")
    shard = tmp_path / "shades" / "1.0.0" / "shades-train.array_record-00001-of-00002"
    good = shard.read_bytes()
    shard.write_bytes(good[: len(good) // 2])
    source = TFDS("shades", str(tmp_path), "train")
    with pytest.raises(UserError, match="shades split 'train' record 4"):
        source[4]
    shard.unlink()
    with pytest.raises(UserError, match=r"1 of 2 shards of shades split 'train' are missing.*00001-of-00002"):
        TFDS("shades", str(tmp_path), "train")


def bad_features(form):
    """A features.json whose type of feature is a module, in each form that TFDS reads."""
    content = {"features": {"image": {"pythonClassName": "hostile_module.Image", "image": {}}}}
    own = "tensorflow_datasets.core.features.features_dict.FeaturesDict"
    legacy = {"image": {"type": "hostile_module.Image", "content": {}}}
    return {
        "proto": {"pythonClassName": own, "featuresDict": content},
        "other spelling": {"python_class_name": "hostile_module.Image", "image": {}},
        "legacy": {"type": own, "content": legacy},
        "text": {"pythonClassName": own, "jsonFeature": {"json": json.dumps(legacy)}},
    }[form]


@pytest.mark.parametrize("form", ["proto", "other spelling", "legacy", "text"])
def test_tfds_does_not_import_what_a_folder_names(form, tfds_dir, tmp_path, monkeypatch):
    """Code that runs because features.json names its module."""
    shutil.copytree(tfds_dir / "shades", tmp_path / "shades")
    (tmp_path / "hostile_module.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "shades/1.0.0/features.json").write_text(json.dumps(bad_features(form)))
    with pytest.raises(UserError, match=r"features\.json has a feature of type hostile_module\.Image"):
        TFDS("shades", str(tmp_path), "train")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("features.json", "[" * 100_000),
        ("features.json", "[]"),
        ("features.json", "null"),
        ("features.json", '{"a":' * 60 + "1" + "}" * 60),
        ("features.json", '{"featuresDict": {"features": {"../../label": {}}}}'),
        ("dataset_info.json", "[]"),
        ("dataset_info.json", "[" * 100_000),
        ("dataset_info.json", '{"name": "shades", "version": "1.0.0", "splits": 3}'),
    ],
)
def test_tfds_with_other_metadata_is_one_line(file, text, tfds_dir, tmp_path):
    """A stack trace of TFDS or of protocol buffers."""
    shutil.copytree(tfds_dir / "shades", tmp_path / "shades")
    (tmp_path / "shades/1.0.0" / file).write_text(text)
    with pytest.raises(UserError):
        TFDS("shades", str(tmp_path), "train")


def test_tfds_reads_no_shard_of_another_folder(tfds_dir, tmp_path):
    """A file elsewhere on the machine, read as records because dataset_info.json says so."""
    shutil.copytree(tfds_dir / "shades", tmp_path / "shades")
    shutil.copytree(tfds_dir / "shades/1.0.0", tmp_path / "other")
    info = tmp_path / "shades/1.0.0/dataset_info.json"
    template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    assert template in info.read_text()
    info.write_text(info.read_text().replace(template, f"../../other/{template}"))
    with pytest.raises(UserError, match="outside of its folder"):
        TFDS("shades", str(tmp_path), "train")


def test_only_the_images_of_a_folder_are_counted_and_the_rest_is_said(tmp_path, capsys):
    """Thumbnails of a NAS that are trained on; images of unusual suffixes, or files without one, that vanish without a word."""
    for name in ["c/a.jpg", "c/b.jfif", "c/d.JPE", "c/e.ppm", "d/x.png"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    before = ImageFolder(tmp_path)
    assert capsys.readouterr().err == ""
    others = ["c/@eaDir/a.jpg/SYNOPHOTO_THUMB.jpg", "@eaDir/y.jpg", "__MACOSX/c/a.jpg", "c/._a.jpg", "c/n01", "c/n02", "c/x.csv"]
    for name in others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    source = ImageFolder(tmp_path)
    assert (len(source), source.class_names) == (5, ("c", "d"))
    assert source.fingerprint == before.fingerprint
    assert "5 files or folders are no images" in (said := capsys.readouterr().err)
    assert "2 x no suffix" in said
    assert "2 x hidden, or of a system" in said


@pytest.mark.parametrize("link", ["c/loop", "c/more/loop"])
def test_a_link_to_a_folder_above_is_named(link, tmp_path):
    """A walk that ends at the 40th link with a stack trace, or that counts an image 40 times."""
    (tmp_path / "c/more").mkdir(parents=True)
    (tmp_path / "c/more/a.jpg").write_bytes(b"x")
    (tmp_path / link).symlink_to(tmp_path / "c", target_is_directory=True)
    with pytest.raises(UserError, match=f"c and .*{link} are the same folder"):
        ImageFolder(tmp_path)


def test_a_link_to_itself_is_left_out(tmp_path):
    """ELOOP with a stack trace."""
    (tmp_path / "c").mkdir()
    (tmp_path / "c/a.jpg").write_bytes(b"x")
    (tmp_path / "c/loop").symlink_to(tmp_path / "c/loop")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert ImageFolder(tmp_path).class_names == ("c",)


def test_numeric_class_folders_are_said(tmp_path, capsys):
    """Label 2 that is the folder 10, without a word."""
    for number in range(11):
        (tmp_path / "a" / f"{number}").mkdir(parents=True)
        (tmp_path / "a" / f"{number}" / "x.jpg").write_bytes(b"x")
        (tmp_path / "b" / f"{number:02d}").mkdir(parents=True)
        (tmp_path / "b" / f"{number:02d}" / "x.jpg").write_bytes(b"x")
    ImageFolder(tmp_path / "a")
    assert "label 2 is the folder 10; pad" in capsys.readouterr().err
    ImageFolder(tmp_path / "b")
    assert capsys.readouterr().err == ""


def test_a_dead_link_is_a_bad_record(tmp_path):
    """One link that leads nowhere, which keeps a whole folder from being opened."""
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "b.jpg").symlink_to(tmp_path / "gone.jpg")
    source = ImageFolder(tmp_path)
    assert len(source) == 2
    with pytest.raises(UserError, match=r"b\.jpg"):
        source[1]
