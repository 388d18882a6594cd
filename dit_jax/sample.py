"""Draws images from the moving-average weights of a trained run, which needs only its folder, or from a weights file.

    python -m dit_jax.sample --workdir=runs/digits --num_samples=100 --labels=3,5 --guidance_scale=1.5 --out=x.npz
    python -m dit_jax.sample --weights=dit.safetensors --codec_path=sd-vae-ft-ema --labels=207 --guidance_scale=4 --out=x.npz

Writes x.npz (arr_0: uint8 [N, H, W, C], labels: int32 [N], made_by: JSON) and x.png, a grid of the first 100.
"""

import time
from pathlib import Path

import jax
import ml_collections
from absl import flags

from dit_jax import console
from dit_jax.errors import UserError

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run of dit_jax.main.")
STEP = flags.DEFINE_integer("step", None, "Checkpoint to use; the newest good one if not given.")
WEIGHTS = flags.DEFINE_string("weights", None, "A .safetensors of dit_jax.convert, in place of --workdir.")
CODEC_PATH = flags.DEFINE_string("codec_path", None, "Weights of the VAE; the config's codec.path if not given.")
NUM_SAMPLES = flags.DEFINE_integer("num_samples", 64, "How many images.")
LABELS = flags.DEFINE_list("labels", [], "Classes in turn, as in 3,5; all classes in turn if not given.")
GUIDANCE_SCALE = flags.DEFINE_float("guidance_scale", None, "1 is off; the config's if not given.")
SAMPLER = flags.DEFINE_string("sampler", None, "ddpm or ddim; the config's if not given.")
NUM_STEPS = flags.DEFINE_integer("num_steps", None, "Sampling steps; the config's if not given.")
SEED = flags.DEFINE_integer("seed", 0, "Image k depends on the seed, k and its label.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Images at a time, over all devices; the config's if not given.")
OUT = flags.DEFINE_string("out", "samples.npz", "Where the images go.")


def override(config: ml_collections.ConfigDict):
    """Puts the flags' choices into the config's sampler, guidance and codec."""
    if SAMPLER.value is not None and SAMPLER.value != config.sampler.name:
        config.sampler = ml_collections.ConfigDict({"name": SAMPLER.value, "num_steps": config.sampler.num_steps})
    if NUM_STEPS.value is not None:
        config.sampler.num_steps = NUM_STEPS.value
    if GUIDANCE_SCALE.value is not None:
        config.guidance.scale = GUIDANCE_SCALE.value
    if CODEC_PATH.value is not None:
        if "path" not in config.codec:
            raise UserError(f"--codec_path={CODEC_PATH.value}: the codec {config.codec.name!r} has no weights; leave it out")
        config.codec.path = CODEC_PATH.value
    if config.codec.get("path") == "":
        raise UserError("the weights of the VAE are elsewhere: give their folder or .safetensors file with --codec_path")


def read_source() -> tuple[ml_collections.ConfigDict, dict | None]:
    """The config of the run or the weights file, and where the file's weights came from (None for a run)."""
    if WORKDIR.value is not None:
        from dit_jax.training.workdir import read_config

        return ml_collections.ConfigDict(read_config(WORKDIR.value)), None
    if STEP.value is not None:
        raise UserError("--step is a checkpoint of a --workdir; a weights file has one set of weights, so leave it out")
    from dit_jax.conversion import config_of
    from dit_jax.interop import weights

    found = weights.read(Path(WEIGHTS.value).expanduser())
    return config_of(found.sections), found.origin


def load_params(init, mesh):
    """(moving-average parameters on the mesh, their step or None) of the run or the weights file.

    init: key -> TrainState.

    Raises:
        FileNotFoundError: the run has no such checkpoint.
    """
    from dit_jax.interop import weights
    from dit_jax.training.checkpoint import restore_subtree
    from dit_jax.training.state import abstract_state

    abstract = abstract_state(init, mesh).ema_params
    if WEIGHTS.value is not None:
        params = weights.load(Path(WEIGHTS.value).expanduser(), abstract)
        return jax.device_put(params, jax.tree.map(lambda x: x.sharding, abstract)), None
    restored, _, step = restore_subtree(Path(WORKDIR.value).expanduser().absolute() / "checkpoints",
                                        {"ema_params": abstract}, STEP.value)
    return restored["ema_params"], step


def parse_labels(texts: list[str]) -> tuple[int, ...]:
    try:
        return tuple(int(text) for text in texts)
    except ValueError:
        raise UserError(f"--labels={','.join(texts)}: whole numbers with commas between them are needed, as in 3,5") from None


def main() -> dict:
    if (WORKDIR.value is None) == (WEIGHTS.value is None):
        raise UserError("give --workdir=<folder of a run of dit_jax.main> or --weights=<file of dit_jax.convert>, one of them")
    out = Path(OUT.value).expanduser().absolute()
    if out.suffix != ".npz":
        raise UserError(f"--out={OUT.value} must end in .npz")
    from dit_jax import build
    from dit_jax.training import samples_file
    from dit_jax.training.generate import Generator, spread_labels

    config, origin = read_source()
    override(config)
    config.mesh = {"data": -1, "fsdp": 1, "tensor": 1}  # the devices at hand now, whatever trained it
    mesh = build.mesh(config)
    task = build.task(config)
    labels = spread_labels(NUM_SAMPLES.value, task.num_classes, parse_labels(LABELS.value))
    ways = build.rows_per_step(mesh)
    batch_size = BATCH_SIZE.value or -(-min(config.evaluation.batch_size, NUM_SAMPLES.value) // ways) * ways
    generator = Generator(task, mesh, build.sampler(config), build.guidance(config), batch_size, SEED.value)
    try:
        constants = build.codec_params(config, mesh)
        params, step = load_params(task.init, mesh)
    except FileNotFoundError as error:
        raise UserError(str(error)) from None
    source = WEIGHTS.value if step is None else f"step {step} of {WORKDIR.value}"
    console.say(f"sampling from {source}: {dict(config.sampler)}, guidance {config.guidance.scale}")
    start = time.monotonic()
    images = generator(params, constants, labels, say_progress=True)
    seconds = time.monotonic() - start
    if jax.process_index() == 0:
        made_by = samples_file.describe(config, step, SEED.value) | ({"origin": origin} if origin else {})
        samples_file.write(out, images, labels, made_by)
    evaluations = config.sampler.num_steps * (2 if config.guidance.scale != 1 else 1)
    return {"out": str(out), "grid": str(out.with_suffix(".png")), "num_samples": len(images), "seconds": seconds,
            "evaluations": evaluations, "step": step}


if __name__ == "__main__":
    console.run(main)
