"""A tiny T5 with its files, and configs of networks with text that use it."""

import contextlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors.numpy import save_file

from dit_jax import recipes
from dit_jax.encoders import t5, tokens
from dit_jax.interop import t5 as layout
from dit_jax.interop.tensors import Tensor


class Letters(tokens.Bytes):
    """Stands for T5's tokenizer, whose files a test does not have."""


@contextlib.contextmanager
def known():
    """Within it `t5_tiny` is a text encoder, whose tokenizer needs no files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(t5.SIZES, "tiny", t5.Size(2, 32, 2, 48))
        patch.setitem(t5.SIZES, "split", t5.Size(2, 64, 8, 128))  # which every mesh of 8 devices splits
        patch.setattr(tokens, "T5Tokens", lambda path, length: Letters(length))
        yield


def write_encoder(folder: Path, seed: int = 7) -> Path:
    """Writes random weights in Hugging Face's layout; returns the folder."""
    net = t5.T5Encoder.of("tiny")
    params = tiny.random_params(net.init(jax.random.key(0), jnp.zeros((1, 3), jnp.int32))["params"], key=seed)
    flat = {"/".join(k.key for k in path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(params)}
    theirs = layout.to_theirs({name: Tensor(x.shape, x.dtype, lambda x=x: x) for name, x in flat.items()})
    folder.mkdir(exist_ok=True)
    save_file({name: np.ascontiguousarray(x.load()) for name, x in theirs.items()}, folder / "model.safetensors")
    return folder


def config(encoder, **overrides):
    """`digits_text` with a tiny MM-DiT, the encoders t5_tiny and bytes; overrides as of `tiny.config`."""
    c = recipes.digits_text()
    c.conditioner.update({"encoders": ("t5_tiny", "bytes"), "lengths": (9, 12), "width": 32, "merges": (), "dtype": "float32"})
    c.conditioner.weights = (f"t5_tiny={encoder}",)
    c.model.update({"depth": 2, "width": 32, "heads": 2, "context_width": 32, "pooled_width": 32})
    c.optimizer.warmup_steps = 0  # the first step moves
    c.loader.num_threads = 2
    return tiny.shorten(c, **overrides)
