import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from dit_jax import build, recipes, registry
from dit_jax.diffusion.flow import Flow
from dit_jax.diffusion.gaussian import Gaussian
from dit_jax.diffusion.guidance import Guidance, replace_condition
from dit_jax.diffusion.process import Memoryless
from dit_jax.errors import UserError


def network(x, t, cond):
    """Two data channels and two variance channels, all of which depend on label and time."""
    y = jnp.concatenate([x, x + 1], axis=-1) * cond["label"][:, None, None, None]
    return y + t[:, None, None, None]


KEYS = jax.random.split(jax.random.key(1), 1)
X = jax.random.normal(jax.random.key(0), (3, 4, 4, 2))
COND, NULL = {"label": jnp.array([1.0, 2.0, 3.0])}, {"label": jnp.full(3, 10.0)}


def expected(scale, channels):
    t = jnp.full(3, 5.0)
    cond, uncond = network(X, t, COND), network(X, t, NULL)
    return cond.at[..., :channels].set((uncond + scale * (cond - uncond))[..., :channels])


@pytest.mark.parametrize("channels, guided", [(None, 2), (1, 1)])
def test_guides_data_channels_only(channels, guided):
    """Guidance that also scales the learned variance, mixes up examples, or slices the wrong axis (NHWC)."""
    out = Guidance(3.0, channels)(network, COND, NULL)(X, 0.5, 5.0)
    np.testing.assert_allclose(out, expected(3.0, guided), rtol=1e-5, atol=1e-5)


def test_text_is_guided_by_its_own_null_condition():
    """Catches a context, pooled text or mask that meets another example's, or the null condition's, in the doubled batch; and a
    dropped condition of which a part stays."""
    rng = np.random.default_rng(0)

    def text(masked):
        mask = np.arange(5) < np.asarray(masked)[:, None]
        return {"context": rng.normal(size=(3, 5, 2)), "pooled": rng.normal(size=(3, 2)), "context_mask": mask}

    def reading(x, t, cond):
        assert cond["context_mask"].dtype == bool
        mean = (cond["context"] * cond["context_mask"][..., None]).sum(1) / cond["context_mask"].sum(1, keepdims=True)
        return x * (mean + 2 * cond["pooled"])[:, None, None] + t[:, None, None, None]

    cond, null = (jax.tree.map(jnp.asarray, text(masked)) for masked in ([1, 3, 5], [2, 4, 1]))
    t = jnp.full(3, 500.0)
    strong, weak = reading(X, t, cond), reading(X, t, null)
    np.testing.assert_allclose(
        Guidance(4.0)(reading, cond, null)(X, 0.5, 500.0), weak + 4 * (strong - weak), rtol=1e-5, atol=1e-4
    )
    dropped = replace_condition(jnp.array([True, False, True]), cond, null)
    for name in cond:
        np.testing.assert_array_equal(dropped[name], np.stack([null[name][0], cond[name][1], null[name][2]]))


def test_text_and_given_part_have_scales_of_their_own():
    """Catches the scales of the two terms swapped, a term that begins at another output, and three conditions that are mixed up
    between examples."""

    def reading(x, t, cond):
        return x * (cond["text"] + 3 * cond["given"])[:, None, None, None] + (cond["text"] * cond["given"])[:, None, None, None]

    text, given, zero = jnp.array([1.0, 2.0, 3.0]), jnp.array([5.0, 7.0, 11.0]), jnp.zeros(3)
    both, no_text, bare = ({"text": a, "given": b} for a, b in ((text, given), (zero, given), (zero, zero)))
    t = jnp.full(3, 500.0)
    v, v_given, v_bare = (reading(X, t, cond) for cond in (both, no_text, bare))
    found = Guidance(4.0, image_scale=1.5)(reading, both, no_text, bare_cond=bare)(X, 0.5, 500.0)
    np.testing.assert_allclose(found, v_bare + 1.5 * (v_given - v_bare) + 4 * (v - v_given), rtol=1e-5, atol=1e-4)
    one = Guidance(4.0, channels=1, image_scale=1.5)(reading, both, no_text, bare_cond=bare)(X, 0.5, 500.0)
    np.testing.assert_allclose(one[..., 0], found[..., 0], rtol=1e-5)
    np.testing.assert_allclose(one[..., 1], v[..., 1], rtol=1e-5)
    alone = Guidance(1.0, image_scale=2.0)(reading, both, no_text, bare_cond=bare)(X, 0.5, 500.0)
    np.testing.assert_allclose(alone, v + (v_given - v_bare), rtol=1e-5, atol=1e-4)
    nothing = Guidance(4.0, image_scale=1.5)(reading, both, no_text)(X, 0.5, 500.0)
    np.testing.assert_allclose(nothing, v_given + 4 * (v - v_given), rtol=1e-5, atol=1e-4)
    with pytest.raises(UserError, match="a second network guides"):
        Guidance(4.0, image_scale=1.5)(reading, both, no_text, reading, bare_cond=bare)


def test_interval():
    """Guidance outside its interval, or none at its ends."""
    guided = Guidance(3.0, None, 0.2, 0.6)(network, COND, NULL)
    plain = network(X, jnp.full(3, 5.0), COND)
    for t, on in ((0.1, False), (0.2, True), (0.6, True), (0.7, False)):
        np.testing.assert_allclose(guided(X, jnp.float32(t), 5.0), expected(3.0, 2) if on else plain, rtol=1e-5, atol=1e-5)


def test_off_runs_the_network_once():
    """Paying for the second forward at scale 1, or outside the interval."""
    batches = []

    def counting(x, t, cond):
        jax.debug.callback(lambda: batches.append(len(x)))
        return network(x, t, cond)

    Guidance(1.0)(counting, COND, NULL)(X, 0.5, 5.0)
    guided = jax.jit(Guidance(2.0, None, 0.4, 0.6)(counting, COND, NULL))
    guided(X, 0.5, 5.0)
    guided(X, 0.7, 5.0)
    jax.effects_barrier()
    assert batches == [3, 6, 3]


@pytest.mark.parametrize("name", registry.names("sampler"))
def test_every_sampler_runs_both_at_once_and_only_inside(name):
    """The second forward computed and thrown away outside of the interval, or beside the first instead of with it, at a sampler's
    later evaluations of a step too."""
    calls = []

    def counting(x, t, cond):
        jax.debug.callback(lambda t: calls.append((len(x), float(t))), t[0])
        return 0.1 * x * cond["label"][:, None, None, None]

    sampler = registry.get("sampler", name)(**({} if name == "dopri5" else {"num_steps": 10}))
    cond, null = {"label": jnp.ones(1)}, {"label": jnp.zeros(1)}
    guided = Guidance(2.0, None, 0.25, 0.75)(counting, cond, null)

    def draw(x):
        denoise = Memoryless(lambda x, t: Flow().predict(guided(x, t, Flow().network_time(t)), x, t))
        return sampler(Flow(), denoise, x, KEYS)

    jax.block_until_ready(jax.jit(draw)(jnp.ones((1, 1, 1, 1))))
    jax.effects_barrier()
    assert len(calls) == (sampler.evaluations(Flow()) or len(calls)) >= 10
    assert {rows for rows, t in calls if 0.25 <= t <= 0.75} == {2} and {rows for rows, t in calls if not 0.25 <= t <= 0.75} == {1}


def test_replace_condition():
    """A part of an example's condition dropped without the rest, or that of another example."""
    cond = {"label": jnp.arange(3), "context": jnp.ones((3, 2, 4))}
    null = {"label": jnp.full(3, 7), "context": jnp.zeros((3, 2, 4))}
    found = replace_condition(jnp.array([False, True, False]), cond, null)
    np.testing.assert_array_equal(found["label"], [0, 7, 2])
    np.testing.assert_array_equal(found["context"][:, 0, 0], [1, 0, 1])


def test_skip_layer_guidance_acts_at_its_steps_alone():
    """Catches a third forward at every step, at a neighbour of the first or last step, or on the variance's channels; and
    skip-layer guidance that changes the other: of scale 1, or of an interval."""
    times = np.linspace(1, 0, 11)
    calls = []

    def skipped(x, t, cond):
        jax.debug.callback(lambda: calls.append(len(x)))
        return network(x, t, cond) * 0.25

    for fields, guided in (({}, False), ({"scale": 3.0}, True), ({"scale": 3.0, "high": 0.5}, False)):
        guidance = Guidance(**fields, skip_layers=(1,), skip_scale=2.0, skip_low=0.2, skip_high=0.55)
        found = guidance(network, COND, NULL, skipped=skipped, skip_times=guidance.skip_times(times))
        strong = network(X, jnp.full(3, 5.0), COND)
        plain = expected(3.0, 2) if guided else strong
        acts = [bool(np.abs(found(X, jnp.float32(t), 5.0) - plain).max() > 1e-3) for t in times[:-1]]
        assert acts == [3 <= i <= 5 or (i >= 5 and "high" in fields) for i in range(10)]
        wanted = plain.at[..., :2].add(2 * 0.75 * strong[..., :2])
        np.testing.assert_allclose(found(X, jnp.float32(0.6), 5.0), wanted, rtol=1e-5, atol=1e-5)
    jax.effects_barrier()
    assert len(calls) == 3 * (3 + 1)


def test_skip_layer_guidance_that_acts_at_no_step_is_refused():
    """Catches images that are not guided as asked, without a word; and a first step that is left out where skip_low is 0."""
    with pytest.raises(UserError, match="has none of the 4 sampling steps, 0 to 3; raise skip_high or take more steps"):
        Guidance(skip_layers=(1,)).skip_times(np.linspace(1, 0, 5))
    low, high = Guidance(skip_layers=(1,), skip_high=1.0).skip_times(np.linspace(1, 0, 5))
    assert (low, high) == (0.125, 0.875)


SKIPS = {"guidance__skip_layers": (1,)}
REFUSED_SKIPS = {
    "block 2, and the network has the blocks 0 to 1": {"guidance__skip_layers": (0, 2)},
    "all 2 blocks": {"guidance__skip_layers": (0, 1)},
    "needs all blocks at other times": SKIPS | {"forecast__interval": 2, "sampler__num_steps": 20},
}


@pytest.mark.parametrize("text", REFUSED_SKIPS)
def test_skip_layer_guidance_is_checked_with_the_network(text):
    """Catches blocks that do not exist, and forecasts of another network's blocks."""
    run = build.Run(tiny.config(**REFUSED_SKIPS[text]))
    with pytest.raises(UserError, match=text):
        assert run.guidance and run.forecast


@pytest.mark.parametrize("name", ["unet", "hourglass"])
def test_networks_that_cannot_skip_say_so(name):
    """Catches a flag without effect, or an error that names nothing that the user wrote."""
    with pytest.raises(UserError, match="cannot skip blocks; leave"):
        build.Run(tiny.other(name, **SKIPS)).guidance


def test_skipping_needs_a_grid():
    """Catches shares of the steps of a sampler that chooses its own."""
    task = build.Run(tiny.config(process=recipes.flow())).task
    with pytest.raises(UserError, match="DormandPrince has no grid of times"):
        task.skips(Guidance(skip_layers=(1,)), registry.get("sampler", "dopri5")())


@pytest.mark.parametrize(
    "fields",
    [
        {"low": 0.6, "high": 0.4},
        {"high": 1.5},
        {"channels": 0},
        {"skip_layers": (-1,)},
        {"skip_layers": (1.0,)},
        {"skip_scale": -1.0},
        {"skip_low": 0.3, "skip_high": 0.3},
    ],
)
def test_bad_fields(fields):
    """An interval or channel count that guides nothing, silently."""
    with pytest.raises(UserError):
        Guidance(2.0, **fields)


@pytest.mark.parametrize(
    "overrides, text",
    [
        ({"guidance__channels": 3}, "the data has 1"),
        ({"guidance__scale": 1.5, "task__cond_dropout": 0.0}, "task.cond_dropout = 0.0"),
        ({"guidance__scale": 1.5, "model__num_classes": 0}, "not trained on the null condition"),
    ],
)
def test_refused_before_training(overrides, text):
    """Guidance that fails at the first preview, or pays for a second forward that changes nothing."""
    with pytest.raises(UserError, match=text):
        build.Run(tiny.config(**overrides)).guidance


@pytest.mark.parametrize("process", [Gaussian(), Flow()], ids=["gaussian", "flow"])
def test_power_cosine(process):
    """Catches a schedule that falls towards the data, a power on the wrong factor, times that are off by one, a scale that
    also changes the learned variance or the unguided times."""
    guidance = Guidance(4.4, 1, 0.0, 0.9, "power_cosine", 4.0)
    guided = guidance(network, COND, NULL, first_time=process.min_time)
    for timestep in (0, 137, 500, 899, 950):  # of the published code, which counts from 0
        t = timestep / 1000 + process.min_time
        w = 1 + (4.4 - 1) * (1 - np.cos(np.pi * (1 - timestep / 1000) ** 4)) / 2  # float64
        for time in (jnp.float32(t), jnp.full(3, t, jnp.float32)):
            found = guided(X, time, 5.0)
            np.testing.assert_allclose(found, expected(w if t <= 0.9 else 1.0, 1), rtol=2e-5, atol=2e-5)
    assert float(guidance.scale_at(process.min_time, process.min_time)) == pytest.approx(4.4)
    assert Guidance(4.4).scale_at(0.3) == 4.4


@pytest.mark.parametrize(
    "fields, text", [({"schedule": "cosine"}, "constant, power_cosine"), ({"power": 0.0}, "must be positive")]
)
def test_bad_schedules(fields, text):
    """Catches a schedule that guides by NaN, or a name that is taken for constant."""
    with pytest.raises(UserError, match=text):
        Guidance(2.0, **fields)
