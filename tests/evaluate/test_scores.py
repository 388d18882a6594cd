"""Features, their sums, references and results, with an extractor of random numbers."""

import json
import subprocess
import sys
import threading
import zipfile

import jax
import numpy as np
import pytest
from extractors import images, load
from kill_points import SHARES, check_every_kill, tree
from paths import ROOT
from PIL import Image
from verbs import quick_environment, run_verbs

from dit_jax.errors import UserError
from dit_jax.evaluate import reference, result_files, scores, snapshots, statistics
from dit_jax.evaluate.extractors import load as load_pixels
from dit_jax.evaluate.images import ArrayImages, Frames, NpzImages, cropped, open_images, open_samples
from dit_jax.evaluate.statistics import Wanted, extract
from dit_jax.metrics.frechet import frechet_distance, moments
from dit_jax.metrics.inception_score import class_sums, inception_score, partition
from dit_jax.sample import shards

ALL = Wanted(("features", "spatial"), True, True)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of 50 images, so that small sets have several."""
    monkeypatch.setattr(statistics, "CHUNK_IMAGES", 50)


def taken(count=117, wanted=ALL, **options):
    loaded = load()
    return extract(ArrayImages(images(count), "x"), loaded.extractor, loaded.params, wanted, **options)


def test_sums_are_those_of_all_features():
    """Rows of padding counted, a chunk lost or counted twice, sums in float32: moments and classes against plain NumPy."""
    loaded, found = load(), taken(batch_size=16)
    outputs = {name: np.asarray(x) for name, x in loaded.extractor(loaded.params, images(117)).items()}
    np.testing.assert_allclose(found.features, outputs["features"], atol=1e-5)
    for name in ("features", "spatial"):
        expected = moments(found.features if name == "features" else outputs[name])
        assert found.moments[name].count == 117
        np.testing.assert_allclose(found.moments[name].mean, expected.mean, rtol=1e-12 if name == "features" else 1e-5)
        tolerance = 1e-14 if name == "features" else 1e-6
        np.testing.assert_allclose(found.moments[name].covariance, expected.covariance, rtol=0, atol=tolerance)
    for name, sums in found.class_sums.items():
        expected = inception_score(class_sums(outputs["probabilities"], partition(name, 117)))
        assert inception_score(sums) == pytest.approx(expected, rel=1e-5)


def test_batch_size_does_not_matter():
    """A last batch that weighs more, or is dropped; batches 7 (of 8 devices), 16 and more than a chunk."""
    results = [taken(batch_size=size) for size in (7, 16, 64)]
    against = reference.of_images(ArrayImages(images(90, 1), "y"), taken(90), load())
    values = [scores.compute(("fid", "sfid", "is"), found, against, scores.Options())[0] for found in results]
    assert len({found.sha256 for found in results}) == 1
    for name in ("fid", "sfid", "is"):
        assert [v[name] for v in values] == pytest.approx([values[0][name]] * 3, rel=1e-6)


class Reciprocal:
    """An extractor whose features are infinite for black images."""

    name = "reciprocal"

    def __call__(self, params, images):
        return {"features": 1 / images.reshape(len(images), -1)[:, :3].astype(np.float32)}


def test_features_that_are_not_finite_are_named():
    """A Frechet distance of NaN, or an error that does not say which of 50,000 images it is about."""
    shown = np.maximum(images(117), 1)
    shown[[61, 77, 116]] = 0
    with pytest.raises(
        UserError, match="features of 2 of the images 50 to 99 of x contain NaN or infinity, the first are 61, 77"
    ):
        extract(ArrayImages(shown, "x"), Reciprocal(), {}, Wanted(), batch_size=16)


class Killed(Exception):
    pass


@pytest.mark.parametrize("harm", [None, "features", "sums"])
def test_going_on_after_a_kill(monkeypatch, tmp_path, harm):
    """Chunks counted twice or skipped after a kill, work of another job taken over, a damaged file believed."""

    def store(key=0):
        return snapshots.Snapshots(tmp_path, {"key": key}, 0, 1, every_seconds=0.0)

    whole = taken(220, batch_size=16)
    original, seen, enough = statistics._Worker.chunks, [], 3

    def chunks(self, images, numbers, parts):
        for number, result in original(self, images, numbers, parts):
            if len(seen) == enough:
                raise Killed
            seen.append(number)
            yield number, result

    monkeypatch.setattr(statistics._Worker, "chunks", chunks)
    with pytest.raises(Killed):
        taken(220, batch_size=16, snapshots=store())
    if harm:
        path = next(tmp_path.rglob("*features-00001.npz" if harm == "features" else "0-of-1.npz"))
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    seen.clear()
    enough = None
    found = taken(220, batch_size=16, snapshots=store())
    assert seen == ([0, 1, 2, 3, 4] if harm else [3, 4])
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(whole), strict=True):
        assert np.array_equal(a, b)
    seen.clear()
    taken(220, batch_size=16, snapshots=store(key=1))
    assert seen == [0, 1, 2, 3, 4]
    snapshots.remove(tmp_path)
    assert not tmp_path.exists()


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("what", ["scores", "reference"])
def test_killed_before_any_file_operation(what, share, tmp_path):
    """Snapshots or a partial file that stay, a result that is never written again, other numbers."""
    np.savez(tmp_path / "x.npz", images(110))
    options = scores.Options(replicates=100, kid_subset_size=20, every_seconds=0.0)

    def write(folder):
        if what == "scores":
            result_files.write_scores(
                folder / "x.json", str(tmp_path / "x.npz"), str(tmp_path / "x.npz"), "pixels", None, options, None
            )
        else:
            result_files.write_reference(folder / "x.npz", NpzImages(tmp_path / "x.npz"), load(), True, options)

    def ended(folder):
        return {name: data.replace(str(folder).encode(), b"") for name, data in tree(folder).items()}

    assert len(check_every_kill(tmp_path, write, share, ended, times=2)) > 20


def test_the_devices_do_not_wait_for_sums(monkeypatch):
    """Devices that stand still at the end of every chunk until its sums are on the host."""
    take, fetch, begun = statistics._Worker._take, statistics._Worker._fetch, [threading.Event() for _ in range(5)]

    def taking(self, chunk, *args):
        begun[chunk.number].set()
        return take(self, chunk, *args)

    def fetching(self, images, chunk):
        assert chunk.number == 4 or begun[chunk.number + 1].wait(60)
        return fetch(self, images, chunk)

    monkeypatch.setattr(statistics._Worker, "_take", taking)
    monkeypatch.setattr(statistics._Worker, "_fetch", fetching)
    assert taken(220, batch_size=16).count == 220


def test_singular_covariance_is_exact():
    """Sums in float32: 1e-7 in directions that no image spans, of which the square root makes a wrong distance."""
    a, b = taken(12, Wanted()), taken(15, Wanted(("features",), True))
    features = taken(12, Wanted(("features",), True)).features
    against = reference.Reference(b.moments, None, {"count": 15, "extractor": {}})
    found, remarks = scores.compute(("fid",), a, against, scores.Options(replicates=0))
    assert found["fid"] == pytest.approx(frechet_distance(moments(features), moments(b.features)), rel=1e-6)
    assert "12 samples and 15 reference images for 24 features" in remarks[0]


def test_reference_file(tmp_path):
    """A file that loses bits on the way, a flipped number that is scored, a pickle that is opened, another version's layout."""
    path, found = tmp_path / "ref.npz", taken(60)
    made = reference.of_images(ArrayImages(images(60), "x"), found, load())
    reference.write(path, made)
    again = reference.read(path)
    assert again.recipe == made.recipe and again.sha256 == found.sha256 and np.array_equal(again.features, found.features)
    assert np.array_equal(again.moments["spatial"].covariance, found.moments["spatial"].covariance)
    with np.load(path) as file:
        content = dict(file)
    for change, text in (
        ({"mu": content["mu"] + 1e-9}, "does not match its seal"),
        ({"format": np.array(9)}, "format 9"),
        ({"features": np.array([{}])}, "not a readable npz"),
        ({"sigma": content["sigma"][:2]}, "seal"),
    ):
        np.savez(tmp_path / "bad.npz", **{**content, **change})
        with pytest.raises(UserError, match=text):
            reference.read(tmp_path / "bad.npz")


def test_published_statistics(tmp_path):
    """ADM's file not read, its widths not checked, or compared with other features than Inception's."""
    path = tmp_path / "adm.npz"
    arrays = {"mu": np.zeros(2048, np.float32), "sigma": np.eye(2048, dtype=np.float32), "arr_0": images(20)}
    np.savez(path, **arrays)
    found = reference.read(path)
    assert found.moments["features"].mean.dtype == np.float64 and found.images.shape == (4, 4, 3) and found.published
    with pytest.raises(UserError, match="of Inception, but the samples' features are random"):
        scores.check_comparable(found, "adm.npz", load(), ArrayImages(images(20), "x"))
    for change, text in (
        ({"mu": np.zeros(64), "sigma": np.eye(64)}, "have 2048"),
        ({"sigma": np.eye(3)}, "must be floats"),
        ({"mu": np.full(2048, np.nan)}, "NaN"),
    ):
        np.savez(path, **{**arrays, **change})
        with pytest.raises(UserError, match=text):
            reference.read(path)


def test_what_cannot_be_compared():
    """Features of other weights or another size of images compared; both sides must be named."""
    made = reference.of_images(ArrayImages(images(60), "x"), taken(60), load())
    scores.check_comparable(made, "r", load(), ArrayImages(images(9), "x"))
    with pytest.raises(UserError, match=r"weights_sha256: '0+' there, '0+1' now"):
        scores.check_comparable(made, "r", load(seed=1), ArrayImages(images(9), "x"))
    with pytest.raises(UserError, match="samples are 2 x 2 x 3, but the reference r was made of 4 x 4 x 3"):
        scores.check_comparable(made, "r", load(), ArrayImages(images(9, shape=(2, 2, 3)), "x"))


def test_which_metrics_are_possible():
    """A metric that is asked for and silently left out; one that is possible and not computed."""
    few, many, loaded = ArrayImages(images(9), "x"), ArrayImages(images(60), "y"), load()
    names, remarks = scores.choose_metrics(few, many, loaded, scores.Options())
    assert names == ("fid", "sfid", "precision", "recall") and len(remarks) == 2
    names, _ = scores.choose_metrics(many, many, loaded, scores.Options(kid_subset_size=60))
    # Inception embeds no texts, and these are no clips.
    assert names == tuple(name for name in scores.METRICS if name not in ("clip_score", "frame_cosine"))
    statistics = reference.Reference(taken(60).moments, None, {"count": 60, "extractor": {}})
    with pytest.raises(UserError, match="metric recall: the reference has only statistics, neither"):
        scores.choose_metrics(many, statistics, loaded, scores.Options(("fid", "recall")))
    with pytest.raises(UserError, match="needs 1000 images on each side"):
        scores.choose_metrics(many, many, loaded, scores.Options(("kid",)))
    with pytest.raises(UserError, match="unknown metric 'fld'"):
        scores.choose_metrics(many, many, loaded, scores.Options(("fld",)))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_piece_by_piece(tmp_path, save):
    """Images read from the wrong place of a file, stored or compressed, in any order of pieces."""
    path, wanted = tmp_path / "x.npz", images(70)
    save(path, labels=np.arange(70), arr_0=wanted)
    found = NpzImages(path)
    for start, stop in ((0, 20), (50, 70), (20, 50)):
        assert np.array_equal(np.concatenate(list(found.batches(start, stop, 7))), wanted[start:stop])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_changed_byte_is_found(tmp_path, save):
    """An npz that a disk or a copy damaged, scored as if it were whole; a traceback in place of its name."""
    path = tmp_path / "x.npz"
    save(path, images(700))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.npz is damaged"):
        list(NpzImages(path).batches(0, 700, 20))


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"replicates": 3}, "at least 100"),
        ({"replicates": -1}, "at least 100"),
        ({"level": 1.5}, "between 0 and 1"),
        ({"kid_subset_size": 1}, "at least 1 subset of at least 2"),
    ],
)
def test_options_are_checked_first(changes, text):
    """A mistake in a flag that is told after hours of taking features: here before the samples are even opened."""
    with pytest.raises(UserError, match=text):
        scores.evaluate("not_there.npz", "digits", "pixels", None, scores.Options(**changes))


def test_folder_of_samples(tmp_path):
    """Shards read in another order, or an unfinished folder scored as if it were whole."""
    wanted = images(150)
    labels = np.arange(150, dtype=np.int32)
    folder = shards.Shards(tmp_path / "f", shards.settings_of(labels, (4, 4, 3), {"seed": 1}, {}), labels)
    with shards.claimed(folder):
        for k in range(folder.total):
            with pytest.raises(UserError, match=f"{k} of 3 shards"):
                open_samples(str(tmp_path / "f"))
            folder.write(k, wanted[64 * k : 64 * (k + 1)])
    found, loaded = open_samples(str(tmp_path / "f")), load()
    assert found.made_by["seed"] == 1
    same = extract(found, loaded.extractor, loaded.params, Wanted((), True), batch_size=16)
    assert same.sha256 == taken(150).sha256 and np.array_equal(same.features, taken(150, batch_size=16).features)


@pytest.mark.parametrize(
    "content, text",
    [
        ({"images": np.zeros((3, 8, 8, 1), np.uint8)}, "no array arr_0"),
        ({"arr_0": np.zeros((3, 8, 8, 1), np.float32)}, "uint8"),
        ({"arr_0": np.zeros((3, 8, 8), np.uint8)}, "uint8"),
        ({"arr_0": np.zeros((3, 8, 8, 2), np.uint8)}, "uint8"),
        ({"arr_0": np.zeros((1, 8, 8, 1), np.uint8)}, "N >= 2"),
        ({"arr_0": np.array([{}, {}])}, "object"),
        ({"arr_0": np.zeros((3, 2, 5, 8, 8, 1), np.uint8)}, "must be uint8"),
        (None, "not a readable npz"),
    ],
)
def test_bad_samples(tmp_path, content, text):
    """A file of another range or layout scored as if it were images; a pickle that is opened."""
    path = tmp_path / "x.npz"
    if content is None:
        path.write_bytes(b"PK not a zip")
    else:
        np.savez(path, **content)
    with pytest.raises(UserError, match=text):
        scores.evaluate(str(path), "digits", "pixels")


def test_a_huge_shape_allocates_nothing(tmp_path):
    """A header that promises terabytes."""
    path = tmp_path / "x.npz"
    np.savez(path, arr_0=np.zeros((3, 8, 8, 1), np.uint8))
    with zipfile.ZipFile(path) as archive:
        data = archive.read("arr_0.npy").replace(b"(3, 8, 8, 1), }" + b" " * 9, b"(99999999999, 8, 8, 1), }"[:24])
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", data)
    with pytest.raises(UserError, match="not a readable npz"):
        NpzImages(path)


def test_other_shapes_and_names(tmp_path):
    """A reference or feature space that is guessed; images that are resized to fit."""
    path = tmp_path / "x.npz"
    np.savez(path, arr_0=np.zeros((3, 16, 16, 1), np.uint8))
    for name, features, text in (
        ("digits", "pixels", "must be equal"),
        ("/nowhere", "pixels", "does not exist"),
        ("digits", "inception9", "is not registered; choose one of clip, dinov2, i3d, inception, pixels"),
        ("digits", "inception", "--weights"),
    ):
        with pytest.raises(UserError, match=text):
            scores.evaluate(str(path), name, features)


def test_images_that_are_not_square(tmp_path):
    """A reference that is cropped to a square, or with height and width swapped; a remedy that gives the same error again."""
    rng, folder, path = np.random.default_rng(0), tmp_path / "photographs", tmp_path / "x.npz"
    folder.mkdir()
    for k in range(20):
        Image.fromarray(rng.integers(0, 256, (24, 30, 3), np.uint8)).save(folder / f"{k:02d}.png")
    reference_images = open_images(str(folder), (8, 12, 3))
    crops = np.concatenate(list(reference_images.batches(0, 20, 7)))
    assert crops.shape == (20, 8, 12, 3) and reference_images.transform["size"] == [8, 12]
    np.savez(path, arr_0=crops)
    options = scores.Options(("fid",), replicates=0)
    assert scores.evaluate(str(path), str(folder), "pixels", options=options)["fid"] == pytest.approx(0, abs=1e-4)
    reference.write(tmp_path / "tall.npz", scores.make_reference(cropped(str(folder), (12, 8), 3), load_pixels("pixels"), False))
    with pytest.raises(UserError, match=r"8 x 12 x 3, .* of 12 x 8 x 3 images.*--resolution=8x12"):
        scores.evaluate(str(path), str(tmp_path / "tall.npz"), "pixels", options=options)


def test_a_folder_of_clips_is_opened(tmp_path):
    """Clips that are refused, frames in another order, or a reference of images that is refused only after hours of drawing."""
    labels = np.zeros(70, np.int32)
    folder = shards.Shards(tmp_path / "f", shards.settings_of(labels, (5, 4, 6, 3), {"seed": 1}, {}), labels)
    clips = np.random.default_rng(0).integers(0, 256, (70, 5, 4, 6, 3), np.uint8)
    with shards.claimed(folder):
        for k in range(folder.total):
            folder.write(k, clips[64 * k : 64 * (k + 1)])
    np.testing.assert_array_equal(np.concatenate([rows for _, rows, _ in shards.read(tmp_path / "f").rows(30)]), clips)
    opened = open_samples(str(tmp_path / "f"))
    assert opened.shape == (5, 4, 6, 3)
    frames = np.concatenate(list(Frames(opened).batches(0, 350, 16)))
    np.testing.assert_array_equal(frames, clips.reshape(-1, 4, 6, 3))
    with pytest.raises(UserError, match="they must be equal"):
        scores.check("digits", "pixels", None, (5, 4, 6, 3))


def test_whole_evaluation(tmp_path, monkeypatch):
    """A result that does not say what it was computed of, or another number than the metric files give."""
    monkeypatch.setattr(statistics, "CHUNK_IMAGES", 1_000)
    digits = np.concatenate(list(open_images("digits", (8, 8, 1)).batches(0, 1797, 300)))
    np.savez(tmp_path / "x.npz", arr_0=digits[:400], made_by=np.array(json.dumps({"sampler": {"name": "ddim"}})))
    found = scores.evaluate(
        str(tmp_path / "x.npz"),
        "digits",
        "pixels",
        folder=tmp_path / "work",
        options=scores.Options(("fid", "kid"), kid_subset_size=50),
    )
    flat = digits.reshape(len(digits), -1) / 127.5 - 1
    assert found["fid"] == pytest.approx(frechet_distance(moments(flat[:400]), moments(flat)), rel=1e-5)
    assert found["fid_interval"][0] < found["fid"] < found["fid_interval"][1]
    assert "precision" not in found and abs(found["kid"]) < 0.05 and found["kid_subset_size"] == 50
    assert found["made_by"] == {"sampler": {"name": "ddim"}} and found["num_reference"] == 1797
    assert found["extractor"]["name"] == "pixels" and found["versions"]["jax"] == jax.__version__
    json.dumps(found, allow_nan=False)


def test_the_split_of_a_reference(tmp_path):
    """A distance to all 1,797 digits where --split=test asks for 297; a set that is not at no distance from itself."""
    test = np.concatenate(list(open_images("digits", (8, 8, 1), "test").batches(0, 297, 300)))
    np.savez(tmp_path / "x.npz", arr_0=test)
    found = scores.evaluate(str(tmp_path / "x.npz"), "digits", "pixels", split="test", options=scores.Options(("fid",)))
    assert (found["num_reference"], found["reference_split"], found["fid"]) == (297, "test", 0)
    assert found["fid_interval"][0] <= 0 <= found["fid_interval"][1]
    with pytest.raises(UserError, match=r"--split=test has no effect with --reference=.*an npz"):
        scores.evaluate(str(tmp_path / "x.npz"), str(tmp_path / "x.npz"), "pixels", split="test")


UNUSED = {
    "evaluate --samples=x.npz --reference=digits --data=digits": "--data has no effect with --samples",
    "evaluate --samples=x.npz --reference=digits --keep_features": "--keep_features has no effect",
    "evaluate --samples=x.npz --reference=digits --metrics=fid --kid_subset_size=5": "--kid_subset_size has no effect",
    "evaluate --samples=x.npz --reference=digits --replicates=0 --level=0.9": "--level has no effect with --replicates=0",
    "evaluate --samples=x.npz --metrics=is --split=test": "--split has no effect with no --reference",
    "evaluate --make_reference=r.npz --data=digits --channels=1": "--channels has no effect with --data=digits",
    "evaluate --make_reference=r.npz --data=x.npz --split=test": "--split has no effect with --data=x.npz",
    "evaluate --make_reference=r.npz --data=digits --out=y": "--out has no effect with --make_reference",
    "evaluate --table=a.json --features=inception": "--features has no effect with --table",
    "evaluate --table=a.json --split=test": "--split has no effect with --table",
}


@pytest.mark.slow
def test_flags_that_a_task_does_not_use_are_refused(tmp_path):
    """A flag that is ignored, and a number that is not what it says."""
    found = run_verbs(tmp_path, [line.split() for line in UNUSED])
    for (status, _, error), text in zip(found, UNUSED.values(), strict=True):
        assert status == 2, error
        assert text in error
        assert error.count("\n") <= 2


def test_an_unreadable_reference_image_is_named(tmp_path):
    """A broken file left out of a reference, whose statistics then are of other images than its name says."""
    for i in range(4):
        Image.fromarray(images(1, i)[0]).save(tmp_path / f"{i}.png")
    (tmp_path / "2.png").write_bytes(b"no image")
    loaded = load()
    with pytest.raises(UserError, match=r"2\.png"):
        extract(open_images(str(tmp_path), (4, 4, 3)), loaded.extractor, loaded.params, Wanted())


@pytest.mark.slow
def test_processes_do_not_matter(tmp_path):
    """Chunks read twice or not at all, sums rounded on their way between processes, features in another order; a score that is
    printed twice."""
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "x.npz", arr_0=rng.integers(0, 256, (3_333, 4, 4, 3), np.uint8))
    np.savez(tmp_path / "y.npz", arr_0=rng.integers(0, 256, (2_500, 4, 4, 3), np.uint8))
    found = []
    for processes, batch in ((1, 64), (2, 7)):
        command = [
            sys.executable,
            "launch/local.py",
            f"--processes={processes}",
            "--devices=2",
            f"--logs={tmp_path}",
            "--",
            sys.executable,
            "-m",
            "dit_jax.evaluate",
            f"--samples={tmp_path / 'x.npz'}",
            f"--batch_size={batch}",
            f"--reference={tmp_path / 'y.npz'}",
            f"--out={tmp_path / str(processes)}.json",
        ]
        process = subprocess.run(command, cwd=ROOT, env=quick_environment(), capture_output=True, text=True, timeout=300)
        assert process.returncode == 0, process.stderr
        assert sum(line.startswith("{") for line in process.stdout.splitlines()) == 1  # Gloo writes to stdout too
        found.append(json.loads(process.stdout.splitlines()[-1]))
    for name in ("samples_sha256", "reference_sha256", "num_samples", "precision", "recall"):
        assert found[0][name] == found[1][name]
    for name in ("fid", "kid"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-6)
    assert found[0]["fid_interval"] == pytest.approx(found[1]["fid_interval"], rel=1e-6)


@pytest.mark.parametrize(
    "labels, made_by, says",
    [
        (np.resize([3, 5], 30), {}, "have the labels 3, 5 and the reference digits has 0 to 9"),
        (np.arange(30) % 10, {}, None),
        (np.full(30, 10), {"labels": "none"}, None),
        (None, {}, None),
    ],
)
def test_missing_classes_are_said(tmp_path, labels, made_by, says):
    """Two classes scored against ten: a distance of 11.6 that looks like a bad model."""
    arrays = {
        "arr_0": np.random.default_rng(0).integers(0, 256, (30, 8, 8, 1), np.uint8),
        "made_by": np.array(json.dumps(made_by)),
    }
    np.savez(tmp_path / "x.npz", **arrays, **({} if labels is None else {"labels": labels}))
    remarks = scores.evaluate(str(tmp_path / "x.npz"), "digits", "pixels")["remarks"]
    assert [says in remark for remark in remarks if "labels" in remark] == [True] * (says is not None)
