"""Plans one config on one topology: memory, estimated step time and bottleneck."""

import time
from dataclasses import dataclass
from typing import Any

import jax

from dit_jax.build import Run
from dit_jax.errors import UserError
from dit_jax.plan import lowering
from dit_jax.plan.remedies import remedies
from dit_jax.programs import collectives, hlo, jaxpr_flops, memory, overlap, roofline
from dit_jax.programs.topology import GPUS, Topology
from dit_jax.programs.traffic import Traffic, by_place, hbm_traffic


@dataclass(frozen=True)
class Compiled:
    """The compiler's result for one program.

    Fields:
        memory: bytes per device by kind, see `memory.of_program`; if the compiler refused the program, its stated requirement.
        refusal: the compiler's reason for refusing the program, or None.
        executed_flops: of all devices, including rematerialisation and frozen networks.
        traffic_by_place: see `traffic.by_place`.
        hidden_share: see `overlap.hidden_share`.
        unknown_loops: number of loops with an unknown trip count, which count as one iteration.
    """

    memory: dict[str, int]
    refusal: str | None
    executed_flops: int
    traffic: Traffic | None
    traffic_by_place: list[dict[str, Any]]
    collectives: list[collectives.Collective]
    hidden_share: float | None
    unknown_loops: int
    seconds: float


def platform_of(topology: Topology) -> str:
    """ "cpu", "gpu" or "tpu": what the topology's chips are to JAX."""
    return "gpu" if topology.name.partition(":")[0] in GPUS else topology.devices[0].platform


def run_on(config, topology: Topology) -> Run:
    """The objects of a config on the topology's devices, with the network's choices for that platform.

    Raises:
        UserError: the axes do not multiply to the devices, or cannot be laid on the slice.
    """
    run = Run(config, devices=topology.devices, platform=platform_of(topology))
    try:
        run.mesh
    except NotImplementedError:
        axes = " x ".join(f"{name}={size}" for name, size in config.mesh.items())
        raise UserError(
            f"the mesh {axes} cannot be laid on {topology.name}: on a torus each axis must be a product of whole "
            "sides; choose axes that are"
        ) from None
    return run


def compile_program(traced, arguments: dict[str, Any], mesh) -> Compiled:
    """Compiles a program and analyses the result; a program that is too large for the chip is not an error.

    Raises:
        UserError: the compiler refuses for another reason.
    """
    flops, start = jaxpr_flops.count(traced.jaxpr), time.monotonic()
    try:
        with jax.set_mesh(mesh):
            compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        request = memory.asked_for(str(error))
        if request is None:
            raise UserError(f"the compiler refuses this program: {str(error).splitlines()[0]}") from error
        what, wanted, _ = request
        given = memory.bytes_per_device(arguments)
        total = wanted + given if "temporaries" in what else wanted
        sizes = {
            "arguments": given,
            "outputs": 0,
            "aliased": 0,
            "temporaries": total - given,
            "code": 0,
            "host": memory.bytes_per_device(arguments, in_host=True),
            "total": total,
        }
        return Compiled(sizes, str(error).splitlines()[0], flops, None, [], [], None, 0, time.monotonic() - start)
    seconds = time.monotonic() - start
    program = hlo.parse(compiled.as_text())
    sizes = memory.of_program(compiled, memory.bytes_per_device(arguments, in_host=True))
    collective_ops = collectives.find(program, mesh.devices.size)
    return Compiled(
        sizes,
        None,
        flops,
        hbm_traffic(program),
        by_place(program),
        collective_ops,
        overlap.hidden_share(program, collective_ops),
        len(program.unknown_loops()),
        seconds,
    )


def state_memory(arguments: dict[str, Any]) -> dict[str, int]:
    """Bytes of one device by purpose, from shapes and shardings, without arrays in host memory."""
    state = arguments["state"]
    parts = {
        "parameters": state.params,
        "moving_average": (state.ema_params, dict(state.averages)),
        "optimizer": (state.opt_state, state.step),
        "frozen": arguments["constants"],
        "batch": (arguments["batch"], arguments["sums"]),
    }
    return {name: memory.bytes_per_device(part) for name, part in parts.items()}


def plan_training(config, topology: Topology, resident_rows: int = 0, traffic: bool = False) -> dict[str, Any]:
    """Compiles the training step and analyses it; the keys are those of the JSON of `python -m dit_jax.plan`.

    With buckets it is the plan of the bucket that takes the most memory, and "buckets" and "cycle" say more, see `of_buckets`.

    traffic: adds the key "traffic".

    Raises:
        UserError: the config, the mesh and the topology do not fit together.
    """
    run = run_on(config, topology)
    run.check_batch()
    if len(run.buckets):
        return of_buckets(run, [_plan_training(part, topology, resident_rows, traffic) for part in run.parts])
    return _plan_training(run, topology, resident_rows, traffic)


BUCKET_KEYS = ("fits", "bytes_per_device", "step_seconds", "images_per_second", "flops_per_step", "compile_seconds")


def of_buckets(run: Run, plans: list[dict[str, Any]]) -> dict[str, Any]:
    """The plan of the bucket that takes the most memory; it fits if all do. Adds two keys:

    "buckets": of each "bucket", "batch_size", "weight", "tokens" of a batch (None for a task without tokens) and BUCKET_KEYS.
    "cycle": "steps" of a cycle, and over them the means "step_seconds" and "images_per_second" (None where they are unknown).

    The programs of all buckets are in memory at once: the code of the others is added to the bytes of each.
    """
    rows: list[dict[str, Any]] = []
    code = sum(plan["memory"]["code"] for plan in plans)
    for bucket, part, plan in zip(run.buckets.all, run.parts, plans, strict=True):
        others = code - plan["memory"]["code"]
        plan["memory"] |= {"code_of_other_buckets": others}
        plan["bytes_per_device"] += others
        plan["fits"] = plan["refusal"] is None and plan["bytes_per_device"] <= plan["usable_bytes"]
        task: Any = part.task
        tokens = task.network.num_tokens(task.latent_shape) * bucket.batch_size if task.draws_samples else None
        facts = {"bucket": str(bucket), "batch_size": bucket.batch_size, "weight": bucket.weight, "tokens": tokens}
        rows.append(facts | {name: plan[name] for name in BUCKET_KEYS})
    steps, seconds = run.buckets.num_steps, [row["step_seconds"] for row in rows]
    total = None if None in seconds else sum(row["weight"] * row["step_seconds"] for row in rows)
    images = sum(row["weight"] * row["batch_size"] for row in rows)
    cycle = {"steps": steps, "step_seconds": total and total / steps, "images_per_second": total and images / total}
    largest = max(plans, key=lambda plan: plan["bytes_per_device"])
    return largest | {"fits": all(row["fits"] for row in rows), "buckets": rows, "cycle": cycle}


def _plan_training(run: Run, topology: Topology, resident_rows: int, traffic: bool) -> dict[str, Any]:
    """The plan of a run whose batches have one shape."""
    config, task, mesh = run.config, run.task, run.mesh
    traced, arguments = lowering.train_step(run, resident_rows)
    compiled = compile_program(traced, arguments, mesh)
    by_kind = state_memory(arguments)
    padding = max(0, compiled.memory["arguments"] - sum(by_kind.values()))
    flops = 6 * task.macs() * config.batch_size  # three forwards, 2 per multiply-add; no rematerialisation, no frozen network
    report = _report(topology, mesh, compiled) | {
        "flops_per_step": flops,
        "memory": by_kind | {"padding": padding} | {k: compiled.memory[k] for k in ("outputs", "aliased", "temporaries", "code")},
        "batch_size": config.batch_size,
        "microbatches": config.microbatches,
        "zero1": task.zero1,
        "offload": task.offload,
        "remat": task.remat,
    }
    if traffic:
        report["traffic"] = compiled.traffic_by_place
    step, peak = report["step_seconds"], topology.chip.peak_flops
    report["mfu"] = flops / (step * mesh.devices.size * peak) if step else None
    report["images_per_second"] = config.batch_size / step if step else None
    over = compiled.memory["total"] - topology.chip.usable_bytes
    report["remedies"] = [] if report["fits"] else remedies(run, compiled.memory["temporaries"], by_kind, over)
    return report


def check_sampling(run: Run) -> None:
    """Raises UserError if `plan_sampling` would refuse the config; call before compiling the training step."""
    if run.task.draws_samples:
        run.sampler, run.guidance
        if run.config.evaluation.batch_size < 1:
            raise UserError(f"evaluation.batch_size is {run.config.evaluation.batch_size}; it must be at least 1")


def plan_sampling(config, topology: Topology) -> dict[str, Any] | None:
    """Compiles the sampling of one batch and analyses it; None for a config without sampling.

    The seconds are None if the sampler chooses its own number of steps.
    """
    run = run_on(config, topology)
    if not run.task.draws_samples:
        return None
    mesh = run.mesh
    traced, arguments, batch_size, evaluations = lowering.sampling(run)
    compiled = compile_program(traced, arguments, mesh)
    report = _report(topology, mesh, compiled)
    seconds = report["step_seconds"] if evaluations is not None else None
    kept = ("fits", "bytes_per_device", "executed_flops", "collective_bytes", "limit", "refusal", "compile_seconds")
    return {k: report[k] for k in kept} | {
        "sampler": config.sampler.name,
        "evaluations": evaluations,
        "batch_size": batch_size,
        "batch_seconds": seconds,
        "images_per_second": batch_size / seconds if seconds else None,
    }


def _report(topology: Topology, mesh, compiled: Compiled) -> dict[str, Any]:
    fits = compiled.refusal is None and compiled.memory["total"] <= topology.chip.usable_bytes
    times = (
        roofline.estimate(topology, mesh, compiled.executed_flops, compiled.traffic, compiled.collectives, compiled.hidden_share)
        if fits and compiled.traffic is not None
        else None
    )
    table = collectives.by_kind_and_axis(compiled.collectives, dict(mesh.shape))
    return {
        "topology": topology.name,
        "chip": topology.chip.name,
        "devices": mesh.devices.size,
        "mesh": dict(mesh.shape),
        "fits": fits,
        "bytes_per_device": compiled.memory["total"],
        "host_bytes_per_device": compiled.memory["host"],
        "hbm_bytes": topology.chip.hbm_bytes,
        "usable_bytes": topology.chip.usable_bytes,
        "executed_flops": compiled.executed_flops,
        "hbm_traffic_bytes": sum(compiled.traffic) if compiled.traffic else None,
        "collective_bytes": sum(sum(row.values()) for row in table.values()) if compiled.traffic else None,
        "collectives": table,
        "collectives_hidden": compiled.hidden_share,
        "step_seconds": times.step if times else None,
        "seconds": times.as_dict() if times else None,
        "limit": (times.limit if times else None) if fits else "hbm capacity",
        "unknown_loops": compiled.unknown_loops,
        "refusal": compiled.refusal,
        "compile_seconds": compiled.seconds,
    }
