"""Verbs in which something waits for ever: the watchdog ends them, with the phase and the stacks."""

import latents
import numpy as np
import pytest
import tiny
from PIL import Image
from runs import save_run
from verbs import run_verbs

from dit_jax.codecs.kl_vae import KLVAE
from dit_jax.interop.vae import save_diffusers
from dit_jax.runtime import watchdog

# What a user file can do: the verb imports it, before its watchdog starts.
HANGS = """
import threading
import {module}
from dit_jax.runtime import watchdog

def something_that_hangs(*args, **kwargs):
    watchdog.LIMITS = {{name: (0.2, text) for name, (_, text) in watchdog.LIMITS.items()}}
    threading.Event().wait(60)

{module}.{name} = something_that_hangs
watchdog.DEFAULT_SECONDS = 1.0  # it looks four times per second
watchdog.LIMITS = {{name: (1_000.0, text) for name, (_, text) in watchdog.LIMITS.items()}}
"""
VERBS = {
    "sample": (
        "sampling",
        ("dit_jax.sample.generator", "Generator.start"),
        "--workdir=run --num_samples=2 --num_steps=2 --out=drawn.npz",
    ),
    "encode": (
        "encoding",
        ("dit_jax.encode.writer", "DeviceEncoder.start"),
        "--data=images --codec=codec --resolution=8 --out=cache",
    ),
    "prepare": (
        "preparing",
        ("dit_jax.prepare.datasets", "write_shard"),
        "--source=images --dataset=mine --out=data",
    ),
    "evaluate": (
        "scoring",
        ("dit_jax.evaluate.statistics", "_Worker._take"),
        "--samples=x.npz --reference=digits",
    ),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """{verb: (exit status, stdout, stderr)} of verbs that hang."""
    folder = tmp_path_factory.mktemp("hangs")
    save_run(folder / "run", tiny.config(model__depth=1), 0)
    codec = KLVAE((8, 16), layers_per_block=1, norm_groups=4, latent_channels=2)
    save_diffusers(folder / "codec", codec, latents.params(codec))
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    for i in range(4):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / "images" / f"{i}.png")
    np.savez(folder / "x.npz", arr_0=rng.integers(0, 256, (20, 8, 8, 1), np.uint8))
    for verb, (_, (module, name), _) in VERBS.items():
        (folder / f"hang_{verb}.py").write_text(HANGS.format(module=module, name=name))
    calls = [[verb, f"--import=hang_{verb}.py", *flags.split()] for verb, (_, _, flags) in VERBS.items()]
    return dict(zip(VERBS, run_verbs(folder, calls), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_that_hangs_ends(outcomes, verb):
    """A verb that waits for ever, ends with a status that no supervisor restarts, or does not say in which phase and where."""
    status, _, stderr = outcomes[verb]
    assert status == 75, stderr
    assert f"watchdog: {watchdog.LIMITS[VERBS[verb][0]][1]} for 0.2 s" in stderr and "something_that_hangs" in stderr, stderr
