"""Long captions of a captioner, from a file into a data set, and from there into training."""

import hashlib
import json

import numpy as np
import pytest
from tar_files import encoded, write_tar

from dit_jax.data.captions import Captions
from dit_jax.data.sources import TFDS
from dit_jax.errors import UserError
from dit_jax.prepare.datasets import Request, prepare
from dit_jax.prepare.recaptions import match, read_recaptions


def written(path, lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), encoding="utf-8")
    return str(path)


def line(name, long, model="captioner-1"):
    return {"name": name, "caption_long": long, "model": model}


@pytest.fixture
def source(request, tmp_path):
    """Four images as a folder or a tar, and what comes before their names in a file of captions; c.png has a long caption."""
    folder, texts = tmp_path / "w", {"a": "short a", "b": "short b", "c": "short c", "d": "short d"}
    folder.mkdir()
    if request.param == "tars":
        members = {f"x/{key}.png": encoded(i) for i, key in enumerate(texts)}
        members |= {f"x/{key}.json": json.dumps({"caption": text}).encode() for key, text in texts.items()}
        members["x/c.json"] = json.dumps({"caption": "short c", "caption_long": "own long c"}).encode()
        write_tar(folder / "a.tar", members)
        return folder, "a.tar:x/{}"
    for i, (key, text) in enumerate(texts.items()):
        (folder / f"{key}.png").write_bytes(encoded(i))
        (folder / f"{key}.txt").write_text(text)
    (folder / "c.long.txt").write_text("own long c")
    return folder, "{}.png"


def read(out):
    data = TFDS("shots", str(out), "train", label_key=None, caption_key="caption", caption_long_key="caption_long")
    return {example["caption"]: example["caption_long"] for example in (data[i] for i in range(len(data)))}


@pytest.mark.parametrize("source", ["tars", "folder"], indirect=True)
def test_long_captions_of_a_file(source, tmp_path, capfd):
    """Catches a caption of another image, a source's own long caption that is lost, and names that are skipped in silence."""
    folder, form = source
    lines = [
        line(form.format("b"), "  ein långer Hünd "),
        "",
        line(form.format("a"), "long a", "captioner-2"),
        line("zz", "nobody"),
    ]
    file = written(tmp_path / "captions.jsonl", lines)
    request = Request(tmp_path / "out", "shots", captions=file)
    result = prepare(request, {"train": str(folder)})
    assert read(tmp_path / "out") == {"short a": "long a", "short b": "ein långer Hünd", "short c": "own long c", "short d": ""}
    assert result["captioners"] == {"train": {"captioner-1": 1, "captioner-2": 1}}
    plan = json.loads((request.folder / "preparation.json").read_text())
    digest = hashlib.sha256((tmp_path / "captions.jsonl").read_bytes()).hexdigest()
    assert plan["splits"]["train"]["recaptions"] == {"sha256": digest, "models": {"captioner-1": 1, "captioner-2": 1}}
    said = capfd.readouterr().err
    assert "2 images have a long caption" in said and "2 have none there and keep what they have" in said
    assert f'1 names in {file} are of no image and are left out: "zz"' in said
    assert prepare(request, {"train": str(folder)}) == result  # the same command again
    written(tmp_path / "captions.jsonl", [*lines, line("yy", "more")])
    with pytest.raises(UserError, match=r"split train: recaptions: .* there, .* requested"):
        prepare(request, {"train": str(folder)})


@pytest.mark.parametrize("source", ["tars", "folder"], indirect=True)
def test_the_file_comes_before_the_source(source, tmp_path):
    """Catches a long caption of the source that hides that of the file, and one that is lost where there is no file."""
    folder, form = source
    prepare(Request(tmp_path / "plain", "shots"), {"train": str(folder)})
    assert read(tmp_path / "plain")["short c"] == "own long c"
    file = written(tmp_path / "captions.jsonl", [line(form.format("c"), "new long c")])
    prepare(Request(tmp_path / "out", "shots", captions=file), {"train": str(folder)})
    assert read(tmp_path / "out")["short c"] == "new long c"


def test_an_image_without_a_short_caption(tmp_path):
    """Catches a data set that has only re-captions and does not say so to TFDS; and a split that a data set cannot take."""
    folder = tmp_path / "w" / "ant"
    folder.mkdir(parents=True)
    (folder / "0.png").write_bytes(encoded(0))
    file = written(tmp_path / "captions.jsonl", [line("ant/0.png", "an ant")])
    prepare(Request(tmp_path / "out", "shots", captions=file), {"train": str(tmp_path / "w")})
    data = TFDS("shots", str(tmp_path / "out"), "train", caption_key="caption_long")
    assert (data[0]["caption"], data[0]["label"], data.text_features) == ("an ant", 0, ("caption_long",))
    prepare(Request(tmp_path / "plain", "shots"), {"train": str(tmp_path / "w")})
    with pytest.raises(UserError, match=r"started without --captions"):
        prepare(Request(tmp_path / "plain", "shots", captions=file), {"validation": str(tmp_path / "w")})


@pytest.mark.parametrize("rate", [0.0, 0.95, 1.0])
@pytest.mark.parametrize("source", ["folder"], indirect=True)
def test_share_in_training(source, rate, tmp_path):
    """Catches re-captions that training does not draw at the rate of the config."""
    folder, form = source
    file = written(tmp_path / "captions.jsonl", [line(form.format(key), f"long {key}") for key in "abcd"])
    prepare(Request(tmp_path / "out", "shots", captions=file), {"train": str(folder)})
    data = TFDS("shots", str(tmp_path / "out"), "train", label_key=None, caption_key="caption", caption_long_key="caption_long")
    captions, examples = Captions(long_caption_rate=rate), [data[i] for i in range(4)]
    texts = [captions.of(examples[i % 4], (), np.random.default_rng(i)) for i in range(2000)]
    share = np.mean([text.startswith("long") for text in texts])
    assert share == rate if rate in (0, 1) else abs(share - rate) < 0.015
    assert all(text.endswith(examples[i % 4]["caption"][-1]) for i, text in enumerate(texts))


@pytest.mark.parametrize(
    "lines, words",
    [
        ([line("a", "x"), "", line("a", "y")], r"line 3 of .* and line 1 are both of 'a'; leave one"),
        ([{"name": "a", "caption_long": "x"}], r"line 1 of .* has no model"),
        ([line("a", 3)], r"line 1 of .*: caption_long is 3, not a text"),
        ([line("a", " ")], r"line 1 of .* has an empty caption_long"),
        ([line("a", "x", "")], r"line 1 of .* has an empty model"),
        (["{"], r"line 1 of .* cannot be read as JSON"),
        (["[1]"], r"line 1 of .*: the content is \[1\], not an object"),
        ([""], r"hold no line"),
        ([line("a", "x" * (1 << 20) + "x")], r"1,048,577 bytes; at most 1,048,576 are read"),
        ([line("a", "x" * (1 << 21))], r"has more than 2,097,152 bytes"),
    ],
)
def test_files_that_are_wrong(lines, words, tmp_path):
    """Catches a line that is dropped or taken twice in silence, and an error that does not say where."""
    with pytest.raises(UserError, match=words):
        read_recaptions(written(tmp_path / "captions.jsonl", lines))


def test_names_of_other_data(tmp_path):
    """Catches a file for other data that is merged as nothing, one that is not UTF-8, and one that is not there."""
    found = read_recaptions(written(tmp_path / "captions.jsonl", [line("photos/a.png", "x")]))
    with pytest.raises(UserError, match=r"none of the 1 names in .* like 'photos/a.png', those of the images like 'a.png'"):
        match(found, {"train": ["a.png"]})
    (tmp_path / "latin.jsonl").write_bytes('{"name": "ä"}'.encode("latin-1"))
    with pytest.raises(UserError, match=r"line 1 of .* is not UTF-8 .*; save it as UTF-8"):
        read_recaptions(tmp_path / "latin.jsonl")
    with pytest.raises(UserError, match=r"cannot be read \(No such file"):
        read_recaptions(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match=r"No such file"):
        prepare(Request(tmp_path / "out", "shots", captions=str(tmp_path / "none.jsonl")), {"train": str(tmp_path)})
    assert not (tmp_path / "out").exists()
