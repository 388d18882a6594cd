"""Samples images with the moving-average weights of a run's folder, or with a weights file.

    python -m dit_jax.sample --workdir=runs/digits --num_samples=100 --labels=3,5 --guidance_scale=1.5 --out=x.npz
    python -m dit_jax.sample --weights=dit.safetensors --codec_path=sd-vae-ft-ema --labels=207 --guidance_scale=4 --out=x.npz
    python -m dit_jax.sample --workdir=runs/digits_text --prompt="a handwritten three" --out=three.npz
    python -m dit_jax.sample --workdir=runs/digits --job=edit --given=photo.png --strength=0.6 --labels=3 --out=x.npz
    python -m dit_jax.sample --workdir=runs/video --job=animate --given=photo.png --prompt="a ship at sea" --out=ship.npz

Writes x.npz (arr_0: uint8 [N, H, W, C], labels: int32 [N], made_by: JSON; of a network with text captions: str [N]) and x.png, a
grid of the first 100. Images are first
written in shards to x.shards, which is removed when the npz is complete; --out=<folder> keeps the shards and writes no npz.
After a kill or a stop (SIGTERM, exit status 75) the same command continues; other settings are refused. Image k does not
depend on the number of devices and processes or on --batch_size: to the bit with --fsdp=1, else up to rounding.
"""

from typing import Any

from absl import flags

from dit_jax import registry
from dit_jax.errors import UserError
from dit_jax.runtime import command_line, console, processes
from dit_jax.sample.labels import CHOICES
from dit_jax.sample.prompts import Prompts, expander_of, read_prompts
from dit_jax.storage.paths import local_path

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
LORA = flags.DEFINE_string("lora", None, "Folder of an adapter in PEFT's layout, which is added to the weights.")
CODEC_PATH = flags.DEFINE_string("codec_path", None, "Weights of another VAE with the same latents. Default: the run's own.")
TEXT_ENCODERS = flags.DEFINE_list(
    "text_encoders", [], "Weights of pretrained text encoders, as in clip_l=/path,t5_xxl=/path. Default: the config's."
)
TOKENIZERS = flags.DEFINE_list("tokenizers", [], "Folders of their tokenizers, in the same form. Default: beside the weights.")
STAGES = flags.DEFINE_list(
    "stages",
    [],
    "Runs or weights files of a cascade, in place of --workdir and --weights: the first network, then its super-resolution "
    "stages. Each stage draws from the samples of the one before, which stand beside --out as x.stage1.npz. Flags count for all "
    "stages.",
)
command_line.group("What to draw")
NUM_SAMPLES = flags.DEFINE_integer(
    "num_samples", None, "Number of images. Default: 64; 8 of --job=interpolate; one for each label of --job=edit and inpaint."
)
LABELS = flags.DEFINE_list("labels", [], "Classes in turn, as in 3,5; or `random`, `none`, or `balanced` (default: all in turn).")
PROMPT = flags.DEFINE_multi_string("prompt", None, "Text to draw, of a network with text; repeat the flag for several, in turn.")
PROMPTS = flags.DEFINE_string(
    "prompts",
    None,
    'File with a prompt in each line, or .jsonl with {"prompt", "negative", "seed"} in each; the last two optional.',
)
NEGATIVE_PROMPT = flags.DEFINE_string(
    "negative_prompt", None, "Text that guidance leads away from, for all images. Default: the empty text."
)
PROMPT_EXPANDER = flags.DEFINE_string(
    "prompt_expander",
    None,
    "Makes a longer text of each prompt: module:function, of a list of texts; or command:PROGRAM, which reads and writes lines. "
    "The samples keep both texts.",
)
SEED = flags.DEFINE_integer("seed", 0, "Random seed. Image k depends on the seed, k and its label or prompt.")
JOB = flags.DEFINE_string(
    "job",
    "generate",
    "generate draws from noise; edit adds noise to --given and draws from there; inpaint draws the white part of --mask; "
    "interpolate draws between two --seeds and two --labels; upsample draws a higher resolution of --given with a "
    "super-resolution stage. Of clips: animate begins with an image, extend continues a clip, connect draws what lies between "
    "two, loop leads back to the first frame. Or one of --import.",
)
GIVEN = flags.DEFINE_string(
    "given",
    None,
    "A PNG, JPEG, animated WebP or GIF, mp4, .npy or .npz of uint8 images or clips: one for all, or one for each. Of connect: "
    "the two clips, one after the other. Of upsample: an .npz.",
)
NOISE_LEVEL = flags.DEFINE_float(
    "noise_level", None, "Of upsample and --stages: the time of the noise on the lower resolution. Default: the config's."
)
GIVEN_FRAMES = flags.DEFINE_list(
    "given_frames",
    [],
    "Frames of the drawn clip where the given ones stand, as in 0,1. Of extend: 0,1 goes forward, the last frames backward.",
)
NUM_FRAMES = flags.DEFINE_integer(
    "num_frames",
    None,
    "Frames of a clip, where not those of training. Of extend: of the result, drawn in as many windows as needed.",
)
MASK = flags.DEFINE_string("mask", None, "Of inpaint: a picture or clip of the same size, white where is to be drawn.")
STRENGTH = flags.DEFINE_float(
    "strength",
    None,
    "Of edit and inpaint: the time in (0, 1] from which on is drawn; 1 is noise, small values keep the image. Default: 0.6 of "
    "edit, 1 of inpaint.",
)
RESIZE = flags.DEFINE_bool("resize", None, "Scale --given and --mask to the network's size and crop their centre.")
SEEDS = flags.DEFINE_list("seeds", [], "Of interpolate: the seeds of the first and the last image, as in 1,2.")
CLASS_GRID = flags.DEFINE_integer(
    "class_grid",
    None,
    "Images of each class, in place of --num_samples: all classes or --labels in order; the picture has a row for each, its "
    "name at the side.",
)
ANIMATION = flags.DEFINE_string(
    "animation", None, "Also write how the first 25 images come out of noise: a .webp, .gif or .png that moves."
)
RESOLUTION = flags.DEFINE_string(
    "resolution",
    None,
    "Size of the images, 384 or 256x384 (height first), where it is not that of training: positions are interpolated; the "
    "network was not trained so.",
)
OUT = flags.DEFINE_string("out", "samples.npz", "Output: x.npz, or a folder of shards.")
command_line.group("How to draw")
GUIDANCE_SCALE = flags.DEFINE_float("guidance_scale", None, "1 turns guidance off, 0 ignores the labels. Default: the config's.")
SAMPLER = flags.DEFINE_string(
    "sampler",
    None,
    "One of ab, ddim, ddpm, dopri5, dpmpp, dpmpp_2m_sde, dpmpp_3m_sde, dpmpp_sigma, euler, heun, heun_sde, sde, unipc, or one of "
    "--import. Default: the config's.",
)
NUM_STEPS = flags.DEFINE_integer("num_steps", None, "Sampling steps. Default: the config's.")
SAMPLER_FIELDS = flags.DEFINE_list("sampler_fields", [], "Other fields of the sampler, as in eta=0.5,spacing=stride.")
GUIDANCE_INTERVAL = flags.DEFINE_list("guidance_interval", [], "Guide only for t between two times, as in 0.2,0.7 (1 is noise).")
GUIDANCE_CHANNELS = flags.DEFINE_integer(
    "guidance_channels", None, "Number of channels to guide, from the first; 3 for DiT's own samples."
)
GUIDANCE_SCHEDULE = flags.DEFINE_enum(
    "guidance_schedule",
    None,
    ["constant", "power_cosine"],
    "The scale over t; power_cosine grows from 1 at noise to --guidance_scale at data, as DiffiT and W.A.L.T have it. Default: "
    "the config's.",
)
GUIDANCE_POWER = flags.DEFINE_float("guidance_power", None, "Of power_cosine; a greater one guides less at noisy times.")
SKIP_LAYERS = flags.DEFINE_list(
    "skip_layers", [], "Skip-layer guidance: blocks, from 0, without which the network is called once more, as in 7,8,9."
)
SKIP_SCALE = flags.DEFINE_float("skip_scale", None, "Scale of skip-layer guidance. Default: the config's, 2.8.")
SKIP_INTERVAL = flags.DEFINE_list(
    "skip_interval", [], "Shares of the steps between which blocks are skipped, from noise. Default: the config's, 0.01,0.2."
)
GUIDANCE_IMAGE_SCALE = flags.DEFINE_float(
    "guidance_image_scale", None, "Of the given part of a clip, beside that of the text; 1 turns it off. Default: the config's."
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
CHUNK_SIZE = flags.DEFINE_integer(
    "chunk_size",
    None,
    "Images that a device computes at a time, a divisor of 64; it changes the last bits of an image. Default: by the network's "
    "tokens and the kind of device.",
)
FSDP = flags.DEFINE_integer("fsdp", 1, "Number of devices over which the parameters of networks and codec are split.")
processes.define_flags()


def chosen_labels() -> list[int] | str | None:
    """What --labels asks for: classes, a word, or None for all in turn."""
    if not LABELS.value or (len(LABELS.value) == 1 and LABELS.value[0] in CHOICES):
        return LABELS.value[0] if LABELS.value else None
    try:
        return [int(text) for text in LABELS.value]
    except ValueError:
        raise UserError(
            f"--labels={','.join(LABELS.value)}: give class numbers separated by commas, as in 3,5, or "
            "`balanced`, `random` or `none`"
        ) from None


def chosen_prompts() -> Prompts | None:
    """The prompts of --prompt or --prompts, expanded."""
    if PROMPT.value and PROMPTS.value:
        raise UserError(f"--prompt and --prompts={PROMPTS.value}: give one of them")
    prompts = read_prompts(PROMPTS.value) if PROMPTS.value else Prompts(tuple(PROMPT.value)) if PROMPT.value else None
    if PROMPT_EXPANDER.value:
        if prompts is None:
            raise UserError(f"--prompt_expander={PROMPT_EXPANDER.value} has no effect without --prompt or --prompts; omit it")
        prompts = prompts.expanded(expander_of(PROMPT_EXPANDER.value))
    return prompts


def fields_of_sampler() -> dict[str, str]:
    """{"eta": "0.5"} of --sampler_fields=eta=0.5; the pipeline knows the fields' types."""
    pairs = [text.partition("=") for text in SAMPLER_FIELDS.value]
    for key, equals, _ in pairs:
        if not equals:
            raise UserError(f"--sampler_fields={key}: give a value, as in --sampler_fields={key}=...")
    return {key: value for key, _, value in pairs}


def numbers(flag: Any, kind: type, form: str) -> list[Any] | None:
    """The numbers of a list flag; None if it is not given."""
    try:
        return [kind(text) for text in flag.value] or None
    except ValueError:
        raise UserError(f"--{flag.name}={','.join(flag.value)}: give {form}") from None


SOURCES = {"--workdir": {"workdir", "step", "average"}, "--weights": {"weights"}}
JOBS = {  # of each job the flags that are its fields, and --seed where it is not chosen by one of them
    "generate": {"seed"},
    "edit": {"seed", "given", "strength", "resize"},
    "inpaint": {"seed", "given", "mask", "strength", "resize"},
    "interpolate": {"seeds"},
    "upsample": {"seed", "given", "noise_level"},
    "animate": {"seed", "given", "given_frames", "resize"},
    "extend": {"seed", "given", "given_frames", "resize"},
    "connect": {"seed", "given", "given_frames", "resize"},
    "loop": {"seed", "given", "resize"},
}
FIELDS = {
    "given": GIVEN,
    "given_frames": GIVEN_FRAMES,
    "mask": MASK,
    "strength": STRENGTH,
    "resize": RESIZE,
    "seeds": SEEDS,
    "noise_level": NOISE_LEVEL,
}  # of jobs
USES = {f"{source} --job={job}": first | own for source, first in SOURCES.items() for job, own in JOBS.items()}
USES["--stages"] = {"stages", "seed", "noise_level"}


def flags_of_job() -> set[str]:
    """The flags that the job uses."""
    if JOB.value in JOBS:
        return JOBS[JOB.value]
    import dit_jax.sample.jobs  # noqa: F401 - registers the jobs of this package, for the message

    return {"seed"} | set(registry.parameters("job", JOB.value)) & FIELDS.keys()  # of user code, which has been imported


def extends() -> bool:
    """Whether --num_frames is a field of the job: the length of its result, and not of the clips that the network draws."""
    import dit_jax.sample.jobs  # noqa: F401 - registers the jobs of this package

    return "num_frames" in registry.parameters("job", JOB.value)


def job_fields() -> dict[str, Any]:
    """The fields of the job that are given as flags."""
    fields: dict[str, Any] = {name: flag.value for name, flag in FIELDS.items() if flags.FLAGS[name].present}
    if "given_frames" in fields:
        try:
            fields["given_frames"] = [int(text) for text in GIVEN_FRAMES.value]
        except ValueError:
            given = ",".join(GIVEN_FRAMES.value)
            raise UserError(f"--given_frames={given}: give numbers of frames, as in --given_frames=0,1") from None
    if flags.FLAGS["num_frames"].present and extends():
        fields["num_frames"] = NUM_FRAMES.value
    if "seeds" in fields:
        try:
            fields["seeds"] = [int(text) for text in SEEDS.value]
        except ValueError:
            raise UserError(f"--seeds={','.join(SEEDS.value)}: give two whole numbers, as in --seeds=1,2") from None
    return fields


def check_flags() -> None:
    """Raises a UserError for a flag that is missing or without effect. `Pipeline` finds the options without effect."""
    if bool(STAGES.value) + (WORKDIR.value is not None) + (WEIGHTS.value is not None) != 1:
        raise UserError(
            "give one of --workdir=<folder of a run of dit_jax.main>, --weights=<file of dit_jax.convert> and --stages"
        )
    if STAGES.value:
        command_line.check_uses(USES, "--stages")
        for name in ("step", "lora", "codec_path", "resolution", "animation", "class_grid", "autoguidance_workdir"):
            if flags.FLAGS[name].present:
                raise UserError(
                    f"--{name} is of one network, and --stages has several; draw the stages one by one with --job=upsample"
                )
        return
    source = "--workdir" if WEIGHTS.value is None else "--weights"
    mode = f"{source} --job={JOB.value}"
    command_line.check_uses(USES | {mode: SOURCES[source] | flags_of_job()}, mode)
    if JOB.value == "interpolate" and not SEEDS.value:
        raise UserError("--job=interpolate draws between two seeds: give --seeds=1,2, or the same twice to change the class only")


def drawing_options(prompts, count) -> dict[str, Any]:
    """The options of a draw that are flags, the same for one network and for every stage of a cascade."""
    return {
        "num_samples": count,
        "seed": SEED.value,
        "prompt": prompts,
        "negative_prompt": NEGATIVE_PROMPT.value,
        "sampler": SAMPLER.value,
        "num_steps": NUM_STEPS.value,
        "sampler_fields": fields_of_sampler(),
        "guidance_scale": GUIDANCE_SCALE.value,
        "guidance_channels": GUIDANCE_CHANNELS.value,
        "guidance_interval": numbers(GUIDANCE_INTERVAL, float, "two times, as in 0.2,0.7"),
        "guidance_schedule": GUIDANCE_SCHEDULE.value,
        "guidance_power": GUIDANCE_POWER.value,
        "skip_layers": numbers(SKIP_LAYERS, int, "numbers of blocks, as in 7,8,9"),
        "skip_scale": SKIP_SCALE.value,
        "skip_interval": numbers(SKIP_INTERVAL, float, "two shares of the steps, as in 0.01,0.2"),
        "guidance_image_scale": GUIDANCE_IMAGE_SCALE.value,
        "forecast_interval": FORECAST_INTERVAL.value,
        "forecast_order": FORECAST_ORDER.value,
        "batch_size": BATCH_SIZE.value,
        "chunk_size": CHUNK_SIZE.value,
    }


def main() -> dict:
    check_flags()
    labels, fields, prompts, count = chosen_labels(), job_fields(), chosen_prompts(), NUM_SAMPLES.value
    several = prompts is not None and len(prompts.texts) > 1  # one image of each
    if count is None and CLASS_GRID.value is None and not several and not flags_of_job() & {"given", "seeds"}:
        count = 64
    options = drawing_options(prompts, count)
    processes.join()
    from dit_jax.pipeline import Pipeline
    from dit_jax.sample import jobs
    from dit_jax.sample.cascade import write_stages
    from dit_jax.sample.drawing import check_out

    def load(source: str, **more: Any) -> Pipeline:
        return Pipeline(
            source,
            average=AVERAGE.value,
            dtype=DTYPE.value,
            fsdp=FSDP.value,
            text_encoders=TEXT_ENCODERS.value,
            tokenizers=TOKENIZERS.value,
            **more,
        )

    job = jobs.made(JOB.value, fields)
    check_out(local_path(OUT.value).absolute())
    if STAGES.value:
        return write_stages(load, STAGES.value, OUT.value, labels, NOISE_LEVEL.value, **options)
    source = WORKDIR.value or WEIGHTS.value
    assert source is not None  # see `check_flags`
    pipe = load(
        source,
        codec=CODEC_PATH.value,
        step=STEP.value,
        lora=LORA.value,
        resolution=RESOLUTION.value,
        num_frames=None if extends() else NUM_FRAMES.value,
    )
    return pipe.write(
        OUT.value,
        labels,
        job=job,
        class_grid=CLASS_GRID.value,
        animation=ANIMATION.value,
        autoguidance=AUTOGUIDANCE.value,
        **options,
    )


if __name__ == "__main__":
    console.run(main, continues=True, phase="sampling")
