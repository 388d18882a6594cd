"""Formats plans as text for a terminal and as Markdown."""

from collections.abc import Iterable
from typing import Any

from dit_jax.programs import chips
from dit_jax.programs.memory import GIB

ASSUMPTIONS = (
    f"assumed: {chips.MATMUL_EFFICIENCY:.0%} of peak in matrix products, {chips.HBM_EFFICIENCY:.0%} of HBM, "
    f"{chips.LINK_EFFICIENCY:.0%} of links; collectives overlap with everything else; launches, waiting for data, "
    "padding of matrix tiles and transfers to and from host memory are not counted"
)


def milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.1f}"


def training(plan: dict[str, Any]) -> Iterable[str]:
    """Formats the plan of a training step as lines."""
    yield (
        f"{plan['topology']}: {plan['devices']} x {plan['chip']}, mesh {_mesh(plan)}, batch {plan['batch_size']}, "
        f"microbatches {plan['microbatches']}, remat {plan['remat']}"
    )
    yield f"{'memory per device':24} {'GiB':>9}"
    for name, size in plan["memory"].items():
        yield f"  {name:22} {size / GIB:9.3f}"
    verdict = "fits" if plan["fits"] else "DOES NOT FIT"
    yield (
        f"  {'total':22} {plan['bytes_per_device'] / GIB:9.3f}  {verdict} in {plan['usable_bytes'] / GIB:.2f} of "
        f"{plan['hbm_bytes'] / GIB:.2f} GiB"
    )
    if plan["host_bytes_per_device"]:
        yield f"  {'in host memory':22} {plan['host_bytes_per_device'] / GIB:9.3f}  moved to the device and back in every step"
    if plan["refusal"]:
        yield f"the compiler: {plan['refusal']}"
    for remedy in plan["remedies"]:
        yield (
            f"  helps: {remedy['what']}: saves about {remedy['saves_bytes'] / GIB:.2f} GiB"
            f"{', probably sufficient' if remedy['enough'] else ''}"
        )
    for kind, row in plan["collectives"].items():
        for axes, size in row.items():
            yield f"  {kind:22} {size / 1e6:9.1f} MB sent per device along {axes}"
    if plan["collectives_hidden"] is not None:
        yield f"  {plan['collectives_hidden']:.0%} of these bytes overlap with matrix products, according to the schedule"
    yield (
        f"FLOPs per step {plan['flops_per_step']:.4g} of the model (3 forwards), {plan['executed_flops']:.4g} executed; "
        f"compiled in {plan['compile_seconds']:.1f} s"
    )
    if plan["unknown_loops"]:
        yield f"{plan['unknown_loops']} loops of unknown trip count are counted once: bytes and collectives are too low"
    if seconds := plan["seconds"]:
        yield (
            f"ms: compute {milliseconds(seconds['compute'])}, HBM {milliseconds(seconds['matmul_hbm'])} under products + "
            f"{milliseconds(seconds['elementwise_hbm'])} elementwise, collectives {milliseconds(seconds['collectives'])}, "
            f"of which {milliseconds(seconds['exposed'])} do not overlap with products"
        )
        yield (
            f"step {milliseconds(plan['step_seconds'])} ms ({milliseconds(seconds['without_overlap'])} without any overlap), "
            f"{plan['images_per_second']:.0f} images/s, MFU {plan['mfu']:.1%}, limit {plan['limit']}"
        )
        yield ASSUMPTIONS
    elif plan["fits"]:
        yield "no step time: the speed of simulated devices is meaningless"


def buckets(plan: dict[str, Any]) -> Iterable[str]:
    """Formats the buckets of a plan as lines; none for a plan without."""
    rows = plan.get("buckets", ())
    if not rows:
        return
    yield "the lines above are those of the bucket that takes the most memory; of all:"
    yield f"  {'bucket':14} {'batch':>7} {'tokens':>9} {'steps':>7} {'GiB':>9} {'step ms':>9} {'images/s':>9} {'compile s':>9}"
    for row in rows:
        tokens = "-" if row["tokens"] is None else f"{row['tokens']:,}"
        rate = "-" if row["images_per_second"] is None else f"{row['images_per_second']:.0f}"
        share, verdict = f"{row['weight']}/{plan['cycle']['steps']}", "" if row["fits"] else "  DOES NOT FIT"
        yield (
            f"  {row['bucket']:14} {row['batch_size']:7} {tokens:>9} {share:>7} {row['bytes_per_device'] / GIB:9.3f} "
            f"{milliseconds(row['step_seconds']):>9} {rate:>9} {row['compile_seconds']:9.1f}{verdict}"
        )
    if plan["cycle"]["step_seconds"]:
        yield (
            f"on average over a cycle: step {milliseconds(plan['cycle']['step_seconds'])} ms, "
            f"{plan['cycle']['images_per_second']:.0f} images/s"
        )


def traffic(rows: list[dict[str, Any]], chip: chips.Chip) -> Iterable[str]:
    """Formats HBM traffic as lines: each kind of kernel, then all places with at least 1 % of the bytes."""
    total = sum(row["bytes"] for row in rows)
    kinds = {row["kind"]: [other for other in rows if other["kind"] == row["kind"]] for row in rows}
    summed = [
        {"kind": kind, "place": "in all", **{key: sum(row[key] for row in some) for key in ("kernels", "bytes")}}
        for kind, some in kinds.items()
    ]
    yield f"{'HBM traffic of a step on one device':50} {'kernels':>8} {'GB':>9} {'ms':>8}"
    for row in (*summed, *(row for row in rows if row["bytes"] >= total / 100)):
        seconds = row["bytes"] / (chip.hbm_bandwidth * chips.HBM_EFFICIENCY) if chip.hbm_bandwidth else None
        yield f"  {row['kind']:11}{row['place']:37} {row['kernels']:8} {row['bytes'] / 1e9:9.3f} {milliseconds(seconds):>8}"


def sampling(plan: dict[str, Any]) -> str:
    """Formats the plan of sampling as a line."""
    rate = f", {plan['images_per_second']:.1f} images/s" if plan["images_per_second"] else ""
    evaluations = plan["evaluations"] or "as many as it needs"
    return (
        f"sampling {plan['batch_size']} images, {plan['sampler']}, {evaluations} evaluations: "
        f"{plan['bytes_per_device'] / GIB:.2f} GiB, {'fits' if plan['fits'] else 'DOES NOT FIT'}{rate}"
    )


def _mesh(plan: dict[str, Any]) -> str:
    axes = " ".join(f"{name}={size}" for name, size in plan["mesh"].items() if size > 1) or "one device"
    return axes + " zero1" * plan["zero1"]


COLUMNS = ("model", "topology", "mesh", "remat", "GiB/device", "fits", "step ms", "MFU", "limit", "compile s")


def row(name: str, plan: dict[str, Any]) -> tuple[str, ...]:
    """Formats a plan as the cells of COLUMNS."""
    mfu = "-" if plan["mfu"] is None else f"{plan['mfu']:.0%}"
    return (
        name,
        plan["topology"],
        _mesh(plan),
        str(plan["remat"]),
        f"{plan['bytes_per_device'] / GIB:.2f}",
        "yes" if plan["fits"] else "no",
        milliseconds(plan["step_seconds"]),
        mfu,
        plan["limit"] or "-",
        f"{plan['compile_seconds']:.0f}",
    )


def markdown(rows: Iterable[tuple[str, ...]]) -> Iterable[str]:
    yield f"| {' | '.join(COLUMNS)} |"
    yield f"|{'---|' * len(COLUMNS)}"
    for cells in rows:
        yield f"| {' | '.join(cells)} |"
