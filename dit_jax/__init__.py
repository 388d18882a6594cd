"""Diffusion Transformers in JAX and Flax.

Conventions of all modules:
  images     NHWC float32 in [-1, 1]; uint8 only at the edge (files, batches on their way to the device, npz).
  latents    the network's data, of about unit variance, NHWC float32.
  t          float32 in [0, 1]: t = 0 is data, t = 1 is noise. The network's time input is `process.network_time(t)`.
  guidance   scale w means uncond + w (cond - uncond), so w = 1 is off.
  batch_size global, over all hosts and devices, unless a name says `per_host_`.
  GMACs      multiply-adds of one forward pass of one image, in units of 1e9 (Gflops in the paper); FLOPs = 2 x MACs.
  counts end in `_steps` or `_images`, times in `_seconds`.

The API, of which nothing is imported before it is used:
  load(path)                             a trained network that draws images: pipe(labels=[3, 5]), see `pipeline`
  train(config, workdir)                 what `python -m dit_jax.main` does, see `session`
  score(samples, reference)              Frechet distance and its kin, see `evaluate.scores`
  register(section, name, constructor)   makes user code available to configs and verbs, see `registry`
  models.DiT.of("S/8", num_classes=10)   a network of the paper, see `models.dit`
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {  # name: its module, imported on first use
    "Pipeline": "dit_jax.pipeline",
    "Samples": "dit_jax.sample.samples_file",
    "UserError": "dit_jax.errors",
    "load": "dit_jax.pipeline",
    "register": "dit_jax.registry",
    "score": "dit_jax.evaluate.scores",
    "train": "dit_jax.session",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name == "models":
        return importlib.import_module("dit_jax.models")
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
