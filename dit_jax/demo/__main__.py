"""Serves a page in the browser that draws with a trained network: classes, guidance, steps, sampler, seed, a gallery.

    python -m dit_jax.demo --workdir=runs/digits
    python -m dit_jax.demo --weights=dit.safetensors --codec_path=sd-vae-ft-ema --port=8000

Open the address that it prints. It is one of this machine alone; from elsewhere use ssh -L 7860:localhost:7860 <machine>. One
request is drawn at a time, the others wait. Nothing is written to disk. Ctrl-C or SIGTERM ends it, with exit status 0.
"""

import atexit
import os

from absl import flags

from dit_jax.errors import UserError
from dit_jax.runtime import command_line, console

command_line.group("Where the weights come from")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run of dit_jax.main.")
STEP = flags.DEFINE_string(
    "step", None, "Checkpoint: a step, or `best` for the best score during training. Default: the newest intact checkpoint."
)
WEIGHTS = flags.DEFINE_string(
    "weights",
    None,
    "A .safetensors file of dit_jax.convert, a .pt of DiT or SiT, or a folder of diffusers, instead of --workdir.",
)
AVERAGE = flags.DEFINE_string(
    "average",
    "default",
    "Weights of a run: its moving average, none for the weights themselves, or another average: 0.9995, power:0.075.",
)
CODEC_PATH = flags.DEFINE_string("codec_path", None, "Weights of another VAE with the same latents. Default: the run's own.")
TEXT_ENCODERS = flags.DEFINE_list(
    "text_encoders", [], "Weights of pretrained text encoders, as in clip_l=/path,t5_xxl=/path. Default: the config's."
)
TOKENIZERS = flags.DEFINE_list("tokenizers", [], "Folders of their tokenizers, in the same form. Default: beside the weights.")
DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Dtype of the network's computation. Default: the config's.")
command_line.group("The server")
HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen at; 0.0.0.0 for every network of this machine.")
PORT = flags.DEFINE_integer("port", 7860, "Port to listen at; 0 for any that is free.", lower_bound=0, upper_bound=65535)
HOSTS = flags.DEFINE_list(
    "hosts", [], "Names of this machine under which browsers may open the page. Addresses and localhost always may."
)
command_line.group("Limits of a request")
MAX_IMAGES = flags.DEFINE_integer("max_images", 64, "Images of a request.", lower_bound=1)
MAX_STEPS = flags.DEFINE_integer("max_steps", 1000, "Sampling steps of a request.", lower_bound=1)
MAX_QUEUED = flags.DEFINE_integer("max_queued", 16, "Requests that wait; more are refused.", lower_bound=1)

SERVER = {"dtype", "codec_path", "text_encoders", "tokenizers", "host", "port", "hosts", "max_images", "max_steps", "max_queued"}
USES = {
    "--workdir": {"workdir", "step", "average", *SERVER},
    "--weights": {"weights", *SERVER},
}


def check_flags() -> None:
    """Raises a UserError for a flag that is missing or without effect."""
    if (WORKDIR.value is None) == (WEIGHTS.value is None):
        raise UserError("give one of --workdir=<folder of a run of dit_jax.main> and --weights=<file of dit_jax.convert>")
    command_line.check_uses(USES, "--workdir" if WEIGHTS.value is None else "--weights")


def main() -> dict:
    check_flags()
    try:
        from dit_jax.demo import server
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("starlette", "uvicorn"):
            raise
        raise UserError(f"the demo needs the package {package}: pip install 'dit_jax[demo]'") from None
    from dit_jax import pipeline
    from dit_jax.demo.schema import Limits, Schema
    from dit_jax.demo.worker import Worker
    from dit_jax.storage.paths import local_path

    source = WORKDIR.value or WEIGHTS.value
    assert source is not None  # see `check_flags`
    with server.bind(HOST.value, PORT.value) as listening:
        pipe = pipeline.load(
            source,
            codec=CODEC_PATH.value,
            step=STEP.value,
            average=AVERAGE.value,
            dtype=DTYPE.value,
            text_encoders=TEXT_ENCODERS.value,
            tokenizers=TOKENIZERS.value,
        )
        name = local_path(source).absolute().name
        worker = Worker(pipe, MAX_QUEUED.value)
        app = server.app(Schema(pipe, name, Limits(MAX_IMAGES.value, MAX_STEPS.value)), worker, HOSTS.value)
        url = server.url_of(HOST.value, listening)
        worker.start()
        serving = server.Server(app, on_open=lambda: server.say_open(HOST.value, url, name))
        serving.run(sockets=[listening])
        if not worker.stop():  # Python's own end would wait for the device, or fall over a thread that is within XLA
            atexit.register(os._exit, 0)
    return {"url": url, "images": worker.drawn_images, "step": pipe.step}


if __name__ == "__main__":
    console.run(main)
