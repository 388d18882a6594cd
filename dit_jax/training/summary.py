"""The summaries of a run for people: one is printed before it starts, one at its end."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from dit_jax.build import Run
from dit_jax.parallel import rules
from dit_jax.runtime import versions
from dit_jax.storage import branch_record
from dit_jax.tasks.task import warning_of_average

MOST_NAMES = 10  # of classes in the summary


def text(run: Run, workdir: Path) -> str:
    """The lines of the summary: model, data shapes, devices, steps, warnings, versions."""
    task, mesh = run.task, run.mesh
    device = mesh.devices.flat[0]
    state = jax.eval_shape(task.init, jax.random.key(0))
    split = state.replace(params={}) if task.zero1 else state
    axes = " ".join(f"{name}={size}" for name, size in mesh.shape.items())
    return "\n".join(
        (
            f"run        {workdir}",
            *task.description(),
            *_of_the_classes(run),
            f"devices    {mesh.devices.size} x {device.device_kind} ({device.platform}) "
            f"on {jax.process_count()} hosts, mesh {axes}",
            *(f"branch     of {text}" for text in _of_the_branch(workdir)),
            f"training   to step {run.config.num_steps}, batch {run.config.batch_size}",
            *_of_the_buckets(run),
            *(
                f"warning    {text}"
                for text in (
                    *rules.warnings(split, mesh, task.rules),
                    *_of_the_rate(run),
                    *_of_the_average(run),
                    *_of_the_guidance(run),
                )
            ),
            f"versions   {versions.one_line()}",
        )
    )


def _of_the_branch(workdir: Path) -> list[str]:
    record = branch_record.read(workdir)
    return [] if record is None else ["; ".join(branch_record.lines(record))]


def _of_the_buckets(run: Run) -> list[str]:
    """The shapes of batches, with their shares of the steps."""
    steps, lines = run.buckets.num_steps, []
    for bucket, part in zip(run.buckets.all, run.parts if len(run.buckets) else (), strict=True):
        task: Any = part.task
        tokens = task.network.num_tokens(task.latent_shape) * bucket.batch_size if task.draws_samples else 0
        facts = f"batch {bucket.batch_size}" + f", {tokens:,} tokens" * bool(tokens)
        lines.append(f"bucket     {bucket}: {facts}, {bucket.weight / steps:.0%} of the steps")
    return lines


def _of_the_rate(run: Run) -> list[str]:
    rate, last = getattr(run.optimizer, "rate", None), run.config.num_steps - 1
    if rate is None or last < 1 or rate(last) <= rate(last - 1):
        return []
    return [f"the learning rate still rises at the last step, to {rate(last):.2g}; lower optimizer.warmup_steps or train longer"]


def _of_the_classes(run: Run) -> list[str]:
    """The numbers of the classes."""
    names = run.source.class_names
    if not names or not run.task.draws_samples or not run.conditioner.num_classes:
        return []
    if list(names) == [str(label) for label in range(len(names))]:
        return [f"labels     0 to {len(names) - 1}"]
    shown = [f"{label} {name!r}" for label, name in enumerate(names)]
    return [f"labels     {', '.join(shown if len(shown) <= MOST_NAMES else [*shown[: MOST_NAMES - 1], '...', shown[-1]])}"]


def _of_the_guidance(run: Run) -> list[str]:
    guidance = run.config.get("guidance", {})
    return ["guidance.scale is 0: the labels count for nothing in samples"] if guidance.get("scale") == 0 else []


def _of_the_average(run: Run) -> list[str]:
    """The warning about the moving average at the end of the run, if there is one."""
    remedy = "set ema_warmup, lower ema_decay or train longer" + ", or sample with --average=none" * run.task.draws_samples
    text = warning_of_average(run.task.average, run.config.num_steps, remedy)
    return [] if text is None else [text]


def ending(run: Run, workdir: Path, result: Mapping[str, Any], report: Path | None) -> str:
    """The lines at the end of a run: its score, one of each average, its pictures, its report, and the next two commands.

    Args:
        result: the entries of result.json.
        report: the page of the run; None if it could not be written.
    """
    lines: list[tuple[str, str]] = [("average", _of_an_average(average)) for average in result.get("averages", ())]
    if result.get("samples"):
        lines.append(("pictures", _near(Path(result["samples"]).with_suffix(".png"))))
    if report is not None:
        lines.append(("report", _near(report)))
    commands = next_commands(run, _near(workdir))
    lines += zip(("next", ""), commands, strict=False)
    return "\n".join(f"{name:10} {text}" for name, text in [("result", score(result)), *lines])


def _of_an_average(progress: Mapping[str, Any]) -> str:
    """How far an average has come, see `averages.progress`."""
    initial, age = progress["initial_weights"], progress["mean_age_steps"]
    return f"{progress['name']}: {initial:.1%} initial weights, the others {age:,.0f} steps old on average"


def _near(path: Path) -> str:
    """The path from the current folder, if it lies there."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def score(result: Mapping[str, Any]) -> str:
    """The loss and the scores of a run, in one line."""
    facts = [f"step {result['step']}"]
    if result.get("loss") is not None:
        facts.append(f"loss {result['loss']:.4g}")
    if "validation_loss" in result:
        count = result["validation"]["num_images"]
        facts.append(f"validation loss {result['validation_loss']:.4g} of {count:,} held-out examples")
    if "psnr" in result:
        facts.append(f"PSNR {result['psnr']:.2f} dB, SSIM {result['ssim']:.3f}")
    if "fid" in result:
        text = f"Frechet distance {result['fid']:.3f} in {result['features']}"
        if "fid_interval" in result:
            low, high = result["fid_interval"]
            text += f" ({result['fid_interval_level']:.0%} interval {low:.3f} to {high:.3f})"
        facts.append(f"{text}, {result['num_samples']:,} samples")
    if share := result.get("initial_weights_in_average"):
        facts.append(f"{share:.0%} of the moving average are initial weights: lower ema_decay, or sample with --average=none")
    return "; ".join(facts)


def next_commands(run: Run, workdir: str) -> list[str]:
    """At most two commands that use the finished run."""
    config = run.config
    imports = [f"--import={entry['name']}" for entry in config.get("imports", ())]

    def command(verb: str, *flags: str) -> str:
        return shlex.join(["python", "-m", f"dit_jax.{verb}", *imports, *flags])

    if not run.task.draws_samples:
        data = {
            "digits": "digits",
            "folder": config.data.get("path"),
            "tfds": f"tfds:{config.data.get('dataset')}:{config.data.get('path')}",
            "tars": f"tars:{config.data.get('path')}",
        }.get(config.data.name)
        size = "x".join(map(str, run.image_shape[:2]))
        out = f"{workdir}/latents"
        encode = command("encode", f"--data={data}", f"--codec={workdir}", f"--resolution={size}", f"--out={out}")
        return [encode] if data else []
    guided = run.conditioner.num_classes and run.task.has_null_condition
    count = config.evaluation.num_images or 100
    out = f"{workdir}/guided.npz" if guided else f"{workdir}/more.npz"
    seed = f"--seed={config.seed + 1}"
    asked = [f"--prompt={prompt}" for prompt in run.prompts[:1]] + ["--guidance_scale=1.5"] * bool(guided)
    commands = [command("sample", f"--workdir={workdir}", f"--num_samples={count}", seed, *asked, f"--out={out}")]
    if reference := config.evaluation.reference:
        weights = [f"--weights={config.evaluation.weights}"] * bool(config.evaluation.weights)
        features = f"--features={config.evaluation.features}"
        commands.append(command("evaluate", f"--samples={out}", f"--reference={reference}", features, *weights))
    return commands
