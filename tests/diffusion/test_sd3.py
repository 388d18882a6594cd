"""The sampling of Stable Diffusion 3: diffusers' pipeline beside dit_jax, with the same random network, text and noise."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from dit_files import held
from flax.traverse_util import unflatten_dict

from dit_jax.diffusion import samplers
from dit_jax.diffusion.flow import Flow
from dit_jax.diffusion.guidance import Guidance
from dit_jax.interop import mmdit
from dit_jax.models.mmdit import MMDiT
from dit_jax.tasks.diffusion import DiffusionTask

FIELDS = {
    "patch_size": 2, "depth": 3, "width": 128, "heads": 2, "context_width": 24, "pooled_width": 20, "table_side": 12,
    "table_base": 64, "qk_norm": True, "dual_blocks": 1,
}  # fmt: skip
THEIR_NAMES = {"scale": "scale", "start": "low", "stop": "high"}
SHAPE, STEPS, SCALE = (8, 12, 16), 28, 5.0
SKIPS, SKIPPED_STEPS = {"skip_layers": (0, 2), "skip_scale": 1.5, "skip_low": 0.2, "skip_high": 0.8}, 5  # acts at steps 2 and 3
RNG = np.random.default_rng(3)
NOISE = RNG.standard_normal((2, *SHAPE)).astype(np.float32)
COND, NEGATIVE = (
    {"context": RNG.standard_normal((2, 7, 24)).astype(np.float32), "pooled": RNG.standard_normal((2, 20)).astype(np.float32)}
    for _ in range(2)
)


@dataclass(frozen=True)
class Given:
    """A conditioner whose conditions are encoded text, and whose null condition is that of negative prompts."""

    rules: tuple = ()
    num_classes: int = 0
    negative: Any = field(default_factory=lambda: NEGATIVE)

    def from_batch(self, params, constants, batch):
        return batch

    def null(self, params, constants, cond):
        return self.negative


@pytest.fixture(scope="module")
def tensors():
    shapes = mmdit.shapes_of(MMDiT(**FIELDS, out_channels=16), 16)
    rng = np.random.default_rng(1)
    return {path: (0.1 * rng.standard_normal(shape)).astype(np.float32) for path, shape in shapes.items()}


def ours(tensors, process, steps=STEPS, skips=None):
    network = MMDiT(**FIELDS, out_channels=16)
    task = DiffusionTask(network, process, None, Given(), None, image_shape=(64, 96, 3), latent_shape=SHAPE)
    params = unflatten_dict({path: jnp.asarray(x) for path, x in tensors.items()}, sep="/")
    keys, sampler, guidance = jax.random.split(jax.random.key(0), 2), samplers.Euler(steps), Guidance(SCALE, **(skips or {}))
    draw = jax.jit(lambda params, noise: task.draw_latents(params, {}, keys, COND, sampler, guidance, noise=noise))
    return np.asarray(draw(params, NOISE))


def theirs(tensors, steps=STEPS, skips=None):
    """The latents of diffusers' `StableDiffusion3Pipeline`, which is given encoded text and noise."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    pytest.importorskip("transformers")  # the pipeline imports it
    model = {"name": "mmdit", "position": "table", "mlp_ratio": 4.0, **FIELDS}
    named, config = mmdit.write({path: held(x) for path, x in tensors.items()}, "diffusers", model, SHAPE)
    network = diffusers.SD3Transformer2DModel(**{name: value for name, value in config.items() if name[0] != "_"}).eval()
    network.load_state_dict({name: torch.tensor(x.load()) for name, x in named.items()})
    empty = dict.fromkeys(["vae", *(f"{part}{i}" for part in ("text_encoder", "tokenizer") for i in ("", "_2", "_3"))])
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipeline = diffusers.StableDiffusion3Pipeline(transformer=network, scheduler=scheduler, **empty)
    pipeline.set_progress_bar_config(disable=True)
    text = {
        f"{sign}{name}": torch.tensor(cond[entry])
        for sign, cond in (("", COND), ("negative_", NEGATIVE))
        for name, entry in (("prompt_embeds", "context"), ("pooled_prompt_embeds", "pooled"))
    }
    noise = torch.tensor(NOISE.transpose(0, 3, 1, 2).copy())
    size = {"height": 8 * SHAPE[0], "width": 8 * SHAPE[1]}
    if skips:
        text["skip_guidance_layers"] = list(skips["skip_layers"])
        text |= {f"skip_layer_guidance_{ending}": skips[f"skip_{name}"] for ending, name in THEIR_NAMES.items()}
    result = pipeline(**text, **size, latents=noise, num_inference_steps=steps, guidance_scale=SCALE, output_type="latent")
    return result.images.permute(0, 2, 3, 1).numpy()


def test_trajectory_equals_diffusers(tensors):
    """Catches the sign, the time, the grid, the order of guidance or the null condition of SD3: the images would be mush."""
    wanted = theirs(tensors)
    process = Flow(convention="sd3", sampling_grid="sd3", shift=3.0)
    assert tiny.distance(ours(tensors, process), wanted) < 1e-3


def test_skip_layer_guidance_equals_diffusers(tensors):
    """Catches skip-layer guidance of the null condition, at other steps, of another sign, or that keeps a block of the stacks."""
    process = Flow(convention="sd3", sampling_grid="sd3", shift=3.0)
    drawn = {skipping: ours(tensors, process, SKIPPED_STEPS, SKIPS if skipping else None) for skipping in (True, False)}
    assert tiny.distance(drawn[True], theirs(tensors, SKIPPED_STEPS, SKIPS)) < 1e-4
    assert tiny.distance(drawn[True], drawn[False]) > 1e-2
