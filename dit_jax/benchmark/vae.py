"""Measures the autoencoder: images to moments, latents to images."""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp

from dit_jax.benchmark import machine
from dit_jax.benchmark.timing import Work, measure, report, warm_up
from dit_jax.codecs.kl_vae import KLVAE, Autoencoder
from dit_jax.data.size import size_json
from dit_jax.errors import UserError
from dit_jax.parallel.mesh import batch_sharding, make_mesh, replicated, rows_per_step
from dit_jax.runtime.console import say

PRESETS: dict[str, dict[str, Any]] = {
    "sd": {},  # Stable Diffusion 1 and 2, 4 channels
    "sd3": {"latent_channels": 16, "scale": 1.5305, "shift": 0.0609, "use_quant_conv": False},
    "small": {"block_out_channels": (32, 64, 64), "layers_per_block": 1, "norm_groups": 16},  # recipes.FOLDER_CODEC
}
WARM_UP_STEPS = 3


def of_preset(name: str, dtype: str) -> KLVAE:
    """The codec of a preset. Raises UserError if the name is not in PRESETS."""
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
    return KLVAE(**PRESETS[name], dtype=dtype)


def of_folder(path: str, dtype: str) -> Autoencoder:
    """The sizes of diffusers' AutoencoderKL or VQModel, or of a run's codec; its weights do not affect the speed."""
    from dit_jax.interop import vae

    return vae.read_codec(vae.find(path), dtype)


def run(codec: Autoencoder, size: tuple[int, int], batch_size: int, seconds: float) -> dict:
    """Encode and decode with random weights on one batch that stays on the devices.

    Raises:
        UserError: a size or batch size that does not fit.
    """
    mesh = make_mesh()
    if batch_size < 1 or batch_size % rows_per_step(mesh):
        raise UserError(f"batch size {batch_size} is not a positive multiple of the {rows_per_step(mesh)} devices")
    image_shape = (*size, codec.image_channels)
    latent_shape = codec.latent_shape(image_shape)
    rows = batch_sharding(mesh)
    params = jax.device_put(codec.init(jax.random.key(0)), replicated(mesh))
    inputs = jax.jit(
        lambda key: (
            jax.random.uniform(key, (batch_size, *image_shape), minval=-1),
            jax.random.normal(key, (batch_size, *latent_shape)),
        ),
        out_shardings=(rows, rows),
    )
    images, latents = inputs(jax.random.key(1))
    results = {}
    for name, function, x, macs in zip(
        ("encode", "decode"), (codec.encode, codec.decode), (images, latents), codec.macs(image_shape), strict=True
    ):
        start = time.monotonic()
        with jax.set_mesh(mesh):
            compiled = jax.jit(function, out_shardings=rows).lower(params, x).compile()
        compile_seconds = time.monotonic() - start
        say(f"compiled {name} in {compile_seconds:.1f} s")
        results[name] = _measured(name, Work(functools.partial(compiled, params, x), batch_size), seconds, macs / 1e9, mesh) | {
            "compile_seconds": compile_seconds,
            "program_bytes": machine.program_bytes(compiled),
        }
    return {
        "codec": {"block_out_channels": codec.block_out_channels, "latent_channels": codec.latent_channels},
        "dtype": jnp.dtype(codec.dtype).name,
        "resolution": size_json(size),
        "batch_size": batch_size,
        "mesh": dict(mesh.shape),
        **results,
        "mfu_formula": machine.MFU_FORMULA,
        "flops_formula": "2 x MACs",
        "peak_bytes": machine.peak_bytes(),
    }


def _measured(name: str, work: Work, seconds: float, gmacs: float, mesh) -> dict:
    warm_up(work, WARM_UP_STEPS)
    timing = measure(work, seconds)
    report(name, timing)
    devices = list(mesh.devices.flat)
    return {
        **timing.rates(),
        **timing.quantiles(),
        "gmacs": gmacs,
        "images_per_second_per_device": timing.images_per_second / len(devices),
        "mfu": machine.utilization(timing.images_per_second, 2e9 * gmacs, devices),
    }
