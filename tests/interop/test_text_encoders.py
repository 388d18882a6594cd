"""Frozen text encoders: their weights from files, and a training step with them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_text

from dit_jax import build
from dit_jax.encoders.text import Text
from dit_jax.errors import UserError
from dit_jax.interop import text_encoders


@pytest.fixture
def encoder(tmp_path):
    """The path of a tiny T5's weights in Hugging Face's layout; its size is called t5_tiny."""
    with tiny_text.known():
        yield tiny_text.write_encoder(tmp_path)


def run_of(config, devices):
    config = config.copy_and_resolve_references()
    return build.Run(config, devices=jax.devices()[:devices])


@pytest.mark.slow
def test_weights_and_the_empty_text(encoder):
    """Catches weights in another dtype, sharding rules that miss one, and a null condition that is not the encoding of "".

    The constants on the mesh have the structure that plans assume.
    """
    run = run_of(tiny_text.config(encoder), 1)
    constants = run.constants
    assert jax.tree.map(lambda x: (x.shape, x.dtype), constants) == jax.tree.map(
        lambda x: (x.shape, x.dtype), run.abstract_constants()
    )
    params = {"conditioner": run.conditioner.init(jax.random.key(0))}
    batch = run.conditioner.from_requests({"caption": ["", "a three"]})
    cond, null = run.task.condition(params, constants, batch)
    assert cond["context"].shape == (2, 21, 32)
    np.testing.assert_allclose(null["context"][1], cond["context"][0], rtol=1e-5, atol=1e-5)
    assert np.abs(cond["context"][1] - cond["context"][0])[:9].max() > 0.1
    batch |= {"negative_" + name: x[::-1] for name, x in batch.items()}
    cond, null = run.task.condition(params, constants, batch)
    np.testing.assert_allclose(null["context"], cond["context"][::-1], rtol=1e-5, atol=1e-5)


def test_weights_that_do_not_fit(encoder, tmp_path):
    """Catches weights of another size that would be cut or ignored, a folder without weights, and an old format."""

    def read(path, name="t5_tiny"):
        return text_encoders.read(Text((name,), weights=(f"{name}={path}",)), name)

    with pytest.raises(UserError, match=r"is not t5_small: it has depth 2 for 8, width 32 for 512"):
        read(encoder, "t5_small")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty has none of model\.safetensors"):
        read(tmp_path / "empty")
    with pytest.raises(UserError, match="does not exist"):
        read(tmp_path / "nothing.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match=r"is not a \.safetensors file"):
        read(tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "b.safetensors"}}))
    with pytest.raises(UserError, match=r"b\.safetensors does not exist"):
        read(tmp_path / "model.safetensors.index.json")


@pytest.mark.exhaustive
def test_a_step_with_a_frozen_encoder_on_a_mesh(encoder):
    """Catches a frozen encoder that is trained, or whose output depends on how its weights and the batch are split."""
    c, results = tiny_text.config(encoder, conditioner__dropout=(0.3,)), []
    for mesh, devices in (({"data": 1}, 1), ({"data": 2, "fsdp": 2, "tensor": 2}, 8)):
        own = c.copy_and_resolve_references()
        own.mesh.update(mesh)
        run = build.Run(own, devices=jax.devices()[:devices])
        with run.loader.batches() as batches:
            batch = next(batches)
        assert set(batch) == {"image", "label", "tokens_t5_tiny", "tokens_bytes", "present"}
        constants = run.constants
        params = jax.eval_shape(run.task.init_params, jax.random.key(1))
        state = run.task.state_of(tiny.random_params(jax.tree.map(lambda x: jnp.zeros(x.shape), params)), jax.random.key(1))
        placed = jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), state, run.abstract_state)
        with jax.set_mesh(run.mesh):
            step = jax.jit(run.task.step)
            new, sums = step(placed, constants, {n: jnp.asarray(x) for n, x in batch.items()}, jax.random.key(2))
        assert jax.tree.structure(new.params["conditioner"]).num_leaves == 2  # of bytes
        table = [np.asarray(x.params["conditioner"]["bytes"]["token_embedding"]["embedding"]) for x in (state, new)]
        assert np.abs(table[1] - table[0]).max() > 1e-6
        results.append((jax.device_get(new.params), jax.device_get(sums["loss"])))
    assert tiny.distance(*results, floor=1e-3) < 1e-4
