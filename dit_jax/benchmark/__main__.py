"""Measures the speed of each part of training and sampling separately, on noise where possible.

    python -m dit_jax.benchmark --what=train_step --model=XL/2 --batch_size=256 --dtype=bfloat16
    python -m dit_jax.benchmark --what=train_step --config=xl2_imagenet256 --config.mesh.fsdp=8
    python -m dit_jax.benchmark --what=sampler --model=S/2 --sampler=ddim --num_steps=50 --guidance_scale=1.5 --compare
    python -m dit_jax.benchmark --what=vae --preset=sd --resolution=256 --batch_size=16 --dtype=bfloat16
    python -m dit_jax.benchmark --what=images --data=photographs --threads=1,2,4
    python -m dit_jax.benchmark --what=clips --data=clips --frames=16 --resolution=128
    python -m dit_jax.benchmark --what=latents
    python -m dit_jax.benchmark --what=evaluation --resolution=256
    python -m dit_jax.benchmark --what=checkpoint --model=XL/2
    python -m dit_jax.benchmark --what=startup --config=digits
    python -m dit_jax.benchmark --what=overhead --model=S/2
    python -m dit_jax.benchmark --what=scaling --model=XL/2 --batch_size=256 --axis=fsdp

train_step, forward, sampler, scaling and vae need only jax, flax and optax, unless --config is given; with it, neither the data
set nor the codec's weights are read. Everything is measured after warm-up, for at least --seconds. MFU is the ratio of the
model's FLOPs to the device's dense bfloat16 peak, for any dtype; it is null if the peak is unknown, as for a CPU. scaling
measures the training step on 1, 2, 4 .. devices of this machine with the same batch size per device; a CPU simulates 8.
"""

import os

import jax
from absl import flags

from dit_jax import config_file
from dit_jax.data.size import parse_size
from dit_jax.errors import UserError
from dit_jax.runtime import command_line, console
from dit_jax.runtime.field_values import whole_number

command_line.group("What to measure")
WHAT = flags.DEFINE_enum(
    "what",
    None,
    [
        "train_step",
        "forward",
        "sampler",
        "vae",
        "images",
        "clips",
        "latents",
        "checkpoint",
        "startup",
        "evaluation",
        "scaling",
        "overhead",
    ],
    "What to measure.",
)
CONFIG = config_file.define_flags("Config of a run, as for dit_jax.main, instead of --model.")
MODEL = flags.DEFINE_string(
    "model",
    "S/2",
    "A model of the paper, trained on cached latents: S, B, L or XL, then /2, /4 or /8, as in XL/2; or another published "
    "network, as in ADM@256 (`python -m dit_jax.plan --models` lists them).",
)
BATCH_SIZE = flags.DEFINE_integer(
    "batch_size",
    None,
    "Images per call over all devices. Default: 256 for latents, 32 for images, 4 for clips, 8 for vae, that of dit_jax.evaluate "
    "for evaluation; otherwise 256, or 8 on a CPU.",
)
RESOLUTION = flags.DEFINE_string(
    "resolution", "256", "Size of the images in pixels: one number for squares, or height x width, as in 256x384."
)
DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16"], "Dtype of the network's computation. Default: bfloat16, or float32 on a CPU."
)
command_line.group("How to measure")
SECONDS = flags.DEFINE_float("seconds", 10.0, "Seconds to measure after warm-up. At least 3 calls are measured.", lower_bound=0.0)
COMPARE = flags.DEFINE_bool(
    "compare", False, "Also measure PyTorch (diffusers' DiT), alternating with ours. The ratio is our time divided by PyTorch's."
)
PEERS = flags.DEFINE_list("peers", ["eager", "compiled"], "Comma-separated modes of PyTorch for --compare: eager, compiled.")
TABLE = flags.DEFINE_bool("table", False, "Also print the result as a table on stderr.")
command_line.group("The network")
REMAT = flags.DEFINE_enum(
    "remat",
    "auto",
    ["auto", "none", "full", "dots", "elementwise", "offload"],
    "model.remat of --model: what the backward pass recomputes.",
)
ATTENTION = flags.DEFINE_enum(
    "attention", "auto", ["auto", "xla", "cudnn"], "model.attention of --model: the implementation of attention."
)
UNROLL = flags.DEFINE_bool(
    "unroll", None, "model.unroll of --model: one copy of the block per layer instead of a loop over layers."
)
FSDP = flags.DEFINE_integer("fsdp", 1, "mesh.fsdp of --model. mesh.data takes the remaining devices.")
TENSOR = flags.DEFINE_integer("tensor", 1, "mesh.tensor of --model.")
AXIS = flags.DEFINE_enum(
    "axis",
    "data",
    ["data", "fsdp"],
    "Mesh axis that grows with --what=scaling. The batch size grows with it, from --batch_size at the fewest devices.",
)
command_line.group("Sampling")
SAMPLER = flags.DEFINE_string("sampler", "ddpm", "Sampler of --model, one of those of dit_jax.sample.")
NUM_STEPS = flags.DEFINE_integer("num_steps", 250, "Number of sampling steps of --model.")
GUIDANCE_SCALE = flags.DEFINE_float("guidance_scale", 1.0, "Scale of classifier-free guidance of --model. 1 turns it off.")
command_line.group("The autoencoder")
PRESET = flags.DEFINE_string("preset", "sd", "Size of the autoencoder: sd, sd3 or small.")
CODEC = flags.DEFINE_string(
    "codec",
    None,
    "Folder of a diffusers AutoencoderKL, or workdir of a run, that gives the size of the autoencoder instead of --preset.",
)
command_line.group("Data and files")
DATA = flags.DEFINE_string(
    "data",
    None,
    "Folder: of images, of clips, of a latent cache, or to save checkpoints in, depending on --what. Default: made-up data in a"
    " temporary folder.",
)
FRAMES = flags.DEFINE_integer("frames", 16, "Frames of a clip in a batch.", lower_bound=1)
RECORDS = flags.DEFINE_integer(
    "records",
    None,
    "Number of records of the made-up latent cache (default 8192), or of images of the evaluation (default 8 batches).",
)
THREADS = flags.DEFINE_list(
    "threads", None, "Comma-separated numbers of threads that read images. Default: 1, 2, 4, ... up to twice the number of cores."
)

SIMULATED_DEVICES = 8  # of scaling on a CPU, where JAX_NUM_CPU_DEVICES does not say
NETWORK = (
    "config",
    command_line.CONFIG_FIELD,
    "model",
    "resolution",
    "batch_size",
    "dtype",
    "remat",
    "attention",
    "unroll",
    "fsdp",
    "tensor",
)
USES = {
    "train_step": (*NETWORK, "seconds", "compare", "peers"),
    "forward": (*NETWORK, "seconds", "compare", "peers"),
    "sampler": (*NETWORK, "sampler", "num_steps", "guidance_scale", "seconds", "compare", "peers"),
    "vae": ("preset", "codec", "resolution", "batch_size", "dtype", "seconds"),
    "images": ("data", "resolution", "batch_size", "threads", "seconds"),
    "clips": ("data", "frames", "resolution", "batch_size", "threads", "seconds"),
    "latents": ("data", "records", "resolution", "batch_size", "seconds"),
    "checkpoint": (*NETWORK, "data"),
    "startup": NETWORK,
    "scaling": (*NETWORK, "axis", "seconds"),
    "evaluation": ("resolution", "batch_size", "records"),
    "overhead": (*NETWORK, "seconds"),
}


def check_flags():
    """Raises UserError for a flag without effect."""
    if WHAT.value is None:
        raise UserError(f"choose what to measure: --what={'|'.join(USES)}")
    command_line.check_uses({f"--what={what}": uses for what, uses in USES.items()}, f"--what={WHAT.value}")
    given = [name for uses in USES.values() for name in uses if flags.FLAGS[name].present]
    pairs = [("config", name) for name in (*NETWORK[2:], "sampler", "num_steps", "guidance_scale")] if CONFIG.given else []
    pairs += [("codec", "preset"), ("data", "records"), *([("data", "resolution")] if WHAT.value == "latents" else [])]
    for one, other in pairs:
        if one in given and other in given:
            hint = "; override a field of the config, for example --config.batch_size=64" if one == "config" else ""
            raise UserError(f"--{one} and --{other} are both given: omit one{hint}")
    if AXIS.value == "fsdp" and "axis" in given and "fsdp" in given:
        raise UserError("--axis=fsdp and --fsdp are both given: the growing axis has no fixed size; omit one")
    if "peers" in given and not COMPARE.value:
        raise UserError("--peers has no effect without --compare")


def on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def dtype() -> str:
    return DTYPE.value or ("float32" if on_cpu() else "bfloat16")


def subject(devices=None, batches: int = 1, fsdp: int | None = None):
    """The subject of --config or --model, on these devices or all.

    batches: factor of the batch size.  fsdp: replaces --fsdp.
    """
    from dit_jax.benchmark import subject

    if CONFIG.given:
        return subject.of_config(CONFIG.read(), devices)
    if "@" in MODEL.value:
        return published_subject(devices, batches * batch_size(8 if on_cpu() else 256), fsdp)
    return subject.of_model(
        MODEL.value,
        image_size(),
        batches * batch_size(8 if on_cpu() else 256),
        dtype(),
        REMAT.value,
        ATTENTION.value,
        UNROLL.value,
        fsdp or FSDP.value,
        TENSOR.value,
        SAMPLER.value,
        NUM_STEPS.value,
        GUIDANCE_SCALE.value,
        devices,
    )


def published_subject(devices, rows: int, fsdp: int | None):
    """The subject of --model=ADM@256; flags of fields that its network lacks are refused if they are given."""
    from dit_jax.benchmark import subject

    if flags.FLAGS["resolution"].present:
        raise UserError(f"--resolution and --model={MODEL.value} are both given: the name has the resolution; omit --resolution")
    fields = {name: flags.FLAGS[name].value for name in ("remat", "attention", "unroll") if flags.FLAGS[name].present}
    settings = fsdp or FSDP.value, TENSOR.value, SAMPLER.value, NUM_STEPS.value, GUIDANCE_SCALE.value
    return subject.of_published(MODEL.value, rows, dtype(), fields, *settings, devices)


def measure_scaling() -> dict:
    """Measures the training step of --config or --model on increasing numbers of devices, along --axis.

    Raises:
        UserError: the config sets the growing axis.
    """
    from dit_jax.benchmark import scaling
    from dit_jax.benchmark import subject as subjects

    if not CONFIG.given:
        group = TENSOR.value * (1 if AXIS.value == "fsdp" else FSDP.value)
        return scaling.run(
            lambda ways, devices: subject(devices, ways, ways if AXIS.value == "fsdp" else None), group, SECONDS.value
        )
    config = CONFIG.read()
    if config.mesh[AXIS.value] not in (1, -1):
        raise UserError(
            f"mesh.{AXIS.value} is {config.mesh[AXIS.value]}, but --axis={AXIS.value} lets it grow from 1; omit it, "
            "or let another axis grow"
        )
    return scaling.run(
        lambda ways, devices: subjects.of_config(scaling.grown(config, AXIS.value, ways), devices),
        scaling.group(config, AXIS.value),
        SECONDS.value,
    )


def image_size() -> tuple[int, int]:
    return parse_size(RESOLUTION.value)


def batch_size(otherwise: int) -> int:
    return otherwise if BATCH_SIZE.value is None else BATCH_SIZE.value


def threads(cores: int) -> list[int]:
    """The numbers of threads to measure. Raises UserError if --threads are not positive integers."""
    if THREADS.value is None:
        return [2**i for i in range((2 * cores).bit_length()) if 2**i <= 2 * cores]
    try:
        counts = [whole_number(text) for text in THREADS.value]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise UserError(f"--threads={','.join(THREADS.value)} must be integers of at least 1, for example 1,2,4")
    return counts


def measure_network() -> dict:
    """Measures train_step, forward or sampler, optionally in comparison with PyTorch."""
    from dit_jax.benchmark import network, peer, timing

    if unknown := [kind for kind in PEERS.value if kind not in peer.KINDS] or (not PEERS.value and ["nothing"]):
        raise UserError(f"--peers names {', '.join(unknown)}; choose from {', '.join(peer.KINDS)}")
    assert WHAT.value is not None  # see `check_flags`
    it = subject()
    console.say(f"{WHAT.value}: {it.describe()}")
    peers = peer.works(WHAT.value, it, PEERS.value) if COMPARE.value else {}
    work = getattr(network, WHAT.value)(it)
    if not peers:
        return {**it.describe(), **network.run(it, work, SECONDS.value, queue=WHAT.value != "sampler")}
    compared = timing.compare(work, peers, SECONDS.value, network.WARM_UP_STEPS)
    return {**it.describe(), **compared, **work.facts, **network.efficiency(it, work, compared["images_per_second"])}


def measure_start() -> dict:
    from dit_jax.benchmark import startup

    if CONFIG.given:
        return startup.run(CONFIG.file.value, CONFIG.fields.value, [])
    names = [name for name in NETWORK[2:] if flags.FLAGS[name].present]
    return startup.run(None, [], [f"--{name}={flags.FLAGS[name].value}" for name in names])


def measure() -> dict:
    if WHAT.value in ("train_step", "forward", "sampler"):
        return measure_network()
    if WHAT.value == "startup":
        return measure_start()
    if WHAT.value == "scaling":
        return measure_scaling()
    if WHAT.value == "vae":
        from dit_jax.benchmark import vae

        codec = vae.of_folder(CODEC.value, dtype()) if CODEC.value else vae.of_preset(PRESET.value, dtype())
        return vae.run(codec, image_size(), batch_size(8), SECONDS.value)
    if WHAT.value == "images":
        from dit_jax.benchmark import images, machine

        return images.run(DATA.value, image_size(), batch_size(32), SECONDS.value, threads(machine.cores()))
    if WHAT.value == "clips":
        from dit_jax.benchmark import clip_loading, machine

        size, cores = image_size(), machine.cores()
        return clip_loading.run(DATA.value, FRAMES.value, size, batch_size(4), SECONDS.value, threads(cores))
    if WHAT.value == "latents":
        from dit_jax.benchmark import latents

        return latents.run(DATA.value, image_size(), RECORDS.value or 8192, batch_size(256), SECONDS.value)
    if WHAT.value == "evaluation":
        from dit_jax.benchmark import features

        return features.run(image_size(), BATCH_SIZE.value, RECORDS.value)
    it = subject()
    if WHAT.value == "overhead":
        from dit_jax.benchmark import overhead

        return {**it.describe(), **overhead.run(it, SECONDS.value)}
    from dit_jax.benchmark import saving

    return {**it.describe(), **saving.run(it, DATA.value)}


def rows(result: dict, prefix: str = "") -> list[tuple[str, str]]:
    """Flattens a nested result into rows ("encode.gmacs", "136.4"), ..."""
    flat = []
    for name, value in result.items():
        if isinstance(value, dict):
            flat += rows(value, f"{prefix}{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            flat += [row for i, item in enumerate(value) for row in rows(item, f"{prefix}{name}[{i}].")]
        else:
            flat.append((prefix + name, f"{value:,.6g}" if isinstance(value, float) else str(value)))
    return flat


def main() -> dict:
    check_flags()
    if WHAT.value == "startup":  # leaves the devices to the timed process
        jax.config.update("jax_platforms", "cpu")
    simulated = jax.config.jax_num_cpu_devices  # type: ignore[attr-defined]  # JAX adds it when it is imported
    if WHAT.value == "scaling" and simulated == -1:
        jax.config.update("jax_num_cpu_devices", SIMULATED_DEVICES)
    if COMPARE.value:  # leaves GPU memory to PyTorch
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from dit_jax.benchmark import machine

    described = machine.describe()
    if (
        described["load"] is not None
        and described["load"] > 0.5 * described["cores"]
        and (on_cpu() or WHAT.value in ("images", "clips"))
    ):
        console.say(
            f"warning: the load is {described['load']:.1f} on {described['cores']} cores: other processes are running and "
            "distort the measurement"
        )
    if WHAT.value == "startup":
        described |= {"device": None, "platform": None, "num_devices": None}
    result = {"what": WHAT.value, **measure(), **described}
    if TABLE.value:
        width = max(len(name) for name, _ in rows(result))
        for name, text in rows(result):
            console.say(f"{name:{width}}  {text}")
    return result


if __name__ == "__main__":
    console.run(main)
