"""Files that commit e778c7f wrote, read by today's code, against what that commit computed from them.

golden/make_artifacts.py made golden/e778c7f/ and says what is computed, by the command line and the layout of the files alone.
"""

import base64
import json
import os
import zlib

import numpy as np
import pytest
from make_artifacts import FILES, cached, files, from_disk, machine, quick_samples, resumed, samples

FLOATS = 1e-5  # relative
LEVELS, SHARE = 1, 0.005  # images of another machine: so many levels in at most this share of the pixels

EXPECTED = json.loads((FILES / "expected.json").read_text())
# Bits are compared where rounding is the same.
EXACT = EXPECTED["made_with"] == machine() and not os.environ.get("GOLDEN_XLA_FLAGS")


def pixels(value: dict) -> np.ndarray:
    data = zlib.decompress(base64.b64decode(value["uint8"]))
    return np.frombuffer(data, np.uint8).reshape(value["shape"]).astype(int)


def image_differences(expected: dict, found: dict, path: str) -> list[str]:
    if expected["shape"] != found["shape"]:
        return [f"{path}: the shape was {expected['shape']} and is {found['shape']}"]
    off = np.abs(pixels(expected) - pixels(found))
    strict = EXACT or os.environ.get("DIT_JAX_EXACT_GOLDEN") == "1"
    bad = expected["sha256"] != found["sha256"] if strict else off.max() > LEVELS or (off > 0).mean() > SHARE
    return [f"{path}: {(off > 0).mean():.2%} of the pixels differ, by up to {off.max()} levels"] if bad else []


def tolerance(path: str, size: float) -> float:
    """How far the sums of an array of this mean size may be off.

    The bias of attention's keys adds the same to all scores of a query, so its gradient is zero, and Adam moves it by rounding
    errors: others on another machine, and others since gradients by weights are products of another layout (models/products.py).
    Measured with AVX and with SSE4.2: up to 3e-4 alone, 7e-5 of the size as a third of qkv.
    """
    if path.endswith("attention/key/bias"):
        return 1e-3
    return (1e-3 if path.endswith("attention/qkv/bias") else FLOATS) * max(size, 1e-6)


def differences(expected, found, path: str = "") -> list[str]:
    """A line for each value that is another one, is missing or is new."""
    if isinstance(expected, dict) and isinstance(found, dict):
        if "uint8" in expected:
            return image_differences(expected, found, path)
        if "size" in expected and expected["shape"] == found.get("shape"):  # sums of an array, which may cancel
            near = all(abs(found[k] - expected[k]) <= tolerance(path, expected["size"]) for k in ("sum", "size"))
            return [] if near else [f"{path}: the array was {expected} and is {found}"]
        return [
            line
            for key in {**expected, **found}
            for line in differences(expected.get(key), found.get(key), f"{path} / {key}".removeprefix(" / "))
        ]
    if isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        return [
            line
            for number, pair in enumerate(zip(expected, found, strict=True))
            for line in differences(*pair, f"{path}[{number}]")
        ]
    if isinstance(expected, float) and isinstance(found, (int, float)):
        return [] if abs(found - expected) <= FLOATS * abs(expected) else [f"{path}: was {expected}, is {found}"]
    return [] if expected == found else [f"{path}: was {expected}, is {found}"]


def check(observe, folder, *names):
    found = observe(folder, names) if names else observe(folder)
    expected = EXPECTED[observe.__name__]
    lines = differences({name: expected[name] for name in names} if names else expected, found)
    assert not lines, "read from the files of e778c7f:\n" + "\n".join(lines)


def each(slow, *exhaustive):
    """Parameters: CI takes the first, .ci/nightly the others."""
    return [
        pytest.param(slow, marks=pytest.mark.slow),
        *(pytest.param(name, marks=pytest.mark.exhaustive) for name in exhaustive),
    ]


@pytest.mark.slow
def test_old_files_are_read(tmp_path):
    """An old cache called damaged; other scores of old samples; results, sweeps or checkpoints unread; another weights file."""
    check(files, tmp_path)


@pytest.mark.parametrize("name", each("official", "weights", "older checkpoint", "ddim", "latent run"))
def test_old_weights_are_sampled(tmp_path, name):
    """Other images from an older checkpoint, another sampler, a weights file, the official layout, or a codec kept in its run."""
    check(samples, tmp_path, name)


@pytest.mark.slow
def test_old_run_is_sampled(tmp_path):
    """A checkpoint or config.json of an old run that cannot be read, or that gives other images."""
    check(quick_samples, tmp_path)


@pytest.mark.parametrize("name", each("run", "latent_run", "autoencoder"))
def test_old_runs_are_resumed(tmp_path, name):
    """A refused or restarted run; an optimizer state, moving average, step or key that is not taken up where it was left."""
    check(resumed, tmp_path, name)


@pytest.mark.slow
def test_old_cache_is_trained_on(tmp_path):
    """Moments read in another order, view or scale."""
    assert not differences(EXPECTED["cached"]["from disk"], from_disk(tmp_path))


@pytest.mark.exhaustive
def test_old_cache_is_trained_on_and_continued(tmp_path):
    """A resident cache that is read otherwise; an old codec that encodes to other moments; a cache that is not continued."""
    check(cached, tmp_path)
