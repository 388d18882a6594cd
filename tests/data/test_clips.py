"""Clips: files and folders of frames as examples, the frames that a transform takes, and files that are bad records."""

import io
import json
import pickle

import numpy as np
import pytest
from clip_files import animation, film, moving, sound
from PIL import Image
from tar_files import encoded, write_tar

from dit_jax.data import stored_clips
from dit_jax.data.clip_transform import ClipTransform
from dit_jax.data.loader import Loader
from dit_jax.data.sources import TFDS, ClipFolder, ImageFolder, TarShards, tf_examples
from dit_jax.data.stored_clips import FrameFiles, StoredClip
from dit_jax.data.transforms import ImageTransform
from dit_jax.errors import UserError
from dit_jax.prepare import array_records
from dit_jax.prepare.array_records import tf_example


def frames(clip, part=slice(None)):
    return np.stack(list(clip[part]))


@pytest.mark.parametrize("kind", ["WEBP", "GIF"])
def test_animations_are_read_frame_by_frame(kind):
    """Frames of the wrong number, a rate in other units, durations that belong to the next frame."""
    clip = moving()
    stored = StoredClip(animation(clip, kind, 120), "x")
    assert stored.facts() == (6, 10, 12, pytest.approx(1000 / 120, abs=1e-5))
    np.testing.assert_array_equal(frames(stored), clip)
    np.testing.assert_array_equal(frames(stored, slice(1, 6, 2)), clip[1::2])
    still = StoredClip(animation(clip[2:3], kind), "x")
    assert still.facts() == (1, 10, 12, 0)
    np.testing.assert_array_equal(frames(still), clip[2:3])


def test_durations_agree_with_pillow():
    """A parser of blocks that loses a frame, or skips a colour table or an extension."""
    rng = np.random.default_rng(0)
    clip = rng.integers(0, 256, (5, 33, 31, 3), np.uint8)
    for kind in ("WEBP", "GIF"):
        data = animation(clip, kind, [100, 110, 90, 100, 500])
        with Image.open(io.BytesIO(data)) as picture:
            assert picture.n_frames == 5
        times = StoredClip(data, "x")._reader.times
        np.testing.assert_allclose(times, [0, 0.1, 0.21, 0.3, 0.4], atol=1e-9)


def test_films_are_read_frame_by_frame():
    """Frames beside the wanted ones, or another first one after a seek to a key frame; an odd size that is cut."""
    pytest.importorskip("av")
    clip = moving(30, 11, 13)
    stored = StoredClip(film(clip, options={"g": "8"}), "x")
    assert stored.facts() == (30, 11, 13, 8.0)
    for part in (slice(None), slice(13, 30, 3), slice(29, 30), slice(0, 1), slice(7, 9)):
        np.testing.assert_array_equal(frames(stored, part), clip[part])


def test_seeking_in_a_compressed_film_gives_the_frames_of_reading_it_all():
    """A seek that lands behind the wanted frame, where frames are stored in another order than shown."""
    pytest.importorskip("av")
    rng = np.random.default_rng(0)
    clip = np.repeat(np.repeat(rng.integers(0, 256, (40, 8, 8, 3), np.uint8), 8, 1), 8, 2)
    data = film(clip, "libx264", kind="mp4", options={"g": "10", "bf": "2"})
    whole = frames(StoredClip(data, "x"))
    for part in (slice(17, 40, 5), slice(39, 40), slice(11, 13)):
        np.testing.assert_array_equal(frames(StoredClip(data, "x"), part), whole[part])


def test_rotated_films_stand_upright():
    """Films of telephones, which lie on their side; a rotation in the wrong direction."""
    pytest.importorskip("av")
    clip = moving(3, 10, 12)
    stored = StoredClip(film(clip, "mpeg4", kind="mp4", rotation=90, options={"qscale": "1"}), "x")
    assert stored.facts()[1:3] == (12, 10)
    assert np.abs(frames(stored).astype(int) - np.rot90(clip, 1, (1, 2))).mean() < 20


BAD = {
    "uneven.webp": (lambda: animation(moving(), "WEBP", [100, 100, 300, 100, 100, 100]), "variable frame rate"),
    "cut.webp": (lambda: animation(moving())[:-40], "not a readable clip"),
    "cut.gif": (lambda: animation(moving(), "GIF")[:200], "not a readable clip"),
    "text.gif": (lambda: b"GIF89a, or not", "not a readable clip"),
}
BAD_FILMS = {
    "uneven.mkv": (lambda: film(moving(), times=[0, 1, 2, 5, 6, 7]), "variable frame rate"),
    "sound.mkv": (sound, "no moving picture, only audio"),
    "text.mp4": (lambda: b"no film at all", "not a readable clip"),
    "empty.mp4": (lambda: b"", "not a readable clip"),
    "cut.mp4": (lambda: film(moving(), "mpeg4", kind="mp4")[:-300], "not a readable clip"),
}


@pytest.mark.parametrize("name", [*BAD, *BAD_FILMS])
def test_bad_files_are_user_errors(name):
    """A decoder's own error, which would end the run; a file that is read half and trained on."""
    if name in BAD_FILMS:
        pytest.importorskip("av")
    make, message = (BAD | BAD_FILMS)[name]
    with pytest.raises(UserError, match=f"{name}.* {message}|{name} {message}"):
        list(StoredClip(make(), name)[:])


def test_limits(monkeypatch, tmp_path):
    """A film of hours that fills the memory."""
    monkeypatch.setattr(stored_clips, "MOST_FRAMES", 5)
    with pytest.raises(UserError, match="6 frames; the limit is 5"):
        len(StoredClip(animation(moving()), "x"))
    monkeypatch.setattr(stored_clips, "MOST_BYTES", 1 << 20)
    with pytest.raises(UserError, match="has 2 MiB, and at most 1"):
        stored_clips.check_bytes(2 << 20, "x")


def test_which_frames_a_transform_takes():
    """A stride from another rate, a start that never reaches the end, frames of two strides."""
    clip = moving(20, 8, 8)
    transform = ClipTransform(4, 8, 3, False, fps=4)
    example = {"video": clip, "fps": 8.0, "label": 3}
    middle = transform(example)
    assert middle["image"].shape == transform.shape == (4, 8, 8, 3) and middle["label"] == 3
    np.testing.assert_array_equal(middle["image"], clip[7:14:2])
    starts = set()
    for seed in range(200):
        taken = transform.random_map(example, np.random.default_rng(seed))["image"]
        start = next(k for k in range(20) if (taken[0] == clip[k]).all())
        np.testing.assert_array_equal(taken, clip[start : start + 7 : 2])
        starts.add(start)
    assert starts == set(range(14))  # 13 + 6 is the last of 20 frames
    one = ClipTransform(1, 8, 3, False, fps=4)
    assert len({one.random_map(example, np.random.default_rng(k))["image"].tobytes() for k in range(200)}) == 20


def test_one_crop_and_one_flip_for_all_frames():
    """Frames that are mirrored or cut one by one, which a network would learn as motion."""
    clip = np.broadcast_to(np.random.default_rng(0).integers(0, 256, (1, 8, 16, 3), np.uint8), (5, 8, 16, 3))
    transform = ClipTransform(4, 8, 3, True, crop="random")
    found = set()
    for seed in range(60):
        taken = transform.random_map({"video": clip, "label": 0}, np.random.default_rng(seed))["image"]
        assert (taken == taken[:1]).all()
        places = [(x, flip) for x in range(9) for flip in (1, -1) if (taken[0] == clip[0, :, x : x + 8][:, ::flip]).all()]
        assert len(places) == 1
        found |= set(places)
    assert {x for x, _ in found} == set(range(9)) and {flip for _, flip in found} == {1, -1}
    again = [transform.random_map({"video": clip, "label": 0}, np.random.default_rng(5))["image"] for _ in range(2)]
    np.testing.assert_array_equal(*again)


def test_images_are_clips_of_one_frame():
    """An image that cannot be trained on beside clips, or that is stretched to several frames."""
    image = {"image": encoded(1), "label": 0, "name": "x.png"}
    taken = ClipTransform(1, 8, 3, False)(image)["image"]
    np.testing.assert_array_equal(taken[0], ImageTransform(8, 3, False)(image)["image"])
    with pytest.raises(UserError, match=r"x\.png has 1 frames, and 2 with a stride of 1 need 2"):
        ClipTransform(2, 8, 3, False)(image)
    animated = ClipTransform(3, 8, 3, False)({"image": animation(moving(3, 8, 8)), "label": 0})
    np.testing.assert_array_equal(animated["image"], moving(3, 8, 8))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"frames": 0}, "frames=0"),
        ({"fps": 0.0}, "fps=0"),
        ({"crop": "left"}, "'left' must be one of center, random"),
        ({"channels": 2}, "channels=2"),
        ({"size": (0, 4)}, "size"),
    ],
)
def test_bad_fields(fields, message):
    """A value that is understood in another way than it was meant."""
    with pytest.raises(UserError, match=message):
        ClipTransform(**{"frames": 2, "resolution": 8, "channels": 3, "flip": False} | fields)


@pytest.fixture
def clips(tmp_path):
    """Two classes: files of three kinds, a folder of frames in a sub-folder, captions."""
    (tmp_path / "a" / "deep" / "x.frames").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    for number in (10, 2, 1):
        Image.fromarray(moving(3)[{1: 0, 2: 1, 10: 2}[number]]).save(tmp_path / "a" / "deep" / "x.frames" / f"f_{number}.png")
    (tmp_path / "a" / "deep" / "x.frames.txt").write_text("frames in a folder")
    (tmp_path / "a" / "one.webp").write_bytes(animation(moving()))
    (tmp_path / "a" / "one.txt").write_text("a rolling bar")
    (tmp_path / "a" / "one.long.txt").write_text("a bar that rolls on and on")
    (tmp_path / "b" / "two.gif").write_bytes(animation(moving(4), "GIF"))
    Image.new("RGB", (4, 4)).save(tmp_path / "b" / "two.jpg")  # a thumbnail
    return tmp_path


def test_folders_of_clips(clips, capsys):
    """Frames that are examples, in the order of text; captions of another clip; a thumbnail that is a clip of one frame."""
    source = ClipFolder(clips, fps=5)
    assert source.class_names == ("a", "b") and source.labels.tolist() == [0, 0, 1] and len(source) == 3
    first, second, third = (source[i] for i in range(3))
    assert isinstance(first["video"], FrameFiles) and first["fps"] == 5 and first["caption"] == "frames in a folder"
    np.testing.assert_array_equal(frames(first["video"]), moving(3))
    assert second["caption"] == "a rolling bar" and second["caption_long"].endswith("on and on")
    assert second["fps"] == third["fps"] == pytest.approx(25 / 3, abs=1e-5) and "caption" not in third and third["label"] == 1
    np.testing.assert_allclose(source.sizes(), [[3, 10, 12, 5], [6, 10, 12, 25 / 3], [4, 10, 12, 25 / 3]], 1e-6)
    assert "1 x images beside clips" in capsys.readouterr().err
    changed = ClipFolder(clips, fps=6)
    assert changed.fingerprint != source.fingerprint == ClipFolder(clips, fps=5).fingerprint


def test_a_folder_without_classes(clips):
    """A folder of frames that is taken for a class."""
    source = ClipFolder(clips / "a" / "deep")
    assert len(source) == 1 and source.num_classes == 0 and source[0]["fps"] == 0
    with pytest.raises(UserError, match=r"x\.frames has no frame rate, and transform\.fps is 4"):
        ClipTransform(2, 8, 3, False, fps=4)(source[0])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda path: (path / "c").mkdir(), "class folder 'c' holds no clips"),
        (lambda path: (path / "loose.webp").write_bytes(b""), "1 clips such as loose.webp are in no class folder"),
        (lambda path: Image.new("RGB", (4, 4)).save(path / "x.png"), "frames of one clip"),
    ],
)
def test_folders_that_are_no_data_set(clips, change, message):
    """Clips that are left out without a word."""
    change(clips)
    with pytest.raises(UserError, match=message):
        ClipFolder(clips)


def test_frames_of_several_sizes_are_bad(clips):
    """A clip that jumps, as each frame is cropped by itself."""
    Image.new("RGB", (6, 6)).save(clips / "a" / "deep" / "x.frames" / "f_3.png")
    with pytest.raises(UserError, match=r"x\.frames has frames of several sizes"):
        ClipTransform(4, 8, 3, False)(ClipFolder(clips)[0])


def test_films_need_pyav(clips, monkeypatch):
    """A run that ends with its hundredth bad record instead of the name of the package."""
    (clips / "b" / "three.mp4").write_bytes(b"x")
    monkeypatch.setattr(stored_clips.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"three.mp4 needs PyAV.*dit_jax\[video\]"):
        ClipFolder(clips)


def test_bad_clips_are_replaced(clips, capsys):
    """A broken file or a short clip that ends the run, although a share of bad records is tolerated."""
    (clips / "b" / "broken.webp").write_bytes(BAD["cut.webp"][0]())
    loader = Loader(ClipFolder(clips), ClipTransform(4, 8, 3, True), 4, 0, max_bad_share=0.5)
    with loader.batches() as batches:
        shapes = {next(batches)["image"].shape for _ in range(4)}
        assert shapes == {(4, 4, 8, 8, 3)} and set(batches.bad_records) == {0, 2}
    err = capsys.readouterr().err
    assert "x.frames has 3 frames" in err and "broken.webp is not a readable clip" in err


def test_tars_of_clips(tmp_path):
    """A clip that is read as an image, or the other way; a sample of both; labels and captions that clips lose."""
    members = {"a.webp": animation(moving()), "a.cls": b"1", "a.txt": b"a bar", "b.png": encoded(0), "b.cls": b"0"}
    write_tar(tmp_path / "x.tar", members)
    source = TarShards(str(tmp_path))
    np.testing.assert_allclose(source.sizes(), [[6, 10, 12, 25 / 3], [1, 10, 12, 0]], 1e-6)
    clip = ClipTransform(6, 10, 3, False, size=(10, 12))(source[0])
    np.testing.assert_array_equal(clip["image"], moving())
    assert clip["label"] == 1 and source[0]["caption"] == "a bar"
    assert ImageTransform(8, 3, False)(source[0])["image"].shape == (8, 8, 3)  # its first frame
    write_tar(tmp_path / "x.tar", members | {"b.mp4": b"x"})
    with pytest.raises(UserError, match="has 2 images among its members"):
        TarShards(str(tmp_path))


def test_tars_of_films(tmp_path):
    """A film that is handed to Pillow."""
    pytest.importorskip("av")
    clip = moving(5)
    write_tar(tmp_path / "x.tar", {"deep/a.MKV": film(clip), "deep/a.json": b'{"caption": "a bar"}', "b.png": encoded(0)})
    source = TarShards(str(tmp_path))
    np.testing.assert_array_equal(source.sizes(), [[5, 10, 12, 8], [1, 10, 12, 0]])
    assert source[0]["fps"] == 8 and source[0]["name"] == "x.tar:deep/a.mkv" and source[1]["name"] == "x.tar:b"
    np.testing.assert_array_equal(frames(source[0]["video"]), clip)
    with pytest.raises(UserError, match=r"x\.tar:deep/a\.mkv is a clip.*transform\.name"):
        ImageTransform(8, 3, False)(source[0])


def test_sizes_of_images(tmp_path):
    """Sizes that ignore the orientation of a photograph, or read the whole file; a broken file that is in no bucket."""
    picture = Image.new("RGB", (20, 10))
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "a.jpg", exif=exif)
    (tmp_path / "b.png").write_bytes(b"broken")
    source = ImageFolder(tmp_path)
    np.testing.assert_array_equal(source.sizes(), [[1, 10, 20, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(source.sizes(upright=True)[0], [1, 20, 10, 0])


@pytest.fixture(scope="module")
def moves(tmp_path_factory):
    """A TFDS data_dir with three clips of a Video feature, as TFDS writes UCF-101, without TensorFlow."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter

    root = tmp_path_factory.mktemp("tfds")
    version = root / "moves" / "1.0.0"
    version.mkdir(parents=True)
    features = tfds.features.FeaturesDict({"label": tfds.features.ClassLabel(names=["a", "b"]), "text": tfds.features.Text()})
    template = tfds.core.ShardedFileTemplate(
        template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        dataset_name="moves",
        data_dir=str(version),
        filetype_suffix="array_record",
    )
    writer = ArrayRecordWriter(str(version / "moves-train.array_record-00000-of-00001"), "group_size:1")
    for number in range(3):
        images = [png(frame) for frame in moving(4 + number)]
        writer.write(tf_example({"video": images, "label": number % 2, "text": b" a bar \n"}))
    writer.close()
    split = tfds.core.SplitInfo(name="train", shard_lengths=[3], num_bytes=0, filename_template=template)
    tfds.folder_dataset.write_metadata(data_dir=str(version), features=features, check_data=False, split_infos=[split])
    described = json.loads((version / "features.json").read_text())
    video = {"shape": {"dimensions": ["-1", "10", "12", "3"]}, "dtype": "uint8", "encodingFormat": "png"}
    name = "tensorflow_datasets.core.features.video_feature.Video"
    described["featuresDict"]["features"]["video"] = {"pythonClassName": name, "video": video}
    (version / "features.json").write_text(json.dumps(described))
    return root


def png(frame):
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "PNG")
    return file.getvalue()


def test_clips_of_tfds(moves):
    """Frames that need TensorFlow; the first frame for the whole clip; labels or captions of another record."""
    source = TFDS("moves", str(moves), "train", video_key="video", caption_key="text", fps=25.0)
    assert len(source) == 3 and source.num_classes == 2
    for number in (2, 0):
        example = source[number]
        np.testing.assert_array_equal(frames(example["video"]), moving(4 + number))
        assert (example["label"], example["caption"], example["fps"]) == (number % 2, "a bar", 25.0)
    copy = pickle.loads(pickle.dumps(source))
    assert ClipTransform(4, 8, 3, False)(copy[1])["image"].shape == (4, 8, 8, 3)
    assert TFDS("moves", str(moves), "train", video_key="video").fingerprint != source.fingerprint


@pytest.mark.parametrize(
    "fields, message",
    [
        ({}, "moves has clips: give data.video_key='video'"),
        ({"video_key": "label"}, "video_key='label' names no Sequence feature"),
        ({"fps": 5.0}, "data.fps=5.0 is the rate of clips"),
        ({"video_key": "video", "fps": 0.0}, "data.fps=0.0"),
    ],
)
def test_fields_of_clips_of_tfds(fields, message, moves):
    """A field that has no effect, or that ends in TFDS's own error."""
    with pytest.raises(UserError, match=message):
        TFDS("moves", str(moves), "train", **fields)


def test_messages_of_examples():
    """Numbers of several bytes or below 0, packed or not, and a message that is cut."""
    number = bytes([*[255] * 9, 1])
    packed = array_records._field(3, array_records._field(1, array_records._varint(300) + number))
    single = array_records._field(3, bytes([8]) + array_records._varint(300) + bytes([8]) + number)
    for feature in (packed, single):
        entry = array_records._field(1, b"x") + array_records._field(2, feature)
        data = array_records._field(1, array_records._field(1, entry))
        assert tf_examples.features(data) == {"x": [300, -1]}
    for cut in range(1, len(data)):
        with pytest.raises(ValueError, match="truncated"):
            tf_examples.features(data[:cut])
    assert tf_examples.features(tf_example({"a": b"bytes", "b": [b"", b"c"]})) == {"a": [b"bytes"], "b": [b"", b"c"]}
