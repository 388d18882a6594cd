import subprocess
import sys

import jax
import numpy as np
import pytest
from runs import load_config

from dit_jax import build, recipes, registry
from dit_jax.errors import UserError
from dit_jax.parallel.mesh import make_mesh
from dit_jax.sample.generator import Generator
from dit_jax.sample.labels import spread_labels


@pytest.mark.parametrize("name", registry.names("sampler"))
@pytest.mark.parametrize("process", recipes.PROCESSES)
def test_every_process_with_every_sampler(process, name):
    """A pair that fails at the first preview instead of at the start, or a recipe without one of a sampler's fields."""
    config = load_config("digits", f"process={process},sampler={name}")
    fields = set(registry.parameters("sampler", name))
    assert set(config.sampler) == fields | {"name"}
    if (process, name) in (("gaussian", "dopri5"), ("gaussian", "sde"), ("edm", "sde")):
        with pytest.raises(UserError, match=r"choose (another sampler|heun_sde)"):
            build.Run(config).sampler
    else:
        build.Run(config).sampler


def test_digits_argument():
    """A choice that does not arrive."""
    config = load_config("digits", "process=flow,conditioning=in_context,sampler=heun")
    assert (config.process.name, config.model.conditioning, config.sampler.name) == ("flow", "in_context", "heun")
    assert load_config("digits", "process=flow").sampler.to_dict() == {"name": "heun", "num_steps": 25}
    assert load_config("digits").sampler.to_dict() == {"name": "dpmpp", "num_steps": 20}


@pytest.mark.parametrize(
    "arg, text",
    [
        ("process=vp", "gaussian, flow"),
        ("sampler=rk4", "dopri5"),
        ("size=S", "process, conditioning, sampler"),
        ("flow", "process, conditioning, sampler"),
        ("process=flow,process=flow", "at most once"),
    ],
)
def test_bad_digits_argument(arg, text):
    """A mistyped choice that is ignored."""
    with pytest.raises(UserError, match=text):
        load_config("digits", arg)


def test_too_many_steps_fail_at_once():
    """More steps than timesteps, seen only when the first samples are drawn."""
    config = load_config("digits")
    config.sampler.num_steps = 2000
    with pytest.raises(UserError, match="1 to 1000"):
        build.Run(config).sampler


def test_recipes_need_nothing_else():
    """A recipe that fails in a process that has not imported `build`, as `plan --config=` is."""
    code = "from dit_jax import recipes\nfor make in recipes.PUBLISHED.values(): make()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_sit_keeps_dits_network():
    """A SiT whose final layer SiT's weights do not fit: 8 output channels of which 4 are read."""
    config = load_config("sit_xl2_imagenet256")
    assert build.Run(config).network.out_channels == 8
    assert config.model == load_config("xl2_imagenet256").model


@pytest.mark.slow
def test_flow_through_the_task():
    """A flow that the task does not carry: a loss at its start, images by an adaptive solver with an interval of guidance."""
    config = recipes.digits("flow", sampler="dopri5")
    config.model.update({"depth": 1, "width": 32})
    config.guidance.update({"scale": 2.0, "low": 0.3, "high": 0.8})
    task, mesh = build.Run(config).task, make_mesh(1, 1, 1, jax.devices()[:1])
    params = jax.jit(task.init)(jax.random.key(0)).params
    batch = {"image": np.zeros((64, 8, 8, 1), np.uint8), "label": np.arange(64, dtype=np.int32) % 10}
    constants = {"codec": {}}

    def first_loss(params, key):
        return task.loss(params, constants, **task.draw_inputs(constants, batch, key))[0]

    loss = jax.jit(first_loss)(params, jax.random.key(1))
    # The network starts at zero, so the loss is the mean of (x0 - noise)^2 with x0 = (-1 + 0.39) / 0.75 everywhere.
    np.testing.assert_allclose(loss, 1 + (0.61 / 0.75) ** 2, rtol=0.1)
    generator = Generator(task, mesh, build.Run(config).sampler, build.Run(config).guidance, 4, seed=0)
    images = generator(params, {"codec": {}}, {"label": spread_labels(4, 10)}, 4)
    assert images.shape == (4, 8, 8, 1) and images.std() > 0  # a zero velocity gives back the noise
