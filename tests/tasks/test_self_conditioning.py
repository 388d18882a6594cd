"""Self-conditioning in the training step and in the samplers."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from dit_jax import build, registry
from dit_jax.diffusion.flow import Flow
from dit_jax.diffusion.forecast import Forecast
from dit_jax.diffusion.guidance import Guidance
from dit_jax.diffusion.process import Memoryless, Prediction
from dit_jax.diffusion.samplers import DDIM
from dit_jax.diffusion.self_conditioning import SelfConditioned
from dit_jax.errors import UserError

FIELDS = {"name": "video_dit", "patch_size": 2, "depth": 2, "width": 16, "heads": 2, "num_classes": 10}
CONSTANTS = {"codec": {}}
BATCH = {
    "image": np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1)).astype(np.uint8),
    "label": np.arange(4, dtype=np.int32),
}


def task_of(rate, **fields):
    model = FIELDS | {"self_conditioning": rate > 0}
    return build.Run(tiny.config(model=model, task__self_conditioning=rate, process__variance="fixed_small", **fields)).task


def random(task):
    return tiny.random_params(task.init_params(jax.random.key(0)))


@pytest.mark.slow
def test_loss_and_gradient():
    """Catches a second pass that sees another estimate than the first one's x0, a gradient through the first pass, and an
    estimate in the steps without one."""
    task = task_of(0.5)
    params, inputs = random(task), task.draw_inputs(CONSTANTS, BATCH, jax.random.key(1))
    x0, noise, t = inputs["x0"], inputs["noise"], inputs["t"]
    x_t, time = task.process.perturb(x0, noise, t), task.process.network_time(t)
    inputs.pop("dropped")
    first = task.process.predict(task.apply(params, x_t, time, {"label": BATCH["label"]}), x_t, t).x0

    def loss(params, estimate):
        output = task.apply(params, x_t, time, {"label": BATCH["label"], "estimate": estimate})
        return task.process.loss(output, x0, noise, t)[0].mean()

    for chosen, estimate in ((True, first), (False, jnp.zeros_like(x0))):
        inputs["estimated"] = jnp.full(4, chosen)
        wanted = jax.value_and_grad(loss)(params, estimate)
        found = jax.value_and_grad(lambda p: task.loss(p, CONSTANTS, **inputs)[0])(params)
        assert tiny.distance(found, wanted) < 1e-5, chosen
    assert abs(loss(params, first) - loss(params, jnp.zeros_like(x0))) > 1e-4


@pytest.mark.exhaustive
def test_one_draw_for_a_step():
    """Catches examples of one step with different draws, a rate that is not the field's, and parts of a batch that lose it."""
    task = task_of(0.75)
    drawn = jax.vmap(lambda key: task.draw_inputs(CONSTANTS, BATCH, key)["estimated"])(jax.random.split(jax.random.key(0), 400))
    assert (drawn.all(1) == drawn.any(1)).all() and abs(float(drawn.mean()) - 0.75) < 0.07
    inputs = task.draw_inputs(CONSTANTS, BATCH, jax.random.key(1))
    parts = task_of(0.75, microbatches=2)
    gradients = [jax.jit(lambda p, t=t: t.gradients(p, CONSTANTS, inputs)[0])(random(task)) for t in (task, parts)]
    assert tiny.distance(*gradients) < 1e-5


def test_steps_without_an_estimate_run_the_network_once():
    """Catches a first pass that is computed in every step and thrown away."""
    from dit_jax.programs import jaxpr_flops

    task = task_of(0.5)
    inputs = task.draw_inputs(CONSTANTS, BATCH, jax.random.key(1))
    program = jax.make_jaxpr(lambda p: task.loss(p, CONSTANTS, **inputs)[0])(random(task))
    (branches,) = (e.params["branches"] for e in program.jaxpr.eqns if e.primitive.name == "cond")
    assert sorted(jaxpr_flops.count(branch) > 0 for branch in branches) == [False, True]


@pytest.mark.parametrize("name", registry.names("sampler"))
def test_samplers_hand_the_estimate_on(name):
    """Catches a sampler that drops the memory of a call or returns to an older one."""
    process = Flow() if name in ("sde", "dopri5", "dpmpp_sigma") else build.Run(tiny.config()).process
    sampler = registry.get("sampler", name)(**({} if name == "dopri5" else {"num_steps": 4}))
    calls = []

    def denoise_with(estimate):
        def denoise(x, t):
            prediction = Prediction(0.3 * x + 0.1 * estimate, x, 0.0)
            calls.append((np.asarray(estimate), np.asarray(prediction.x0)))
            return prediction

        return Memoryless(denoise)

    x = np.random.default_rng(0).normal(size=(2, 1, 1, 2)).astype(np.float32)
    with jax.disable_jit():
        sampler(process, SelfConditioned(denoise_with), jnp.asarray(x), jax.random.split(jax.random.key(0), 2))
    assert len(calls) > 3 and not calls[0][0].any()
    for (_, before), (estimate, _) in itertools.pairwise(calls):
        np.testing.assert_array_equal(estimate, before)


@pytest.mark.slow
def test_drawn_latents():
    """Catches guidance or forecasts without the estimate: beside a loop over the steps written out."""
    task = task_of(0.5)
    params, keys = random(task), jax.random.split(jax.random.key(2), 4)
    cond, null = {"label": jnp.arange(4)}, {"label": jnp.full(4, 10)}

    def draw(forecast=None):
        return task.draw_latents(params, CONSTANTS, keys, cond, DDIM(3), Guidance(1.5), forecast=forecast)

    x, estimate = task.initial_noise(keys), jnp.zeros((4, 8, 8, 1))
    times = task.process.grid(3)
    for t, after in itertools.pairwise(times):
        time = jnp.full(4, task.process.network_time(t))
        outputs = [task.apply(params, x, time, {**c, "estimate": estimate}) for c in (cond, null)]
        prediction = task.process.predict(outputs[1] + 1.5 * (outputs[0] - outputs[1]), x, jnp.float32(t))
        estimate = prediction.x0
        alpha, sigma = task.process.alpha_sigma(np.array([after]))
        x = alpha * prediction.x0 + sigma * prediction.noise
    assert tiny.distance(jax.jit(draw)(), x) < 1e-4
    assert tiny.distance(draw(Forecast(2, 1, 3)), x) < 1e-4  # all three steps are full ones


def test_refusals():
    """Catches a rate without effect, and a network that is never given what it takes."""
    for rate, takes, words in (
        (0.9, False, "takes no estimate of x0; set --config.task.self_conditioning=0"),
        (0.0, True, "takes an estimate of x0; set --config.model.self_conditioning=False"),
        (1.5, True, r"task.self_conditioning is 1.5; it must lie in \[0, 1\]"),
    ):
        model = FIELDS | {"self_conditioning": takes}
        with pytest.raises(UserError, match=words):
            build.Run(tiny.config(model=model, task__self_conditioning=rate)).task
