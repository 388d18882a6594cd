"""I3D against a network in PyTorch, its weights in both published layouts, and scores of clips."""

import importlib.util
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.errors import UserError
from dit_jax.evaluate import scores
from dit_jax.evaluate.images import ArrayImages, Frames, NpzImages
from dit_jax.interop import i3d, pt_reader
from dit_jax.interop.tensors import Tensor, write_foreign
from dit_jax.metrics import i3d as module
from dit_jax.metrics.frechet import frechet_distance, moments
from dit_jax.metrics.i3d import I3D, PROTOCOLS, I3DNetwork
from dit_jax.metrics.resize import bilinear_centred


def test_number_of_parameters():
    """A block with other widths than the published network."""
    assert sum(math.prod(shape) for name, shape in i3d.LAYOUT.items() if "running" not in name) == 12_697_264


def params_of(path, tmp_path):
    write_foreign(tmp_path / "i3d.safetensors", i3d.from_published(pt_reader.read(path), str(path)), {})
    return i3d.load(tmp_path / "i3d.safetensors")


@pytest.mark.slow
def test_features_equal_the_network_in_pytorch(tmp_path):
    """A wrong padding, pooling, order of branches or epsilon; a state dict or a TorchScript archive that is read otherwise."""
    torch = pytest.importorskip("torch")
    from i3d_oracle import random_network

    network = random_network()
    torch.save(network.state_dict(), tmp_path / "state.pt")
    torch.jit.trace(network, torch.zeros(1, 3, 9, 32, 32), check_trace=False).save(str(tmp_path / "script.pt"))
    params = params_of(tmp_path / "state.pt", tmp_path)
    jax.tree.map(np.testing.assert_array_equal, params_of(tmp_path / "script.pt", tmp_path), params)
    clips = np.random.default_rng(0).uniform(-1, 1, (2, 11, 48, 64, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = network(torch.from_numpy(clips).permute(0, 4, 1, 2, 3)).numpy()
    ours = jax.jit(I3DNetwork().apply)({"params": params}, clips)
    assert np.abs(ours - theirs).max() / np.abs(theirs).max() < 1e-5


@pytest.mark.exhaustive
def test_features_equal_cd_fvd(tmp_path):
    """The network of the package cd-fvd, with its own resize, at full size."""
    torch = pytest.importorskip("torch")
    from i3d_oracle import random_network

    found = importlib.util.find_spec("cdfvd")
    if found is None:
        pytest.skip("cd-fvd is not installed")
    path = f"{found.submodule_search_locations[0]}/third_party/i3d/pytorch_i3d.py"
    spec = importlib.util.spec_from_file_location("pytorch_i3d", path)
    package = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    network = random_network(package.InceptionI3d(400, in_channels=3))
    torch.save(network.state_dict(), tmp_path / "state.pt")
    clips = np.random.default_rng(0).integers(0, 256, (1, 9, 40, 52, 3)).astype(np.uint8)
    frames = torch.from_numpy(clips[0]).permute(0, 3, 1, 2).float()
    frames = torch.nn.functional.interpolate(frames, size=(224, 224), mode="bilinear", align_corners=False)
    with torch.no_grad():
        theirs = network((2 * frames / 255 - 1).permute(1, 0, 2, 3)[None]).numpy()
    ours = jax.jit(I3D("cd_fvd"))(params_of(tmp_path / "state.pt", tmp_path), clips)["features"]
    assert np.abs(ours - theirs).max() / np.abs(theirs).max() < 1e-5


@pytest.mark.parametrize("size", [(224, 224), (5, 7), (9, 30)])
def test_bilinear_equals_pytorch(size):
    """Pixels whose centres are at corners, or an antialiased resize."""
    torch = pytest.importorskip("torch")
    images = np.random.default_rng(0).integers(0, 256, (2, 12, 17, 3)).astype(np.uint8)
    theirs = torch.nn.functional.interpolate(torch.from_numpy(images).permute(0, 3, 1, 2).float(), size=size, mode="bilinear")
    np.testing.assert_allclose(bilinear_centred(images, size), theirs.permute(0, 2, 3, 1).numpy(), atol=2e-3)


def test_protocols_differ_and_are_recorded():
    """A protocol that has no effect, or that the result does not name."""
    frames = jnp.asarray(np.random.default_rng(0).integers(0, 256, (1, 40, 64, 3)).astype(np.uint8))
    resized = {name: np.asarray(protocol.resize(frames)) for name, protocol in PROTOCOLS.items()}
    assert {x.shape for x in resized.values()} == {(1, 224, 224, 3)}
    np.testing.assert_array_equal(resized["styleganv"], resized["cd_fvd"])
    for a, b in (("styleganv", "tf"), ("styleganv", "videogpt"), ("tf", "videogpt")):
        assert np.abs(resized[a] - resized[b]).max() > 10
    recipes = [I3D(name).recipe() for name in PROTOCOLS]
    assert len({str(recipe) for recipe in recipes}) == len(PROTOCOLS)
    with pytest.raises(UserError, match="protocol 'other'"):
        I3D("other")


def test_frechet_distance_of_400_features_equals_the_direct_formula():
    """A distance that is not FVD's to 1e-4: 1,000 synthetic features, the square root by a general eigendecomposition."""
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(1000, 400)) @ rng.normal(size=(400, 400)) / 20 + shift for shift in (0, 0.1))
    values = np.linalg.eigvals(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False))
    direct = (
        np.square(a.mean(0) - b.mean(0)).sum() + a.var(0, ddof=1).sum() + b.var(0, ddof=1).sum() - 2 * np.sqrt(values).real.sum()
    )
    np.testing.assert_allclose(frechet_distance(moments(a), moments(b)), direct, rtol=1e-4)


def test_shapes_that_are_no_clips_are_refused():
    """A failure in the middle of the network, or images taken for clips."""
    for shape, words in (((64, 64, 3), "are of clips"), ((8, 64, 64, 3), "at least 9 frames")):
        with pytest.raises(UserError, match=words):
            I3D().check_shape(shape)


CLIPS = np.random.default_rng(0).integers(0, 256, (5, 3, 4, 4, 3)).astype(np.uint8)


@pytest.mark.parametrize("start, stop, size", [(0, 15, 4), (2, 11, 2), (4, 5, 64), (0, 15, 1)])
def test_frames_are_the_images_of_clips_in_order(start, stop, size):
    """A frame lost or repeated between batches, above all where a batch ends within a clip."""
    frames = Frames(ArrayImages(CLIPS, "clips", labels=np.arange(5), texts={"captions": list("abcde")}))
    assert (len(frames), frames.shape, frames.texts["captions"][4]) == (15, (4, 4, 3), "b")
    batches = list(frames.batches(start, stop, size))
    assert all(len(batch) == size for batch in batches[:-1])
    np.testing.assert_array_equal(np.concatenate(batches), CLIPS.reshape(-1, 4, 4, 3)[start:stop])


def test_clips_are_scored_by_frame_and_as_clips(tmp_path):
    """Clips that are refused; frames scored as one image; features of clips that mix frames."""
    rng = np.random.default_rng(1)
    ours, theirs = (rng.integers(0, 256, (30, 2, 8, 8, 1)).astype(np.uint8) for _ in range(2))
    np.savez(tmp_path / "x.npz", ours)
    assert NpzImages(tmp_path / "x.npz").shape == (2, 8, 8, 1)
    found = scores.score(str(tmp_path / "x.npz"), theirs, "pixels8", replicates=0)
    flat = scores.score(ours.reshape(-1, 8, 8, 1), theirs.reshape(-1, 8, 8, 1), "pixels8", replicates=0)
    assert found["fid"] == flat["fid"] and (found["num_samples"], found["frames_per_clip"]) == (60, 2)
    whole = scores.score(str(tmp_path / "x.npz"), theirs, "pixels", replicates=0)
    assert whole["num_samples"] == 30 and whole["image_shape"] == [2, 8, 8, 1]
    with pytest.raises(UserError, match="no embeddings"):
        scores.score(str(tmp_path / "x.npz"), theirs, "pixels8", metrics=["frame_cosine"])
    with pytest.raises(UserError, match="have no protocols"):
        scores.score(str(tmp_path / "x.npz"), theirs, "pixels8", protocol="tf")


def test_cosine_of_consecutive_frames():
    """The cosine across the border of two clips, or of vectors that were not normalised."""
    x = np.array([[[2.0, 0], [0, 3], [0, 1]], [[1, 0], [1, 0], [-4, 0]]])
    assert scores.frame_cosine(x.reshape(-1, 2), 3) == pytest.approx((0 + 1 + 1 - 1) / 4)


@pytest.mark.slow
def test_the_video_distance_is_reported_with_its_protocol(tmp_path, monkeypatch):
    """A result without the protocol or the weights, a number under another name, or a reference of another protocol."""
    monkeypatch.setattr(module, "INPUT_SIZE", 32)
    rng = np.random.default_rng(0)

    def drawn(name, shape):
        bound = 1.0 if "bn" in name else math.prod(shape[1:]) ** -0.5
        array = rng.uniform(0.5 if "var" in name else -bound, bound, shape).astype(np.float32)
        return Tensor(shape, array.dtype, lambda: array)

    weights = tmp_path / "i3d.safetensors"
    write_foreign(weights, {name: drawn(name, shape) for name, shape in i3d.LAYOUT.items()}, {})
    ours, theirs = (rng.integers(0, 256, (3, 9, 8, 8, 1)).astype(np.uint8) for _ in range(2))
    found = scores.score(ours, theirs, "i3d", weights, replicates=0, protocol="videogpt")
    assert found["fvd"] == found["fid"] > 0
    assert found["extractor"]["protocol"] == "videogpt" and found["extractor"]["weights_sha256"]
    assert any(remark.startswith("fvd: 3 clips of 9 frames") for remark in found["remarks"])
    with pytest.raises(UserError, match="are of clips"):
        scores.score(ours[:, 0], theirs[:, 0], "i3d", weights)
