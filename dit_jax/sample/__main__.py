"""Samples images with the moving-average weights of a run's folder, or with a weights file.

    python -m dit_jax.sample --workdir=runs/digits --num_samples=100 --labels=3,5 --guidance_scale=1.5 --out=x.npz
    python -m dit_jax.sample --weights=dit.safetensors --codec_path=sd-vae-ft-ema --labels=207 --guidance_scale=4 --out=x.npz

Writes x.npz (arr_0: uint8 [N, H, W, C], labels: int32 [N], made_by: JSON) and x.png, a grid of the first 100. Images are first
written in shards to x.shards, which is removed when the npz is complete; --out=<folder> keeps the shards and writes no npz.
After a kill or a stop (SIGTERM, exit status 75) the same command continues; other settings are refused. Image k does not
depend on the number of devices and processes or on --batch_size: to the bit with --fsdp=1, else up to rounding.
"""

from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
from absl import flags

from dit_jax import recipes, registry
from dit_jax.errors import UserError
from dit_jax.runtime import command_line, console, processes
from dit_jax.runtime.field_values import FieldType

command_line.group("Where the weights come from")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run of dit_jax.main.")
STEP = flags.DEFINE_string(
    "step", None, "Checkpoint: a step, or `best` for the best score during training. Default: the newest intact checkpoint."
)
WEIGHTS = flags.DEFINE_string("weights", None, "A .safetensors file of dit_jax.convert, instead of --workdir.")
CODEC_PATH = flags.DEFINE_string("codec_path", None, "Weights of another VAE with the same latents. Default: the run's own.")
command_line.group("What to draw")
NUM_SAMPLES = flags.DEFINE_integer("num_samples", 64, "Number of images.")
LABELS = flags.DEFINE_list("labels", [], "Classes in turn, as in 3,5; or `random`, `none`, or `balanced` (default: all in turn).")
SEED = flags.DEFINE_integer("seed", 0, "Random seed. Image k depends on the seed, k and its label.")
OUT = flags.DEFINE_string("out", "samples.npz", "Output: x.npz, or a folder of shards.")
command_line.group("How to draw")
GUIDANCE_SCALE = flags.DEFINE_float("guidance_scale", None, "1 turns guidance off. Default: the config's.")
SAMPLER = flags.DEFINE_string(
    "sampler", None, f"One of {', '.join(registry.names('sampler'))}, or one of --import. Default: the config's."
)
NUM_STEPS = flags.DEFINE_integer("num_steps", None, "Sampling steps. Default: the config's.")
SAMPLER_FIELDS = flags.DEFINE_list("sampler_fields", [], "Other fields of the sampler, as in eta=0.5,spacing=stride.")
GUIDANCE_INTERVAL = flags.DEFINE_list("guidance_interval", [], "Guide only for t between two times, as in 0.2,0.7 (1 is noise).")
GUIDANCE_CHANNELS = flags.DEFINE_integer(
    "guidance_channels", None, "Number of channels to guide, from the first; 3 for DiT's own samples."
)
AUTOGUIDANCE = flags.DEFINE_string(
    "autoguidance_workdir",
    None,
    "A weaker run or .safetensors (smaller, or trained less) that guides "
    "instead of the network without labels; needs a scale above 1.",
)
command_line.group("Speed and memory")
BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", None, "Images per call of all devices, rounded up to full chunks on each device. Default: the config's."
)
DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    ["float32", "bfloat16"],
    "Dtype of the network's computation, independent of training. Default: the config's. With bfloat16 the weights take "
    "half the memory; norms, the network's output and the sampler stay float32, and the codec keeps its own dtype.",
)
FORECAST_INTERVAL = flags.DEFINE_integer(
    "forecast_interval",
    None,
    "Run the network's blocks at every N-th step and forecast them at the others; 1 is off. Default: the config's.",
)
FORECAST_ORDER = flags.DEFINE_integer("forecast_order", None, "Order of the forecast's Taylor series. Default: the config's.")
FSDP = flags.DEFINE_integer("fsdp", 1, "Number of devices over which the parameters of networks and codec are split.")
processes.define_flags()


def override(config: ml_collections.ConfigDict) -> None:
    """Sets the fields of the config that flags override."""
    if SAMPLER.value is not None and SAMPLER.value != config.sampler.name:
        config.sampler = ml_collections.ConfigDict(recipes.default_sampler(SAMPLER.value))
    if NUM_STEPS.value is not None:
        if "num_steps" not in config.sampler:
            raise UserError(
                f"--num_steps={NUM_STEPS.value}: sampler {config.sampler.name!r} chooses its own steps; leave the flag out"
            )
        config.sampler.num_steps = NUM_STEPS.value
    for text in SAMPLER_FIELDS.value:
        key, _, value = text.partition("=")
        fields = registry.parameters("sampler", config.sampler.name)
        if key not in fields:
            raise UserError(f"--sampler_fields={text}: sampler {config.sampler.name!r} has the fields {', '.join(fields)}")
        wanted = FieldType.of_annotation(fields[key].annotation)
        try:
            config.sampler[key] = wanted.parse(value)
        except ValueError:
            raise UserError(f"--sampler_fields={text}: {key} must be {wanted.describe()}") from None
    for key, flag in (("interval", FORECAST_INTERVAL), ("order", FORECAST_ORDER)):
        if flag.value is not None:
            config.forecast = {**config.get("forecast", {}), key: flag.value}
    if GUIDANCE_SCALE.value is not None:
        config.guidance.scale = GUIDANCE_SCALE.value
    if GUIDANCE_CHANNELS.value is not None:
        config.guidance.channels = GUIDANCE_CHANNELS.value
    if GUIDANCE_INTERVAL.value:
        try:
            config.guidance.low, config.guidance.high = map(float, GUIDANCE_INTERVAL.value)
        except ValueError:
            given = ",".join(GUIDANCE_INTERVAL.value)
            raise UserError(f"--guidance_interval={given}: give two times, as in 0.2,0.7") from None
    if DTYPE.value is not None:
        config.model.dtype = DTYPE.value
    if CODEC_PATH.value is not None:
        if "path" not in config.codec:
            raise UserError(f"--codec_path={CODEC_PATH.value}: codec {config.codec.name!r} has no weights; leave the flag out")
        config.codec.path, config.codec.sha256 = CODEC_PATH.value, ""


def chosen_step(workdir: Path) -> int | None:
    """The step of the checkpoint that --step selects; None for the newest."""
    if STEP.value is None:
        return None
    if STEP.value == "best":
        from dit_jax.storage.run_folder import read_best

        best = read_best(workdir)
        if best is None:
            raise UserError(f"--step=best: {workdir} has no scores; train with --config.scoring.every_steps=N, or give a step")
        return best["step"]
    if not STEP.value.isdigit():
        raise UserError(f"--step={STEP.value} must be the step of a checkpoint, or best")
    return int(STEP.value)


def load_weak(run: Any) -> tuple[Any, Any]:
    """(task, parameters) of the network of --autoguidance_workdir; (None, None) without it.

    Raises:
        UserError: guidance is off, or the network's process, codec, image size or classes differ from the run's.
    """
    if AUTOGUIDANCE.value is None:
        return None, None
    from dit_jax.build import Run
    from dit_jax.sample import trained

    if run.config.guidance.scale == 1.0:
        raise UserError("--autoguidance_workdir needs --guidance_scale above 1; at 1 guidance is off")
    path = Path(AUTOGUIDANCE.value).expanduser().absolute()
    config, _ = trained.read(path)
    if DTYPE.value is not None:
        config.model.dtype = DTYPE.value
    trained.check_guides(run, Run(config), path)
    config.codec, config.mesh = run.config.codec, run.config.mesh
    weak = Run(config)
    return weak.task, trained.load_params(weak, path)[0]


def choose_labels(num_classes: int) -> tuple[np.ndarray, str]:
    """(int32[num_samples] labels, their mode for the samples' description)."""
    from dit_jax.sample.labels import null_labels, random_labels, spread_labels

    if LABELS.value == ["none"]:
        return null_labels(NUM_SAMPLES.value, num_classes), "none"
    if LABELS.value == ["random"]:
        return random_labels(NUM_SAMPLES.value, num_classes, SEED.value), "random"
    try:
        chosen = tuple(int(text) for text in LABELS.value if LABELS.value != ["balanced"])
    except ValueError:
        raise UserError(
            f"--labels={','.join(LABELS.value)}: give class numbers separated by commas, as in 3,5, or "
            "`balanced`, `random` or `none`"
        ) from None
    return spread_labels(NUM_SAMPLES.value, num_classes, chosen), "given" if chosen else "balanced"


def main() -> dict:
    if (WORKDIR.value is None) == (WEIGHTS.value is None):
        raise UserError("give one of --workdir=<folder of a run of dit_jax.main> and --weights=<file of dit_jax.convert>")
    out = Path(OUT.value).expanduser().absolute()
    processes.join()
    from dit_jax.build import Run
    from dit_jax.sample import drawing, samples_file, trained
    from dit_jax.sample.generator import Generator, drawing_mesh, on_mesh
    from dit_jax.sample.weights import cast_for_inference, weights_fingerprint

    drawing.check_out(out)
    given = WEIGHTS.value if WEIGHTS.value is not None else WORKDIR.value
    assert given is not None  # one of them is, see above
    source = Path(given).expanduser().absolute()
    if WEIGHTS.value is not None and source.suffix != ".safetensors":
        raise UserError(
            f"--weights={WEIGHTS.value} must be a .safetensors file of dit_jax.convert; give a run's folder as --workdir"
        )
    if WEIGHTS.value is not None and STEP.value is not None:
        raise UserError(
            "--step selects a checkpoint of a --workdir; a weights file has only one set of weights, so leave --step out"
        )
    config, origin = trained.read(source)
    override(config)
    config.mesh = {"data": -1, "fsdp": FSDP.value}  # the devices of this machine, not those of training
    own_codec = WORKDIR.value is not None and CODEC_PATH.value is None
    run = Run(config).with_codec_weights(source if own_codec else None)
    labels, labels_mode = choose_labels(run.conditioner.num_classes)
    requests = run.conditioner.from_requests({"label": labels} if run.conditioner.num_classes else {})
    batch_size = min(config.evaluation.batch_size, NUM_SAMPLES.value) if BATCH_SIZE.value is None else BATCH_SIZE.value
    sampler, forecast = run.sampler, run.forecast
    guidance = run.guidance if AUTOGUIDANCE.value is None else run.guidance_by_second_network
    weak_task, weak_params = load_weak(run)
    mesh = drawing_mesh(run.mesh)
    generator = Generator(run.task, mesh, sampler, guidance, batch_size, SEED.value, weak_task, forecast=forecast)
    params, step = trained.load_params(run, source, chosen_step(source))
    console.say(
        f"sampling from {source}{'' if step is None else f' at step {step}'}: {dict(config.sampler)}, guidance {guidance.scale}"
    )
    params, constants, weak_params = on_mesh((params, run.frozen, weak_params), generator.mesh)
    made_by = samples_file.describe(run.config, params, step, SEED.value) | {"labels": labels_mode}
    made_by |= {"origin": origin} if origin else {}
    params = cast_for_inference(run.task, params)  # frees the parameters in the dtype of training
    if weak_task is not None:
        made_by |= {"autoguidance": AUTOGUIDANCE.value, "autoguidance_weights": weights_fingerprint(weak_params)}
        weak_params = cast_for_inference(weak_task, weak_params)
    drawn = drawing.draw(out, generator, params, constants, requests, len(labels), made_by, weak_params)
    # Per image. None for an adaptive sampler, and with a guidance interval, outside of which a step takes one evaluation.
    per_image = None if guidance.is_partial else sampler.evaluations(run.process)
    return {
        "out": str(out),
        "grid": str(drawn.grid),
        "num_samples": len(labels),
        "seconds": drawn.seconds,
        "evaluations": per_image and per_image * (2 if guidance.active else 1),
        "step": step,
        "stopped": drawn.stopped,
        **({"steps_with_blocks": forecast.full_steps(sampler.num_steps)} if forecast.active else {}),
    }


if __name__ == "__main__":
    console.run(main)
