"""MM-DiT on clips: identities of its positions, of the given part, and of images as clips of one frame."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from dit_jax.errors import UserError
from dit_jax.models import rotary
from dit_jax.models.mmdit import MMDiT

FIELDS = {"patch_size": 2, "depth": 3, "width": 32, "heads": 2, "out_channels": 3, "context_width": 6, "pooled_width": 5}
SHAPE = (3, 6, 4, 3)  # frames, rows, columns, channels


def made(**fields):
    """(network, random non-zero parameters, clip, times, condition)."""
    net = MMDiT(**FIELDS | {"position": "rope", "known_frames": True, "qk_norm": True} | fields)
    rng = np.random.default_rng(0)
    x, context, pooled = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((2, *SHAPE), (2, 4, 6), (2, 5)))
    cond, t = {"context": context, "pooled": pooled}, jnp.array([0.3, 0.9])
    shapes = jax.eval_shape(net.init, jax.random.key(0), x, t, cond)["params"]
    params = jax.tree.map(lambda leaf: jnp.asarray(0.2 * rng.standard_normal(leaf.shape), jnp.float32), shapes)
    return net, params, x, t, cond


def apply(net, params, *args):
    """The network compiled: run one operation after the other, it takes seconds."""
    return jax.jit(lambda params, *args: net.apply({"params": params}, *args))(params, *args)


def test_an_image_is_a_clip_of_one_frame():
    """Catches a patch order, head or known embedding that differs between ranks."""
    net, params, x, t, cond = made(rope_frequencies="geometric")
    known = {"known": x[:, :1], "known_mask": (x[:, :1, :, :, :1] > 0).astype(jnp.float32)}
    clip = apply(net, params, x[:, :1], t, cond | known)
    image = apply(net, params, x[:, 0], t, cond | {name: value[:, 0] for name, value in known.items()})
    np.testing.assert_array_equal(clip[:, 0], image)


def test_nothing_given_changes_no_bit_and_something_given_does():
    """Catches a bias in the embedding of the given part, values that leak past the mask, and an entry that is ignored."""
    net, params, x, t, cond = made()
    plain = apply(net, params, x, t, cond)
    zeros = {"known": x, "known_mask": jnp.zeros((*x.shape[:-1], 1))}
    np.testing.assert_array_equal(plain, apply(net, params, x, t, cond | zeros))
    mask = zeros["known_mask"].at[:, 0].set(1)
    given = apply(net, params, x, t, cond | {"known": x, "known_mask": mask})
    other = apply(net, params, x, t, cond | {"known": x.at[:, 1:].add(7), "known_mask": mask})
    np.testing.assert_array_equal(given, other)  # what the mask does not give has no influence
    assert tiny.distance(given, plain) > 1e-2
    without = MMDiT(**FIELDS | {"position": "rope", "qk_norm": True})
    bare = {name: leaf for name, leaf in params.items() if name != "known_embedding"}
    np.testing.assert_array_equal(plain, apply(without, bare, x, t, cond))
    fresh = net.init(jax.random.key(0), x, t, cond)["params"]["known_embedding"]
    assert list(fresh) == ["kernel"] and not fresh["kernel"].any() and fresh["kernel"].shape == (2 * 2 * 4, 32)


def test_permuted_tokens_with_permuted_positions_give_permuted_outputs():
    """Catches a block that uses the order of tokens, and angles that are applied to another stream."""
    net, params, x, t, cond = made()
    embedded = net.apply({"params": params}, x, t, cond, method="embed")
    order = np.random.default_rng(1).permutation(embedded.x.shape[1])
    permuted = embedded._replace(x=embedded.x[:, order], angles=embedded.angles[order])
    first, second = (net.apply({"params": params}, each, method="run_blocks") for each in (embedded, permuted))
    np.testing.assert_allclose(first[:, order], second, atol=2e-5)
    moved = net.apply({"params": params}, embedded._replace(x=embedded.x[:, order]), method="run_blocks")
    assert tiny.distance(moved, second) > 1e-3


@pytest.mark.slow
def test_scanned_blocks_equal_unrolled_ones_in_float32_and_bfloat16():
    """Catches rotary angles that a scan splits over blocks."""
    for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 0.03)):
        outputs = []
        for unroll in (False, True):
            net, params, x, t, cond = made(unroll=unroll, dtype=dtype)
            fps = {"fps": jnp.array([12.0, 24.0])}
            outputs.append(jax.jit(net.apply)({"params": params}, x, t, cond | fps))
        assert tiny.distance(*outputs) < tolerance


def test_frames_per_second_are_positions_in_time():
    """Catches a rate that scales rows or columns, that is shared by the batch, or whose inverse is meant."""
    net, params, x, t, cond = made(base_fps=24.0)
    plain = apply(net, params, x, t, cond)
    same = apply(net, params, x, t, cond | {"fps": jnp.array([24.0, 24.0])})
    np.testing.assert_allclose(plain, same, atol=1e-6)
    mixed = apply(net, params, x, t, cond | {"fps": jnp.array([24.0, 12.0])})
    np.testing.assert_allclose(plain[0], mixed[0], atol=1e-5)
    assert tiny.distance(plain[1], mixed[1]) > 1e-3
    angles = net.apply({"params": params}, x, t, cond | {"fps": jnp.array([24.0, 12.0])}, method="embed").angles
    of_frames = net._rope_widths()[0] // 2
    np.testing.assert_allclose(
        angles[1, :, :of_frames], 2 * angles[0, :, :of_frames], rtol=1e-6
    )  # half the rate: twice as far apart
    np.testing.assert_array_equal(angles[1, :, of_frames:], angles[0, :, of_frames:])


def test_frequencies_are_chosen_by_the_grid_of_training():
    """Catches frequencies that change with the length of the clip that is drawn, and a choice that hides neighbours."""
    assert [rotary.chosen("auto", n, 12) for n in (1, 4, 5, 8)] == ["quarter_turns", "quarter_turns", "grid", "grid"]
    assert rotary.chosen("auto", 64, 56) == "geometric"
    np.testing.assert_allclose(rotary.frequencies("quarter_turns", 4, 6), [np.pi / 2, np.pi, np.pi / 2])
    np.testing.assert_allclose(rotary.frequencies("geometric", 4, 8), [1, 1e-1, 1e-2, 1e-3], rtol=1e-12)
    np.testing.assert_allclose(rotary.frequencies("grid", 8, 4), [np.pi / 2, np.pi / 16])
    for n in range(2, 200):
        assert not rotary.cannot_tell_neighbours(rotary.chosen("auto", n, 16), n, 16)
    net, params, x, t, cond = made()
    fixed = net.for_input(SHAPE)
    assert fixed.rope_grid == (3, 3, 2)
    np.testing.assert_array_equal(apply(net, params, x, t, cond), apply(fixed, params, x, t, cond))
    longer = jnp.concatenate([x] * 4, axis=1)  # 12 frames
    angles = fixed.apply({"params": params}, longer, t, cond, method="embed").angles
    np.testing.assert_allclose(angles[6:12, 0], np.pi / 2, rtol=1e-6)  # frame 1


def test_frequencies_that_hide_neighbours_are_reported(capsys):
    MMDiT(**FIELDS | {"position": "rope", "rope_frequencies": "geometric"}).for_input((4, 8, 8, 3))
    said = capsys.readouterr()
    assert "over 4 rows of tokens most pairs turn so little" in said.out + said.err
    MMDiT(**FIELDS | {"position": "rope"}).for_input((4, 8, 8, 3))
    said = capsys.readouterr()
    assert "warning" not in said.out + said.err


@pytest.mark.parametrize(
    "entries, words",
    [
        ({"known": (2, *SHAPE)}, r'cond\["known_mask"\] is missing'),
        ({"known": (2, *SHAPE), "known_mask": (2, *SHAPE)}, r"\[2, 3, 6, 4, 1\] is needed"),
        ({"fps": (2, 1)}, "one number of frames per second for each clip"),
    ],
)
def test_entries_of_a_wrong_shape_are_refused(entries, words):
    net, params, x, t, cond = made()
    with pytest.raises(UserError, match=words):
        jax.eval_shape(net.apply, {"params": params}, x, t, cond | {name: jnp.ones(shape) for name, shape in entries.items()})


def test_a_network_without_known_frames_refuses_them():
    net, params, x, t, cond = made(known_frames=False)
    with pytest.raises(UserError, match="no cond entry 'known'"):
        jax.eval_shape(net.apply, {"params": params}, x, t, cond | {"known": x})
