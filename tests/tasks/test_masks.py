"""The given part of clips in training: kinds, their shares, and the loss over the rest."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax import recipes
from dit_jax.build import Run
from dit_jax.diffusion.flow import Flow
from dit_jax.errors import UserError
from dit_jax.tasks.masks import draw_masks, known_entries, masks_of, unknown_weight

SHAPE = (4000, 4, 3, 5, 2)
FRAMES = {
    "none": (), "first": (0,), "last": (3,), "first_2": (0, 1), "last_2": (2, 3), "ends": (0, 3),
}  # fmt: skip


@pytest.mark.parametrize("kind", FRAMES)
def test_kinds_of_whole_frames(kind):
    """Catches a kind that gives other frames, and values other than 0 and 1."""
    mask = draw_masks(jax.random.key(0), {kind: 1.0}, (3, *SHAPE[1:]))
    wanted = np.zeros((3, 4, 3, 5, 1), np.float32)
    wanted[:, list(FRAMES[kind])] = 1
    np.testing.assert_array_equal(mask, wanted)


def test_kinds_come_as_often_as_the_table_says():
    """Catches probabilities that are shifted by one kind, and one draw for the whole batch."""
    table = {"none": 0.4, "first": 0.3, "last_2": 0.2, "ends": 0.1, "random": 0.0}
    mask = np.asarray(draw_masks(jax.random.key(1), table, SHAPE))[:, :, 0, 0, 0].astype(int)
    patterns = {"none": (0, 0, 0, 0), "first": (1, 0, 0, 0), "last_2": (0, 0, 1, 1), "ends": (1, 0, 0, 1)}
    for kind, pattern in patterns.items():
        assert abs((mask == pattern).all(1).mean() - table[kind]) < 0.03, kind


def test_random_frames_and_boxes():
    """Catches clips of which all is given, boxes that never reach an edge, and one that is not a box."""
    frames = np.asarray(draw_masks(jax.random.key(2), {"random": 1.0}, SHAPE))
    assert not frames.all((1, 2, 3, 4)).any() and set(frames.sum((1, 2, 3, 4)) // 15) == {0, 1, 2, 3}
    given = np.asarray(draw_masks(jax.random.key(3), {"box": 1.0}, SHAPE))[..., 0]
    unknown = 1 - given
    edges = [unknown.any(tuple(i for i in (1, 2, 3) if i != axis)) for axis in (1, 2, 3)]
    for axis, edge in zip((1, 2, 3), edges, strict=True):
        assert edge[:, 0].any() and edge[:, -1].any(), axis
    boxes = edges[0][:, :, None, None] & edges[1][:, None, :, None] & edges[2][:, None, None, :]
    np.testing.assert_array_equal(boxes, unknown.astype(bool))
    assert len({tuple(one) for one in edges[0]}) == 10  # every interval of 4 frames


def test_an_image_has_nothing_given_by_whole_frames():
    """Catches a batch of images without a loss."""
    for shape in ((50, 1, 3, 5, 2), (50, 3, 5, 2)):
        table = {"first": 0.5, "ends": 0.3, "random": 0.2}
        mask = draw_masks(jax.random.key(4), table, shape)
        assert mask.shape == (*shape[:-1], 1) and not mask.any()


def test_the_loss_is_the_mean_over_unknown_elements():
    """Catches a loss that still counts given elements in its mean, and one that is divided by their share twice."""
    rng = np.random.default_rng(0)
    x0, noise, output = (jnp.asarray(rng.standard_normal((3, 4, 3, 5, 2)), jnp.float32) for _ in range(3))
    mask = draw_masks(jax.random.key(5), {"first": 0.4, "last_2": 0.3, "none": 0.3}, x0.shape)
    process, t = Flow(), jnp.array([0.2, 0.5, 0.9])
    loss, _ = process.loss(output, x0, noise, t, unknown_weight(mask))
    one = jax.vmap(lambda i: process.loss(output, x0, noise, t, jax.nn.one_hot(i, 120).reshape(1, 4, 3, 5, 2))[0])
    elements = np.asarray(one(jnp.arange(120))).T.reshape(x0.shape) * 120
    unknown = np.broadcast_to(np.asarray(mask) == 0, x0.shape)
    wanted = [elements[i][unknown[i]].mean() for i in range(3)]
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    entries = known_entries(x0, mask)
    assert not np.asarray(entries["known"])[unknown].any() and entries["known_mask"].shape == (3, 4, 3, 5, 1)


@pytest.mark.parametrize(
    "table, words",
    [
        ({"middle": 1.0}, "no kind 'middle'"),
        ({"first_0": 1.0}, "no kind 'first_0'"),
        ({"none": 0.5, "first": 0.4}, "have the sum 0.9"),
        ({"none": 1.5, "first": -0.5}, "it is a probability"),
    ],
)
def test_tables_that_are_refused(table, words):
    with pytest.raises(UserError, match=words):
        masks_of(table)


def test_tables_as_texts_of_a_config():
    """Catches a table that the command line cannot set."""
    assert masks_of(("none=0.6", "first_2=0.4")) == {"none": 0.6, "first_2": 0.4} == masks_of({"none": 0.6, "first_2": 0.4})
    assert masks_of("none=1") == {"none": 1.0} and masks_of(()) == {}
    for wrong, words in ((("first",), "write kind=probability"), (("none=0.5", "none=0.5"), "twice")):
        with pytest.raises(UserError, match=words):
            masks_of(wrong)


@pytest.fixture(scope="module")
def task():
    config = recipes.rolling_digits().copy_and_resolve_references()
    config.unlock()
    config.model.update({"depth": 1, "width": 16, "heads": 1, "rope_widths": (4, 6, 6), "context_width": 8, "pooled_width": 8})
    config.conditioner.width, config.task.masks = 8, ("first=0.5", "last_2=0.5")
    return Run(config).task


@pytest.mark.slow
def test_the_task_tells_the_network_what_is_given_and_learns_the_rest(task):
    """Catches a network that is not told the given part or is told the rest, and a loss that counts what is given."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(task.init_params, jax.random.key(0))
    params = jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), jnp.float32), shapes)
    batch = {
        "image": jnp.asarray(rng.integers(0, 256, (3, 4, 8, 8, 1)), jnp.uint8),
        "tokens_bpe": jnp.asarray(rng.integers(3, 50, (3, 8)), jnp.int32),
    }
    inputs = task.draw_inputs({"codec": {}}, batch, jax.random.key(2))
    mask = np.asarray(inputs["known_mask"])
    assert set(mask[:, :, 0, 0, 0].sum(1)) <= {1, 2} and mask.any((1, 2, 3, 4)).all()
    loss = jax.jit(lambda **inputs: task.loss(params, {}, **inputs)[1]["loss"])(**inputs | {"dropped": jnp.zeros(3, bool)})

    def recomputed(known):
        x_t = task.process.perturb(inputs["x0"], inputs["noise"], inputs["t"])
        cond, _ = task.condition(params, {}, inputs["batch"])
        cond = {**cond, "known": known, "known_mask": inputs["known_mask"]}
        output = task.apply(params, task.process.network_input(x_t, inputs["t"]), task.process.network_time(inputs["t"]), cond)
        error = jnp.square(
            output - (inputs["x0"] - inputs["noise"])
        )  # x_t = (1 - t) x0 + t noise, of which time runs to the data
        return (error * (1 - mask)).sum((1, 2, 3, 4)) / ((1 - mask).sum((1, 2, 3, 4)) * error.shape[-1])

    np.testing.assert_allclose(loss, jax.jit(recomputed)(inputs["x0"] * mask), rtol=1e-4)


def test_a_network_that_is_not_told_is_refused(task):
    with pytest.raises(UserError, match=r"is not told them; set --config\.model\.known_frames=True"):
        dataclasses.replace(task, network=task.network.clone(known_frames=False))
