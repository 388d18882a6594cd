"""Tars read at random: header formats, the WebDataset layout, the kept index, ImageNet's archives, and hostile files."""

import concurrent.futures
import json
import os
import pickle
import tarfile

import numpy as np
import pytest
from tar_files import encoded, tar_bytes, write_ilsvrc_train, write_ilsvrc_validation, write_tar

from dit_jax.data import open_files
from dit_jax.data.sources import tar_headers, tar_index, tars
from dit_jax.data.sources.tar_headers import TarScan, opened
from dit_jax.data.sources.tars import TarShards, tar_files
from dit_jax.errors import UserError
from dit_jax.prepare.ilsvrc import IlsvrcTrain, IlsvrcValidation

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def scan(path):
    with opened(path) as fd:
        return list(TarScan(fd, str(path)))


def pairs(count, start=0, suffix="jpg"):
    """{name: bytes} of samples with an image and a .cls."""
    return {
        name: data
        for i in range(start, start + count)
        for name, data in ((f"{i:05d}.{suffix}", encoded(i)), (f"{i:05d}.cls", str(i % 3).encode()))
    }


@pytest.fixture
def shards(tmp_path):
    """Three tars of four labelled samples, 12 in all."""
    for number in range(3):
        write_tar(tmp_path / f"train-{number:04d}.tar", pairs(4, 4 * number))
    return tmp_path


@pytest.mark.parametrize("form", FORMATS)
def test_headers_of_every_format(form, tmp_path):
    """A name of one header format cut, mistaken, or its data read from the wrong place."""
    members = {
        "plain.jpg": b"a" * 511,
        "dir/": None,
        "dir/sub/x.jpg": b"b" * 512,
        "empty.jpg": b"",
        "last.jpg": b"c" * 513,
        "deep/" * 25 + "n" * 60 + ".jpg": b"prefix",
    }
    if form != "ustar":
        members |= {"l" * 300 + ".jpg": b"long", "snö/写真.jpg": b"unicode", "d" * 150 + "/": None, "after.jpg": b"short again"}
    path = write_tar(tmp_path / "x.tar", members, FORMATS[form])
    whole = path.read_bytes()
    found = {member.name: whole[member.offset : member.offset + member.size] for member in scan(path)}
    assert found == {name: data for name, data in members.items() if data is not None}


def test_attributes_of_pax_and_gnu(tmp_path):
    """A size that stands in a PAX header or in base 256, a common header, a leading ./ or an old header, misread."""
    info = tarfile.TarInfo("./a.jpg")
    info.pax_headers = {"size": "3", "comment": "ü"}
    old = bytearray(tarfile.TarInfo("old.jpg").tobuf(tarfile.USTAR_FORMAT))
    old[257:265] = bytes(8)  # the v7 layout has no magic
    old[124:136] = b"\x80" + (5).to_bytes(11)
    old[148:156] = b" " * 8
    old[148:156] = b"%06o\0 " % sum(old)
    path = tmp_path / "x.tar"
    common = tarfile.TarInfo.create_pax_global_header({"comment": "all"})
    path.write_bytes(
        common + info.tobuf(tarfile.PAX_FORMAT) + b"abc".ljust(512, b"\0") + bytes(old) + b"12345".ljust(512, b"\0") + bytes(1024)
    )
    data = path.read_bytes()
    assert [(m.name, data[m.offset : m.offset + m.size]) for m in scan(path)] == [("a.jpg", b"abc"), ("old.jpg", b"12345")]


def link(kind):
    info = tarfile.TarInfo("x.jpg")
    info.type, info.linkname = kind, "y.jpg"
    return info


def signed(header):
    """A header with its checksum."""
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def numbered(size):
    """A tar of one member with these twelve bytes as its size."""
    header = bytearray(tarfile.TarInfo("x.jpg").tobuf(tarfile.USTAR_FORMAT))
    header[124:136] = size
    return signed(header) + bytes(1024)


def pax(record, length=None):
    """A tar of one member after a PAX header with this record."""
    length = str(next(n for n in range(len(record), 10**6) if len(f"{n} ") + len(record) + 1 == n)) if length is None else length
    body = (length.encode() if isinstance(length, str) else length) + b" " + record + b"\n"
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, len(body)
    start = info.tobuf(tarfile.USTAR_FORMAT) + body.ljust(-(-len(body) // 512) * 512, b"\0")
    return start + tarfile.TarInfo("x.jpg").tobuf(tarfile.USTAR_FORMAT) + bytes(1024)


GOOD = tar_bytes(pairs(2))
HOSTILE = {
    "cut in data": (GOOD[:700], "truncated"),
    "cut between members": (GOOD[:2048], "truncated"),
    "no end mark": (GOOD.rstrip(b"\0").ljust(-(-len(GOOD.rstrip(b"\0")) // 512) * 512, b"\0"), "truncated"),
    "empty file": (b"", "truncated"),
    "not a tar": (b"hello world " * 100, "not a tar"),
    "a flipped byte": (GOOD[:3] + b"\xff" + GOOD[4:], "checksum"),
    "joined": (GOOD + GOOD, "concatenated"),
    "gzip": (b"\x1f\x8b\x08" + bytes(1000), "compressed .gzip."),
    "hard link": (tar_bytes([(link(tarfile.LNKTYPE), b"")]), "hard link.*--hard-dereference"),
    "symbolic link": (tar_bytes([(link(tarfile.SYMTYPE), b"")]), "--dereference"),
    "sparse": (tar_bytes([(link(tarfile.GNUTYPE_SPARSE), b"")]), "sparse"),
    "device": (tar_bytes([(link(tarfile.CHRTYPE), b"")]), "leave it out"),
    "2^87 bytes": (numbered(b"\x80" + b"\x7f" * 11), "a member of"),
    "2^60 bytes": (numbered(b"\x80" + (2**60).to_bytes(11)), "truncated"),
    "negative": (numbered(b"\xff" * 12), "no header"),
    "negative octal": (numbered(b"-0000000007\0"), "no header"),
    "a long PAX size": (pax(b"size=" + b"9" * 5000), "PAX header with size"),
    "a PAX size of other digits": (pax("size=\u00b2".encode()), "PAX header with size"),
    "a PAX size past the end": (pax(b"size=4611686018427387904"), "truncated"),
    "a long PAX length": (pax(b"size=1", b"9" * 5000), "unreadable PAX"),
    "no PAX length": (pax(b"size=1", b""), "unreadable PAX"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_tars_are_refused(what, tmp_path):
    """A damaged tar read as a smaller data set, or a stack trace that does not name the file."""
    data, text = HOSTILE[what]
    (tmp_path / "bad.tar").write_bytes(data)
    with pytest.raises(UserError, match=rf"bad\.tar.*{text}"):
        scan(tmp_path / "bad.tar")


def test_a_window_smaller_than_the_data_reads_the_same(shards, monkeypatch):
    """A window that gives the bytes of another place."""
    expected = scan(shards / "train-0000.tar")
    monkeypatch.setattr(tar_headers, "WINDOW", 512)
    assert scan(shards / "train-0000.tar") == expected


def test_samples_bytes_labels_and_names(shards):
    """Images paired with other samples' labels, or altered."""
    source = TarShards(str(shards))
    assert (len(source), source.num_classes, source.class_names, source.has_captions) == (12, 3, ("0", "1", "2"), False)
    for i in [11, 0, 5, 5]:
        assert source[i] == {"image": encoded(i), "label": i % 3, "name": f"train-{i // 4:04d}.tar:{i:05d}"}
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert [e["image"] for e in pool.map(source.__getitem__, range(12))] == [encoded(i) for i in range(12)]


def test_layout_rules(tmp_path):
    """The key cut at the wrong dot, members apart not joined, junk taken for samples, a description lost."""
    write_tar(
        tmp_path / "a.tar",
        [
            ("x/1.jpg", encoded(1)),
            ("x/2.PNG", encoded(2)),
            ("y.z/1.webp", encoded(3)),
            ("x/1.seg.png", b"a mask"),
            ("x/._1.jpg", b"mac"),
            ("README", b"junk"),
            ("x/2.cls", b" 7\n"),
            ("x/1.json", json.dumps({"label": 4, "caption": "by json"}).encode()),
            ("y.z/1.json", b'{"cls": 0, "text": "as text"}'),
            ("y.z/1.cls", b"0"),
            ("x/2.txt", "ein Hünd".encode()),
            ("x/3.gif", encoded(4)),
            ("x/3.json", b'{"label": 1, "caption": null}'),
        ],
    )
    source = TarShards(str(tmp_path / "*.tar"), cache_index=False)
    found = [source[i] for i in range(len(source))]
    assert [e["name"] for e in found] == ["a.tar:x/1", "a.tar:x/2", "a.tar:y.z/1", "a.tar:x/3"]
    assert [e["label"] for e in found] == [4, 7, 0, 1]
    assert [e.get("caption") for e in found] == ["by json", "ein Hünd", "as text", None]
    assert [e["image"] for e in found] == [encoded(i) for i in (1, 2, 3, 4)]
    assert not any("caption_long" in e for e in found)
    assert source.num_classes == 8 and source.has_captions
    assert not list(tmp_path.glob("*.npz"))


@pytest.mark.parametrize(
    "members, text",
    [
        ({"a.txt": b"no image"}, "a.tar:a has 0 images"),
        ({"a.jpg": b"1", "a.png": b"2"}, "has 2 images"),
        ({"a.jpg": b"1", "a.JPG": b"2"}, "two members"),
        ({"a.jpg": b"1", "b.jpg": b"2", "b.cls": b"1"}, "a.tar:a has no label"),
        ({"a.jpg": b"1", "a.cls": b"cat"}, "label 'cat'"),
        ({"a.jpg": b"1", "a.cls": b"-1"}, "label '-1'"),
        ({"a.jpg": b"1", "a.json": b'{"label": true}'}, "label True"),
        ({"a.jpg": b"1", "a.cls": b"1", "a.json": b'{"label": 2}'}, "several labels"),
        ({"a.jpg": b"1", "a.json": b"{"}, r"a\.json cannot be read"),
        ({"a.jpg": b"1", "a.json": b"[1]"}, "not an object"),
        ({"a.jpg": b"1", "a.json": b'{"caption": 5}'}, "not a string"),
        ({"a.jpg": b"1", "a.cls": b"1" * 100}, "may have at most 64"),
        ({".x": b"1"}, "no samples"),
    ],
)
def test_bad_samples_are_named(members, text, tmp_path):
    """A sample without image or label that shifts the others, or a label that is guessed."""
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(UserError, match=text):
        TarShards(str(tmp_path), cache_index=False)


def test_classes(shards, tmp_path):
    """Labels outside the classes that reach the network, or class names of another data set."""
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\nsnö\nfox\n")
    assert TarShards(str(shards), class_names_file=str(names)).class_names == ("cat", "dog", "snö", "fox")
    assert TarShards(str(shards), num_classes=10).class_names[-1] == "9"
    with pytest.raises(UserError, match=r"train-0000.tar:00002 has label 2, outside \[0, 2\)"):
        TarShards(str(shards), num_classes=2)
    with pytest.raises(UserError, match="4 classes"):
        TarShards(str(shards), num_classes=3, class_names_file=str(names))
    names.write_text("cat\ncat\ndog\n")
    with pytest.raises(UserError, match="repeated"):
        TarShards(str(shards), class_names_file=str(names))
    write_tar(tmp_path / "plain" / "a.tar", {"a.jpg": encoded(0)})
    plain = TarShards(str(tmp_path / "plain"))
    assert (plain.num_classes, plain.class_names, plain[0]["label"]) == (0, (), 0)
    with pytest.raises(UserError, match="no sample has a label"):
        TarShards(str(tmp_path / "plain"), num_classes=3)


@pytest.mark.parametrize(
    "pattern, numbers",
    [
        ("", "012"),
        ("train-{0000..0002}.tar", "012"),
        ("train-000{2,0}.tar", "20"),
        ("*.tar", "012"),
        ("train-0001.tar", "1"),
        ("{train,*}-000{1..1}.tar", None),
        ("train-{0000..0003}.tar", None),
        ("x*.tar", None),
        ("train-{1..0}.tar", None),
    ],
)
def test_patterns(pattern, numbers, shards):
    """A pattern that leaves out tars, takes one twice, or passes over one that is missing."""
    if numbers is None:
        with pytest.raises(UserError, match=r"twice|train-0003\.tar does not exist|x.*does not exist|count up"):
            tar_files(f"{shards}/{pattern}")
    else:
        assert [file.name for file in tar_files(f"{shards}/{pattern}")] == [f"train-000{n}.tar" for n in numbers]


def test_compressed_or_no_tars(shards, tmp_path):
    """A compressed shard left out of the data set without a word."""
    (shards / "train-0003.tar.gz").write_bytes(b"")
    with pytest.raises(UserError, match="unpack"):
        tar_files(str(shards))
    with pytest.raises(UserError, match="empty"):
        tar_files("")
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"no \.tar"):
        tar_files(str(tmp_path / "none"))


def test_the_index_is_kept_and_renewed(shards, monkeypatch, caplog):
    """An index that is built each time, is used for changed tars, or whose damage goes unnoticed."""
    first = TarShards(str(shards))
    (kept,) = shards.glob("dit_jax-index-*.npz")
    with monkeypatch.context() as patch:
        patch.setattr(tars, "_samples", lambda *_: pytest.fail("the tars were read again"))
        again = TarShards(str(shards))
        assert again.fingerprint == first.fingerprint and again[7] == first[7]
    whole = kept.read_bytes()
    for damaged in (whole[:-30], whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:], b""):
        kept.write_bytes(damaged)
        assert TarShards(str(shards)).fingerprint == first.fingerprint
        assert kept.read_bytes() == whole
    write_tar(shards / "train-0001.tar", pairs(4, 100))
    changed = TarShards(str(shards))
    assert changed[4]["image"] == encoded(100) and changed.fingerprint != first.fingerprint


def test_a_folder_that_cannot_be_written(shards, monkeypatch, caplog):
    """A read-only data set that cannot be opened, or is scanned at every start without a word."""

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tar_index, "replacing", refuse)
    with caplog.at_level("WARNING", logger="absl"):
        assert len(TarShards(str(shards))) == 12
    assert "cannot be stored" in caplog.text


def test_pickled_and_many_files(shards, monkeypatch):
    """File descriptors that travel to a worker, or pile up until the system refuses."""
    monkeypatch.setattr(open_files, "OPEN_FILES", 1)
    source = TarShards(str(shards))
    before = len(os.listdir("/proc/self/fd"))
    assert [source[i]["label"] for i in range(0, 12, 4)] == [0, 1, 2]
    assert len(os.listdir("/proc/self/fd")) == before + 1
    copy = pickle.loads(pickle.dumps(source))
    assert copy[9] == source[9] and copy.fingerprint == source.fingerprint


def test_a_tar_that_changes_while_it_is_read(shards):
    """Half an image taken for a whole one."""
    source = TarShards(str(shards))
    os.truncate(shards / "train-0002.tar", 3000)
    with pytest.raises(UserError, match="was truncated"):
        source[11]
    os.unlink(shards / "train-0001.tar")
    with pytest.raises(UserError, match="No such file"):
        source[4]


def test_ilsvrc_train(tmp_path):
    """Labels by the order in the tar instead of the sorted WordNet ids, or bytes from another place of the outer tar."""
    images = write_ilsvrc_train(tmp_path / "t.tar", {"n00000003": 2, "n00000001": 3, "n00000002": 1})
    for _ in range(2):  # the second time from the kept index
        source = IlsvrcTrain(str(tmp_path / "t.tar"))
        assert source.class_names == ("n00000001", "n00000002", "n00000003")
        found = [source[i] for i in range(len(source))]
        assert [e["label"] for e in found] == [0, 0, 0, 1, 2, 2]
        assert all(e["image"] == images[e["name"].split("/")[1]] for e in found)
        assert found[5]["name"] == "t.tar:n00000003/n00000003_1.JPEG"


def test_ilsvrc_validation(tmp_path):
    """The label of an image taken from the order in the tar instead of its number, or a missing image unnoticed."""
    images = write_ilsvrc_validation(tmp_path / "v.tar", 4)
    labels, classes = ["n00000002", "n00000001", "n00000002", "n00000003"], ["n00000001", "n00000002", "n00000003"]
    source = IlsvrcValidation(str(tmp_path / "v.tar"), labels, classes)
    assert {source[i]["name"]: source[i]["label"] for i in range(4)} == {
        f"v.tar:ILSVRC2012_val_{i + 1:08d}.JPEG": classes.index(label) for i, label in enumerate(labels)
    }
    assert source[0]["image"] == images["ILSVRC2012_val_00000004.JPEG"]
    with pytest.raises(UserError, match="image number 5 is missing"):
        IlsvrcValidation(str(tmp_path / "v.tar"), [*labels, "n00000001"], classes)
    with pytest.raises(UserError, match="50,000 labels"):
        IlsvrcValidation(str(tmp_path / "v.tar"))
    with pytest.raises(UserError, match="n00000003, are not among the 2 classes"):
        IlsvrcValidation(str(tmp_path / "v.tar"), labels, classes[:2])


def test_the_label_list_of_tfds_is_imagenets():
    """A list of other length or order than ImageNet's."""
    from dit_jax.prepare.ilsvrc import _tfds_list

    names, labels = _tfds_list("labels.txt"), _tfds_list("validation_labels.txt")
    assert names == sorted(set(names)) and len(names) == 1000 and names[0] == "n01440764"
    assert np.array_equal(np.unique(labels, return_counts=True)[1], np.full(1000, 50)) and labels[0] == "n01751748"


@pytest.mark.parametrize(
    "members, text",
    [
        ({"n00000001.tar": tar_bytes({})}, "no images"),
        ({"x.jpg": b"1"}, "is not nXXXXXXXX.tar"),
        ({}, "no images"),
        ({"n00000001.tar": GOOD[:700]}, "n00000001.tar is truncated"),
    ],
)
def test_bad_ilsvrc_train(members, text, tmp_path):
    """A class without images that shifts no label but is never drawn, or a damaged inner tar read in part."""
    write_tar(tmp_path / "t.tar", members)
    with pytest.raises(UserError, match=text):
        IlsvrcTrain(str(tmp_path / "t.tar"))


def test_previews_of_a_nas_are_not_in_a_tar(tmp_path, caplog):
    """Thumbnails and macOS's shadow files as samples of their own."""
    write_tar(
        tmp_path / "a.tar",
        pairs(2) | {"@eaDir/x.jpg/SYNOPHOTO_THUMB.jpg": b"t", "__MACOSX/y.jpg": b"t", ".trash/z.jpg": b"t", "._w.jpg": b"t"},
    )
    assert len(TarShards(str(tmp_path / "a.tar"), cache_index=False)) == 2
    assert "3 members in folders such as @eaDir" in caplog.text


@pytest.mark.parametrize("text", [b"[]", b"null", b"[" * 100_000, b'{"label": [[[[[[[[[]]]]]]]]]}', b'{"caption": [1]}'])
def test_other_json_in_a_tar_is_one_line(text, tmp_path):
    """A stack trace of the JSON of one sample."""
    write_tar(tmp_path / "a.tar", pairs(1) | {"x.jpg": b"", "x.json": text})
    with pytest.raises(UserError, match=r"a\.tar:x") as caught:
        TarShards(str(tmp_path / "a.tar"), cache_index=False)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("tar", 1),
        ("tar", -1),
        ("offset", -512),
        ("offset", 2**40),
        ("size", 2**62),
        ("size", -1),
        ("caption_offset", 2**62),
        ("name_end", 2**40),
        ("name_end", -1),
        ("names", 255),
        ("label", -2),
        ("label", 2**40),
    ],
)
def test_an_index_that_points_elsewhere_is_built_again(column, value, tmp_path, caplog):
    """Bytes outside of a tar, or a stack trace, because the file next to it says so."""
    write_tar(tmp_path / "a.tar", pairs(3) | {f"0000{i}.txt": b"words" for i in range(3)})
    good = TarShards(str(tmp_path))
    (kept,) = tmp_path.glob("*.npz")
    with np.load(kept) as file:
        arrays = dict(file)
    arrays[column] = arrays[column].copy()
    arrays[column][1] = value
    np.savez(kept, **arrays)
    again = TarShards(str(tmp_path))
    assert "is damaged" in caplog.text
    assert again.fingerprint == good.fingerprint
    assert [again[i]["image"] for i in range(3)] == [good[i]["image"] for i in range(3)]


def test_long_captions(tmp_path):
    """Catches a long caption that a .txt beside its .json hides, and one that is lost when there is no short one in the .json."""
    fields = json.dumps({"caption": "a cat", "caption_long": "a grey cat on a sofa"}).encode()
    write_tar(tmp_path / "a.tar", {"a.jpg": encoded(0), "a.txt": b"other", "a.json": fields, "b.jpg": encoded(1), "b.txt": b"b"})
    found = list(TarShards(str(tmp_path / "a.tar"), cache_index=False))
    assert (found[0]["caption"], found[0]["caption_long"]) == ("a cat", "a grey cat on a sofa")
    assert found[1]["caption"] == "b" and "caption_long" not in found[1]
    write_tar(tmp_path / "b.tar", {"a.jpg": encoded(0), "a.json": b'{"caption": "x", "caption_long": 5}'})
    with pytest.raises(UserError, match="its caption is 5, not a string"):
        TarShards(str(tmp_path / "b.tar"), cache_index=False)


def test_a_caption_that_left_its_json(tmp_path):
    """A batch with None where the index promised a text."""
    write_tar(tmp_path / "a.tar", {"a.jpg": encoded(0), "a.json": b'{"caption": "here"}'})
    source = TarShards(str(tmp_path))
    assert source[0]["caption"] == "here"
    data = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(data.replace(b'{"caption": "here"}', b'{"elsewhere": "he"}'))
    with pytest.raises(UserError, match=r"the caption of a\.tar:a cannot be read"):
        source[0]
