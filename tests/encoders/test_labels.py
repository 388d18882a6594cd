"""Labels and no condition at all, as conditioners."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from dit_jax import build
from dit_jax.encoders.labels import Labels
from dit_jax.encoders.unconditional import Unconditional
from dit_jax.errors import UserError
from dit_jax.tasks.diffusion import CONDITIONER


def test_labels():
    """A null label that is a class, labels that change on the way, an unconditional network that is given labels."""
    labels, batch = Labels(10), {"label": jnp.array([3, 7]), "image": jnp.zeros((2, 8, 8, 1))}
    cond = labels.from_batch({}, {}, batch)
    np.testing.assert_array_equal(cond["label"], [3, 7])
    np.testing.assert_array_equal(labels.null({}, {}, cond)["label"], [10, 10])
    assert labels.from_requests({"label": np.array([0, 10])})["label"].dtype == np.int32
    assert Labels(0).from_batch({}, {}, batch) == Labels(0).from_requests({"label": np.zeros(2)}) == Labels(0).batch_spec() == {}


@pytest.mark.parametrize(
    "conditioner, requests, text",
    [
        (Labels(10), {"label": [11]}, "label 11 is out of range"),
        (Labels(10), {"label": [-1]}, "label -1 is out of range"),
        (Labels(10), {"prompt": ["a cat"]}, "prompt"),
        (Unconditional(), {"label": [1]}, "unconditional"),
    ],
)
def test_requests_that_cannot_be_met(conditioner, requests, text):
    """A request that is ignored, or a label that reads past the table and gives flat images or NaN."""
    with pytest.raises(UserError, match=text):
        conditioner.from_requests({name: np.asarray(values) for name, values in requests.items()})


def test_without_conditioner():
    """A config that names no conditioner and still trains on labels."""
    run = build.Run(tiny.config(conditioner__name="none", model__num_classes=0))
    assert isinstance(run.conditioner, Unconditional) and not run.task.has_null_condition
    assert set(run.task.batch_spec()) == {"image", "label"}
    with pytest.raises(UserError, match=r"conditioner\.name to labels"):
        build.Run(tiny.config(conditioner__name="none")).abstract_state


def test_a_trained_conditioner_is_part_of_the_state():
    """Parameters of a conditioner that are not trained, or that reach the network."""

    class Table(Labels):
        rules = ((rf"{CONDITIONER}/table", (None, None)),)

        def init(self, key):
            return {"table": jnp.ones((11, 1))}

        def from_batch(self, params, constants, batch):
            shift = params["table"][batch["label"]].sum()
            return {"label": batch["label"] + 0 * shift.astype(jnp.int32)}

    task = dataclasses.replace(build.Run(tiny.config()).task, conditioner=Table(10))
    state = jax.eval_shape(task.init, jax.random.key(0))
    assert state.params[CONDITIONER]["table"].shape == (11, 1) and state.ema_params[CONDITIONER]["table"].shape == (11, 1)
    batch = {"image": jnp.zeros((2, 8, 8, 1), jnp.uint8), "label": jnp.array([1, 2])}
    jax.eval_shape(task.step, state, {"codec": {}}, batch, jax.random.key(1))
