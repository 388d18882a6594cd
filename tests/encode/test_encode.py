"""Writing a latent cache: the bytes depend on the job alone, whatever was killed, damaged or shared out on the way."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from kill_points import SHARES, check_every_kill
from latents import CODEC, Photographs, contents, flip_byte, job, params
from verbs import ROOT, refused, run_verbs

from dit_jax.codecs.causal_vae import CausalVAE
from dit_jax.codecs.kl_vae import normalised
from dit_jax.data import latent_files
from dit_jax.data.clip_transform import ClipTransform
from dit_jax.data.latents import LatentCache
from dit_jax.data.transforms import ImageTransform
from dit_jax.encode import writer
from dit_jax.encode.cache_folder import claimed, finish
from dit_jax.encode.writer import Job, Members, encode, encode_shards
from dit_jax.errors import UserError
from dit_jax.interop.vae import save_diffusers, weights_sha256
from dit_jax.pixels import to_float
from dit_jax.storage.sealed import sha256_of

SHARE = 0.05  # of bad records: 2 of 70 are


@pytest.fixture(scope="module")
def weights():
    return params()


@pytest.fixture(scope="module")
def whole(weights, tmp_path_factory):
    """A cache that nothing happened to: (folder, manifest, bytes of its files)."""
    folder = tmp_path_factory.mktemp("cache") / "whole"
    manifest, rate = encode(job(weights), folder, SHARE)
    assert rate > 0
    return folder, manifest, contents(folder)


@pytest.fixture
def compiled(weights, monkeypatch):
    """Compiles once for many short runs of one job."""
    encoder = writer.DeviceEncoder(job(weights))
    monkeypatch.setattr(writer, "DeviceEncoder", lambda job: encoder)


def copy_to(folder, files):
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def test_moments_are_the_codecs_own(whole, weights):
    """Rows shifted by a bad record or the padding of a batch, a mirror image in the wrong place, moments scaled or cut off."""
    cache = LatentCache(whole[0])
    source, transform = Photographs(), job(weights).transform
    good = [i for i in range(70) if i not in source.bad]
    assert cache.source_index.tolist() == good and cache.labels.tolist() == [source[i]["label"] for i in good]
    images = np.stack([transform(source[i])["image"] for i in good])
    images = np.stack([images, images[:, :, ::-1]], 1).reshape(-1, 8, 8, 3)
    expected = np.asarray(jax.jit(CODEC.encode)(weights, to_float(images)))
    stored = cache.gather(np.arange(2 * len(good)))
    assert stored.dtype == np.float16 and stored.shape == (136, 4, 4, 4)
    np.testing.assert_allclose(stored, expected, rtol=1e-3, atol=1e-5)  # half a unit of float16, and another batch size
    assert cache.captions(np.array([0, 1, 3])) == ["number 0, zażółć", None, "number 3, zażółć"]


def test_statistics(whole):
    """A variance without the posterior's own, or of the scaled latent; sums in float16 or float32."""
    cache = LatentCache(whole[0])
    mean, log_variance = np.split(cache.gather(np.arange(136)).astype(np.float64), 2, axis=-1)
    latents = whole[1]["latents"]
    axes = (0, 1, 2)
    np.testing.assert_allclose(latents["mean"], mean.mean(axes), rtol=1e-12)
    np.testing.assert_allclose(np.square(latents["std"]), mean.var(axes) + np.exp(log_variance).mean(axes), rtol=1e-12)
    codec = normalised(CODEC, **latents)
    z = np.asarray(codec.sample_latent(jax.random.key(0), cache.gather(np.arange(136))))
    np.testing.assert_allclose(z.mean(axes), 0, atol=0.1)
    np.testing.assert_allclose(z.std(axes), 1, atol=0.1)


def test_the_manifest_says_what_a_reader_needs(whole):
    """A field of the specification that is missing; a count that includes bad records; an address in the reason of one."""
    manifest = whole[1]
    assert manifest["count"] == 68 and manifest["source"]["records"] == 70 and manifest["views"] == 2
    assert manifest["bad_records"]["count"] == 2 and manifest["captions"] == 24
    reason = "photograph 11 is not readable: restore it <object>"
    assert json.loads(whole[2]["manifest.json"])["bad_records"]["first"][0] == [11, reason]
    assert manifest["codec"]["scale"] == 0.18215 and len(manifest["codec"]["weights_sha256"]) == 64
    assert manifest["transform"] == {"resolution": 8, "channels": 3, "upright": False, "crop": "adm_center"}
    assert manifest["class_names"] == ["ant", "bee", "cat", "dog", "eel"] and len(manifest["shards"]) == 3
    assert [shard["count"] for shard in manifest["shards"]] == [29, 29, 10]


def test_images_that_are_not_square(weights, tmp_path):
    """Height and width swapped anywhere between the crop and the files; a size that the manifest does not say."""
    wide = job(weights, size=(8, 12), source=Photographs(6, ()), shard_records=4)
    manifest, _ = encode(wide, tmp_path / "cache")
    transform = {"resolution": None, "size": [8, 12], "channels": 3, "upright": False, "crop": "adm_center"}
    assert manifest["transform"] == transform and manifest["moments"]["shape"] == [4, 6, 4]
    images = np.stack([wide.transform(wide.source[i])["image"] for i in range(6)])
    assert images.shape == (6, 8, 12, 3)
    images = np.stack([images, images[:, :, ::-1]], 1).reshape(-1, 8, 12, 3)
    expected = np.asarray(jax.jit(CODEC.encode)(weights, to_float(images)))
    np.testing.assert_allclose(LatentCache(tmp_path / "cache").gather(np.arange(12)), expected, rtol=1e-3, atol=1e-5)
    with pytest.raises(UserError, match=r"transform\.size"):
        encode(dataclasses.replace(wide, size=(12, 8)), tmp_path / "cache")
    with pytest.raises(UserError, match="width 7 is not a positive multiple"):
        job(weights, size=(8, 7))


@pytest.mark.slow
def test_stopped_at_every_rename_it_ends_with_the_same_bytes(whole, weights, compiled, tmp_path, monkeypatch):
    """A state on disk from which the same command does not reach the cache of an undisturbed run."""
    replace = os.replace
    calls = 0

    def stop_at(k):
        def failing(a, b):
            nonlocal calls
            calls += 1
            if calls == k:
                raise InterruptedError("killed")
            replace(a, b)

        return failing

    stopped = 0
    for k in range(1, 100):
        calls, folder = 0, tmp_path / f"{k}"
        monkeypatch.setattr(os, "replace", stop_at(k))
        try:
            encode(job(weights), folder, SHARE)
        except (InterruptedError, UserError):
            stopped += 1
            assert not (folder / "manifest.json").exists()
            with pytest.raises(UserError, match=r"not finished|not a latent cache"):
                LatentCache(folder)
        monkeypatch.setattr(os, "replace", replace)
        encode(job(weights), folder, SHARE)
        assert contents(folder) == whole[2], f"stopped at rename {k}"
        if calls < k:
            break
    assert stopped == 1 + 3 * 6 + 1


def test_whole_shards_are_not_encoded_again(whole, weights, compiled, tmp_path, monkeypatch):
    """Going on that starts from the beginning."""
    files = {name: data for name, data in whole[2].items() if not name.startswith(("00001", "manifest"))}
    folder = copy_to(tmp_path / "cache", files)
    seen = []
    read = Photographs.__getitem__
    monkeypatch.setattr(Photographs, "__getitem__", lambda self, i: (seen.append(int(i)), read(self, i))[1])
    encode(job(weights), folder, SHARE)
    assert sorted(seen) == list(range(30, 60)) and contents(folder) == whole[2]


@pytest.mark.parametrize("hosts", [2, 5])
def test_any_number_of_hosts_writes_the_same_files(whole, weights, compiled, hosts, tmp_path):
    """Names or bytes that depend on the host; a shard encoded by nobody, or a manifest before all are there."""
    for leftover in ("settings.json.7", "settings.json.8.partial"):  # of another number of hosts, killed
        (tmp_path / leftover).write_text("{")
    for index in reversed(range(hosts)):
        encode_shards(job(weights), tmp_path, SHARE, 4, index, hosts)
        if index:
            with pytest.raises(UserError, match="same --out"):
                finish(tmp_path, SHARE, True)
    finish(tmp_path, SHARE, True)
    assert contents(tmp_path) == whole[2]


def test_any_number_of_devices_writes_the_same_files(whole, weights, tmp_path, monkeypatch):
    """A program, and so the last bits, that depend on how many devices share a batch."""
    device = jax.local_devices()[:1]
    monkeypatch.setattr(jax, "local_devices", lambda: device)
    encode(job(weights), tmp_path, SHARE)
    assert contents(tmp_path) == whole[2]


def test_a_repair_that_is_stopped(whole, weights, compiled, tmp_path, monkeypatch):
    """A cache that calls itself finished, or a shard whole, while its files are being replaced."""
    folder = copy_to(tmp_path / "cache", whole[2])
    flip_byte(folder / "00001-of-00003.labels.npy")
    replace = os.replace

    def failing(a, b):
        if str(b).endswith("00001-of-00003.labels.npy"):
            raise InterruptedError("killed")
        replace(a, b)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(InterruptedError):
        encode(job(weights), folder, SHARE)
    assert not (folder / "manifest.json").exists() and not (folder / "00001-of-00003.json").exists()
    monkeypatch.setattr(os, "replace", replace)
    encode(job(weights), folder, SHARE)
    assert contents(folder) == whole[2]


KINDS = {kind: latent_files.shard_file(1, 3, kind) for kind in latent_files.SUFFIXES} | {
    "settings": "settings.json",
    "manifest": "manifest.json",
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_byte_is_found_and_mended(whole, weights, compiled, kind, tmp_path, capsys):
    """A kind of file that nothing covers; a message that does not name it; a mended cache with other bytes."""
    folder = copy_to(tmp_path / "cache", whole[2])
    flip_byte(folder / KINDS[kind])
    with pytest.raises(UserError, match=KINDS[kind]):
        LatentCache(folder, verify=True)
    encode(job(weights), folder, SHARE)
    assert KINDS[kind] in capsys.readouterr().err and contents(folder) == whole[2]


@pytest.mark.parametrize(
    "change, text",
    [
        ({"source": Photographs(fingerprint="others")}, "source.fingerprint: 'photographs' there, 'others' now"),
        ({"source": Photographs(90)}, "source.records: 70 there, 90 now"),
        ({"size": (16, 16)}, "transform.resolution: 8 there, 16 now"),
        ({"upright": True}, "transform.upright: False there, True now"),
        ({"mirror": False}, "views: 2 there, 1 now"),
        ({"shard_records": 31}, "shard_records: 30 there, 31 now"),
        ({"codec": dataclasses.replace(CODEC, dtype="bfloat16")}, "codec.dtype: 'float32' there, 'bfloat16' now"),
        ({"params": None}, "codec.weights_sha256"),
    ],
)
def test_another_job_is_refused(whole, weights, change, text):
    """Shards of two jobs in one cache."""
    if "params" in change:
        change = {"params": jax.tree.map(lambda x: x + 1e-3, weights)}
    with pytest.raises(UserError, match=text):
        encode(dataclasses.replace(job(weights), **change), whole[0], SHARE)
    assert contents(whole[0]) == whole[2]


def test_the_batch_size_does_not_bind(whole, weights, tmp_path):
    """A row that is rounded otherwise in another batch, or shards that begin elsewhere, when a run goes on with less memory."""
    encode(dataclasses.replace(job(weights), device_batch_size=3), tmp_path / "other", SHARE)
    assert contents(tmp_path / "other") == whole[2]


def test_other_versions_may_check_and_not_add(whole, weights, tmp_path, monkeypatch):
    """Shards of two versions of a library in one cache; a finished cache that a newer version refuses to check."""
    monkeypatch.setattr(writer, "version", {"pillow": "99.0"}.get)
    _, rate = encode(job(weights), whole[0], SHARE)
    assert rate is None and contents(whole[0]) == whole[2]
    folder = copy_to(tmp_path / "cache", {k: v for k, v in whole[2].items() if not k.startswith("00002")})
    with pytest.raises(UserError, match=r"pillow: '.*' there, '99.0' now"):
        encode(job(weights), folder, SHARE)


def test_scale_and_shift_do_not_bind(whole, weights):
    """A cache refused because its latents, stored unscaled, would be scaled otherwise."""
    other = dataclasses.replace(job(weights), codec=dataclasses.replace(CODEC, scale=(2.0, 3.0), shift=0.5))
    manifest, _ = encode(other, whole[0], SHARE)
    assert manifest["codec"]["scale"] == 0.18215 and contents(whole[0]) == whole[2]


@pytest.mark.parametrize("share, text", [(0.0, "1 of 70"), (0.02, "2 of 70 records cannot be read"), (1.0, "must lie in")])
def test_too_many_bad_records(weights, compiled, share, text, tmp_path):
    """Unreadable images that vanish without a word."""
    with pytest.raises(UserError, match=text) as error:
        encode(job(weights), tmp_path, share)
    assert share == 1.0 or "record 11: photograph 11" in str(error.value)


@pytest.mark.parametrize("value, text", [(66_000, r"moments from .* to 6.6e\+04"), (np.nan, "moments that are NaN or infinite")])
def test_moments_beyond_float16_name_the_record(weights, tmp_path, monkeypatch, value, text):
    """Infinities or NaN in a cache, found when the loss is not a number."""
    fetched = writer.DeviceEncoder._fetched

    def overflow(self, batch, moments):
        moments = np.array(fetched(self, batch, moments)[1])
        moments[2 * batch["index"].tolist().index(12) + 1, 1, 2, 3] = value  # of the mirror image
        return batch, moments

    monkeypatch.setattr(writer.DeviceEncoder, "_fetched", overflow)
    with pytest.raises(UserError, match=rf"record 12 \(photograph-12.png\) has {text}"):
        encode(job(weights), tmp_path, SHARE)
    assert not list(tmp_path.glob("*.npy"))


def test_two_commands_at_once(weights, whole, tmp_path):
    """Two processes that write the same partial file."""
    folder = copy_to(tmp_path / "cache", whole[2])
    encoder = writer.claimed(folder, job(weights).settings, 0)
    with encoder, pytest.raises(UserError, match="another command"):
        encode(job(weights), folder, SHARE)


def test_a_folder_of_something_else(weights, tmp_path):
    """A typing error in --out that scatters shards among other files."""
    (tmp_path / "thesis.tex").write_text("chapter 1")
    with pytest.raises(UserError, match=r"thesis\.tex"):
        encode(job(weights), tmp_path)


def test_the_default_shard_is_half_a_gigabyte(weights):
    """Shards of any size, or that begin within a batch of the codec."""
    big = dataclasses.replace(job(weights), size=(256, 256), shard_records=None)
    size = 2 * 2 * 128 * 128 * 4 * big.records_per_shard
    assert big.records_per_shard % 8 == 0 and 2**29 * 0.9 < size <= 2**29


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    """Weights for the digits as a diffusers folder."""
    codec = dataclasses.replace(CODEC, image_channels=1)
    folder = tmp_path_factory.mktemp("weights") / "run" / "codec"
    save_diffusers(folder, codec, params(codec))
    return folder


@pytest.mark.slow
def test_the_verb(vae_folder, tmp_path):
    """Flags that do not reach the job, a last line without the promised fields, damage with exit status 0."""
    made = ["encode", "--data=digits", "--split=test", f"--codec={vae_folder.parent}", "--resolution=8", "--out=cache"]
    outcomes = run_verbs(
        tmp_path,
        [
            made,
            made,
            [*made, "--nomirror"],
            ["encode", "--verify", "--out=cache"],
            ["encode", "--data=tfds:mnist", f"--codec={vae_folder}", "--resolution=8", "--out=x"],
            ["encode", "--data=digits", "--out=x"],
            ["encode", "--config=configs/digits_latent.py", "--data=digits", "--out=x"],
            ["encode", "--verify", "--out=nowhere"],
            ["encode", "--data=digits", "--codec=c", "--resolution=7", "--out=x"],
            [
                "encode",
                "--config=configs/digits_latent.py",
                f"--config.codec.path={vae_folder}",
                "--config.codec.block_out_channels=(8, 16)",
                "--config.codec.norm_groups=4",
                "--config.data.split=test",
                "--out=other",
            ],
        ],
    )
    first, again, other, verified = outcomes[:4]
    assert first[0] == again[0] == verified[0] == 0, [outcome[2] for outcome in outcomes[:4]]
    lines = [json.loads(outcome[1].splitlines()[-1]) for outcome in (first, again, verified)]
    assert lines[0]["images"] == 297 and lines[0]["shards"] == 1 and lines[0]["bad_records"] == 0 and lines[0]["views"] == 2
    assert lines[0]["latent_shape"] == [4, 4, 2] and lines[0]["images_per_second"] > 0 and lines[1]["images_per_second"] is None
    assert len({line["manifest_sha256"] for line in lines}) == 1 and lines[2]["verified"]
    assert sha256_of(tmp_path / "cache" / "manifest.json") == lines[0]["manifest_sha256"]
    refused(other, "views: 2 there, 1 now")
    texts = ["--split", "--codec, --resolution", "omit one", "not a latent cache", "c does not exist"]
    for outcome, text in zip(outcomes[4:9], texts, strict=True):
        refused(outcome, text)
    assert outcomes[9][0] == 0, outcomes[9][2]
    config_made = json.loads(outcomes[9][1].splitlines()[-1])
    assert config_made["images"] == 297 and config_made["views"] == 1  # digits are not mirrored


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("share", SHARES)
def test_killed_before_any_file_operation(weights, tmp_path, share):
    """A cache that no later start accepts, a shard with facts of other bytes, a partial file that stays."""
    work = job(weights, source=Photographs(40, bad=(11,)), shard_records=20)
    assert len(check_every_kill(tmp_path, lambda folder: encode(work, folder / "cache", SHARE), share, times=2)) > 20


def test_a_strange_file_in_an_unfinished_cache(weights, tmp_path):
    """Work that goes on in a folder where somebody else has begun to write."""
    with claimed(tmp_path, job(weights).settings, 0):
        pass
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match=r"contains notes.txt, which this command did not write"):
        encode(job(weights), tmp_path, SHARE)


@pytest.mark.slow
@pytest.mark.faults
def test_killed_at_random_it_ends_with_the_same_bytes(vae_folder, tmp_path):
    """What a kill -9 leaves and a failing rename does not: half-written files, a lock that outlives its process."""
    command = [
        sys.executable,
        "-m",
        "dit_jax.encode",
        "--data=digits",
        f"--codec={vae_folder}",
        "--resolution=32",
        "--device_batch_size=4",
        "--shard_records=40",
    ]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    kills, rng = 0, random.Random(0)
    while True:
        process = subprocess.Popen([*command, f"--out={tmp_path / 'killed'}"], env=environment, stderr=subprocess.DEVNULL)
        deadline = None
        while process.poll() is None and kills < 5:
            if deadline is None and len(list(tmp_path.glob("killed/*moments*"))) > 5 * kills:
                deadline = time.monotonic() + rng.uniform(0, 0.3)
            if deadline is not None and time.monotonic() > deadline:
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.01)
        if process.wait() == 0:
            break
    subprocess.run([*command, f"--out={tmp_path / 'whole'}"], env=environment, check=True)
    assert kills == 5 and contents(tmp_path / "killed") == contents(tmp_path / "whole")


CAUSAL = CausalVAE(base=4, mult=(1, 2), blocks=1, z=2, temporal=(True,))


class Clips:
    """`count` random clips of 5 to 8 frames of 8 x 8 pixels; number 2 is too short."""

    num_classes, class_names, fingerprint = 3, ("a", "b", "c"), "clips"

    def __init__(self, count=7):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        frames = 3 if index == 2 else 5 + index % 4
        video = np.random.default_rng(int(index)).integers(0, 256, (frames, 8, 8, 3), np.uint8)
        return {"video": video, "fps": 8.0, "label": index % 3, "name": f"clip {index}"}


@pytest.mark.slow
def test_clips_come_back_exactly(tmp_path):
    """Moments of other frames than the transform takes, a mirror image that is upside down, a cache that fits another length."""
    codec_params = params(CAUSAL)
    clips = Job(Clips(), CAUSAL, codec_params, (8, 8), device_batch_size=1, shard_records=3, frames=5)
    manifest, _ = encode(clips, tmp_path / "cache", 0.2)
    assert manifest["moments"]["shape"] == [3, 4, 4, 4] and manifest["bad_records"]["count"] == 1
    cache = LatentCache(tmp_path / "cache")
    transform = ClipTransform(5, 8, 3, flip=True)
    cache.check(CAUSAL, weights_sha256(codec_params), transform)
    program = jax.jit(CAUSAL.encode)
    for row, number in enumerate(cache.source_index):
        clip = np.asarray(to_float(transform(Clips()[int(number)])["image"]))
        both = np.asarray(program(codec_params, np.stack([clip, clip[:, :, ::-1]])))
        found = cache.gather(np.array([2 * row, 2 * row + 1]))
        assert found.dtype == np.float16
        np.testing.assert_allclose(found, both.astype(np.float16), rtol=2e-3, atol=1e-3)  # the program has another batch size
    for other in (
        ClipTransform(9, 8, 3, flip=False),
        ClipTransform(5, 8, 3, flip=False, fps=4.0),
        ImageTransform(8, 3, flip=False),
    ):
        with pytest.raises(UserError, match=r"transform\.f"):
            cache.check(CAUSAL, weights_sha256(codec_params), other)


def test_some_examples_are_a_data_set_of_their_own():
    """A bucket's cache that resumes with other examples, or numbers records of the whole data set."""
    source = Clips()
    some, others = Members(source, np.array([4, 6])), Members(source, np.array([4, 5]))
    assert len(some) == 2 and some[1]["name"] == "clip 6"
    assert len({source.fingerprint, some.fingerprint, others.fingerprint}) == 3
    with pytest.raises(UserError, match=r"fps is 8\.0"):
        Job(source, CAUSAL, {}, (8, 8), fps=8.0)
