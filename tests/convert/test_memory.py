"""The memory of a conversion: that of the largest tensor, not of the model."""

import math
import subprocess
import time

import numpy as np
import pytest
from verbs import command, environment

from dit_jax import recipes, registry
from dit_jax.convert import formats
from dit_jax.convert.source import shapes_of
from dit_jax.interop import weights
from dit_jax.interop.tensors import Tensor

SIZES = {"small": (2, 64), "large": (12, 768)}  # depth and width


def random_weights(depth, width):
    """An MM-DiT in float16, whose tensors are made when they are read."""
    c = recipes.sd3()
    c.model = {**registry.defaults("model", "mmdit"), "name": "mmdit", "patch_size": 2, "depth": depth, "width": width}
    c.model.update(
        {"heads": width // 64, "context_width": 4096, "pooled_width": 2048, "table_side": 64, "param_dtype": "float16"}
    )
    sections = weights.sections_of(c.to_dict())

    def tensor(shape, seed):
        def load():
            block = (0.1 * np.random.default_rng(seed).standard_normal(99_991)).astype(np.float16)
            return np.resize(block, math.prod(shape)).reshape(shape)

        return Tensor(shape, np.dtype(np.float16), load)

    return formats.Weights({path: tensor(shape, i) for i, (path, shape) in enumerate(shapes_of(sections).items())}, sections, {})


def peak(*arguments):
    """Bytes of a conversion's own memory at its highest; pages of mapped files, which the system may drop, do not count."""
    process, highest = subprocess.Popen(command("convert", *arguments), env=environment(), stdout=subprocess.DEVNULL), 0
    while process.poll() is None:
        with open(f"/proc/{process.pid}/status") as status:
            own = [int(line.split()[1]) for line in status if line.startswith("RssAnon:")]
        highest = max(highest, *own, 0)
        time.sleep(0.01)
    assert process.returncode == 0
    return 1024 * highest


@pytest.mark.exhaustive
def test_peak_of_a_conversion(tmp_path):
    """Catches a reader or writer that holds the whole model: a conversion of billions of parameters would not fit."""
    peaks = {}
    for name, (depth, width) in SIZES.items():
        expected = random_weights(depth, width)
        like, official, folder = tmp_path / f"{name}.safetensors", tmp_path / f"{name}_theirs.safetensors", tmp_path / name
        formats.write(expected, "dit_jax", like)
        to_official = peak("--from=dit_jax", f"--weights={like}", "--to=official", f"--out={official}")
        back = f"--out={tmp_path / 'back.safetensors'}"
        to_ours = peak("--from=official", f"--weights={official}", f"--like={like}", back)
        to_diffusers = peak("--from=dit_jax", f"--weights={like}", "--to=diffusers", f"--out={folder}")
        peaks[name] = {"to official": to_official, "to ours": to_ours, "to diffusers": to_diffusers}
    largest = max(2 * math.prod(tensor.shape) for tensor in expected.tensors.values())
    whole = sum(2 * math.prod(tensor.shape) for tensor in expected.tensors.values())
    assert whole > 5 * largest
    for way, bytes_ in peaks["large"].items():
        assert bytes_ - peaks["small"][way] < 2.5 * largest, way
