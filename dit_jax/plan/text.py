"""Plans as text: for a terminal, and as Markdown."""

from collections.abc import Iterable
from typing import Any

from dit_jax.programs import chips
from dit_jax.programs.memory import GIB

ASSUMPTIONS = (
    f"assumed: {chips.MATMUL_EFFICIENCY:.0%} of peak in matrix products, {chips.HBM_EFFICIENCY:.0%} of HBM, "
    f"{chips.LINK_EFFICIENCY:.0%} of links; collectives overlap with all else; launches, waiting for data and "
    "padding of matrix tiles are not counted, nor is moving to and from host memory"
)


def milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.1f}"


def training(found: dict[str, Any]) -> Iterable[str]:
    """Lines about one training step."""
    yield (
        f"{found['topology']}: {found['devices']} x {found['chip']}, mesh {_mesh(found)}, batch {found['batch_size']}, "
        f"microbatches {found['microbatches']}, remat {found['remat']}"
    )
    yield f"{'memory per device':24} {'GiB':>9}"
    for name, size in found["memory"].items():
        yield f"  {name:22} {size / GIB:9.3f}"
    verdict = "fits" if found["fits"] else "DOES NOT FIT"
    yield (
        f"  {'total':22} {found['bytes_per_device'] / GIB:9.3f}  {verdict} in {found['usable_bytes'] / GIB:.2f} of "
        f"{found['hbm_bytes'] / GIB:.2f} GiB"
    )
    if found["host_bytes_per_device"]:
        yield f"  {'in host memory':22} {found['host_bytes_per_device'] / GIB:9.3f}  moved to the device and back in every step"
    if found["refusal"]:
        yield f"the compiler: {found['refusal']}"
    for remedy in found["remedies"]:
        yield (
            f"  helps: {remedy['what']}: saves about {remedy['saves_bytes'] / GIB:.2f} GiB"
            f"{', probably enough alone' if remedy['enough'] else ''}"
        )
    for kind, row in found["collectives"].items():
        for axes, size in row.items():
            yield f"  {kind:22} {size / 1e6:9.1f} MB sent per device along {axes}"
    if found["collectives_hidden"] is not None:
        yield f"  of these bytes {found['collectives_hidden']:.0%} travel beside matrix products, as the program is scheduled"
    yield (
        f"FLOPs per step {found['flops_per_step']:.4g} of the model (3 forwards), {found['executed_flops']:.4g} executed; "
        f"compiled in {found['compile_seconds']:.1f} s"
    )
    if found["unknown_loops"]:
        yield f"{found['unknown_loops']} loops of unknown length count as one pass: bytes and collectives are too low"
    if seconds := found["seconds"]:
        yield (
            f"ms: compute {milliseconds(seconds['compute'])}, HBM {milliseconds(seconds['matmul_hbm'])} under products + "
            f"{milliseconds(seconds['elementwise_hbm'])} elementwise, collectives {milliseconds(seconds['collectives'])}, "
            f"of which {milliseconds(seconds['exposed'])} beside no product"
        )
        yield (
            f"step {milliseconds(found['step_seconds'])} ms ({milliseconds(seconds['without_overlap'])} without any overlap), "
            f"{found['images_per_second']:.0f} images/s, MFU {found['mfu']:.1%}, limit {found['limit']}"
        )
        yield ASSUMPTIONS
    elif found["fits"]:
        yield "no step time: the speed of simulated devices says nothing"


def traffic(rows: list[dict[str, Any]], chip: chips.Chip) -> Iterable[str]:
    """Lines about what moves bytes: each kind of kernel, then the places that have at least a hundredth of all."""
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


def sampling(found: dict[str, Any]) -> str:
    """A line about one draw of samples."""
    rate = f", {found['images_per_second']:.1f} images/s" if found["images_per_second"] else ""
    evaluations = found["evaluations"] or "as many as it needs"
    return (
        f"sampling {found['batch_size']} images, {found['sampler']}, {evaluations} evaluations: "
        f"{found['bytes_per_device'] / GIB:.2f} GiB, {'fits' if found['fits'] else 'DOES NOT FIT'}{rate}"
    )


def _mesh(found: dict[str, Any]) -> str:
    axes = " ".join(f"{name}={size}" for name, size in found["mesh"].items() if size > 1) or "one device"
    return axes + " zero1" * found["zero1"]


COLUMNS = ("model", "topology", "mesh", "remat", "GiB/device", "fits", "step ms", "MFU", "limit", "compile s")


def row(name: str, found: dict[str, Any]) -> tuple[str, ...]:
    """One plan as the cells of COLUMNS."""
    mfu = "-" if found["mfu"] is None else f"{found['mfu']:.0%}"
    return (
        name,
        found["topology"],
        _mesh(found),
        str(found["remat"]),
        f"{found['bytes_per_device'] / GIB:.2f}",
        "yes" if found["fits"] else "no",
        milliseconds(found["step_seconds"]),
        mfu,
        found["limit"] or "-",
        f"{found['compile_seconds']:.0f}",
    )


def markdown(rows: Iterable[tuple[str, ...]]) -> Iterable[str]:
    yield f"| {' | '.join(COLUMNS)} |"
    yield f"|{'---|' * len(COLUMNS)}"
    for cells in rows:
        yield f"| {' | '.join(cells)} |"
