"""Tries meshes, rematerialisation, batch sizes and microbatches, and ranks those that fit by estimated images per second."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from dit_jax.errors import UserError
from dit_jax.plan import estimate
from dit_jax.plan.remedies import least_bytes
from dit_jax.programs import memory
from dit_jax.programs.topology import Topology
from dit_jax.runtime.console import duration


class Choice(NamedTuple):
    """The fields that a search varies."""

    data: int
    fsdp: int
    tensor: int
    zero1: bool
    remat: str
    batch_size: int
    microbatches: int

    def apply(self, config):
        """Returns the config with this choice."""
        config = config.copy_and_resolve_references()
        with config.unlocked():
            config.mesh.update({"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor, "zero1": self.zero1})
            config.batch_size, config.microbatches = self.batch_size, self.microbatches
            if "remat" in config.get("model", {}):
                config.model.remat = self.remat
        return config

    def __str__(self) -> str:
        return (
            f"data {self.data} fsdp {self.fsdp}{' (ZeRO-1)' * self.zero1} tensor {self.tensor}, remat {self.remat}, batch "
            f"{self.batch_size}, microbatches {self.microbatches}"
        )


def meshes(devices: int) -> Iterator[tuple[int, int, int]]:
    """Yields all (data, fsdp, tensor) whose product is the number of devices."""
    for fsdp, tensor in itertools.product(range(1, devices + 1), repeat=2):
        if devices % (fsdp * tensor) == 0:
            yield devices // (fsdp * tensor), fsdp, tensor


def choices(
    config, devices: int, remats: Iterable[str], batch_sizes: Iterable[int], microbatches: Iterable[int]
) -> tuple[list[Choice], int]:
    """Enumerates useful choices; returns (choices, number of omitted ones). The sequence axis is the config's.

    Omitted are ZeRO-1 without fsdp; a batch that is not divisible by data x fsdp x microbatches; and a tensor axis that does not
    divide the network's fields heads and width, which would compute the same on several devices.
    """
    useful, left_out = [], 0
    model = config.get("model", {})
    divided = [size for name in ("heads", "width") for size in np.ravel(model.get(name) or ())]
    sizes = meshes(devices // config.mesh.sequence)
    for (data, fsdp, tensor), zero1, remat, batch_size, parts in itertools.product(
        sizes, (False, True), remats, batch_sizes, microbatches
    ):
        splits = batch_size % (data * fsdp * parts) == 0 and (fsdp > 1 or not zero1)
        if splits and all(size % tensor == 0 for size in divided):
            useful.append(Choice(data, fsdp, tensor, zero1, remat, batch_size, parts))
        else:
            left_out += 1
    return useful, left_out


def bound(config, topology: Topology, resident_rows: int) -> int:
    """`least_bytes` of a config, from shapes; takes milliseconds, while compiling takes minutes.

    Raises:
        UserError: as `estimate.plan_training`.
    """
    run = estimate.run_on(config, topology)
    run.check_batch()
    arguments = {
        "state": run.abstract_state,
        "sums": {},
        "constants": run.abstract_constants(resident_rows),
        "batch": run.abstract_batch,
    }
    return least_bytes(run, estimate.state_memory(arguments))


def search(
    config,
    topology: Topology,
    remats: Iterable[str],
    batch_sizes: Iterable[int],
    microbatches: Iterable[int],
    max_compiles: int,
    say: Callable[[str], None],
    resident_rows: int = 0,
) -> dict[str, Any]:
    """Compiles the choices that may fit, starting with the least recomputation and communication, and ranks the results.

    Returns:
        {"ranked": plans that fit, best first; "too_large", "impossible", "not_tried": choices as text; "pruned": number of
        choices whose lower bound does not fit; "left_out": see `choices`}.

    Raises:
        UserError: there is no useful choice; the config has buckets.
    """
    if config.get("buckets", {}).get("classes"):
        raise UserError(
            "the config has buckets, whose batch sizes a search cannot vary; search with --config.buckets.classes=() and the "
            "shape of the largest bucket, or leave out --search"
        )
    wanted, left_out = choices(config, len(topology.devices), remats, batch_sizes, microbatches)
    if not wanted:
        raise UserError(
            f"none of {left_out} choices splits its batch over {len(topology.devices)} devices; give "
            "--search_batch_sizes that are multiples of them, or fewer --search_microbatches"
        )
    possible, impossible, pruned = [], [], 0
    for choice in wanted:
        try:
            least = bound(choice.apply(config), topology, resident_rows)
        except UserError as error:
            if "cannot be laid on" not in str(error):
                raise
            impossible.append(str(choice))
            continue
        if least > topology.chip.usable_bytes:
            pruned += 1
        else:
            possible.append(choice)
    # Start with the least recomputation and communication, which is preferable.
    order = {name: place for place, name in enumerate(remats)}
    possible.sort(key=lambda c: (c.microbatches, order[c.remat], c.tensor, c.fsdp, not c.zero1, -c.batch_size))
    tried, rest = possible[:max_compiles], possible[max_compiles:]
    say(
        f"{len(wanted)} choices: {pruned} cannot fit, {len(impossible)} cannot be laid on {topology.name}, {len(tried)} to "
        f"compile, {len(rest)} beyond --search_max_compiles"
    )
    ranked, too_large = _compile_all(config, topology, tried, say, resident_rows)
    ranked.sort(key=lambda plan: -(plan["images_per_second"] or 0))
    return {
        "ranked": ranked,
        "too_large": too_large,
        "impossible": impossible,
        "not_tried": list(map(str, rest)),
        "pruned": pruned,
        "left_out": left_out,
    }


def _compile_all(config, topology, tried: list[Choice], say, resident_rows) -> tuple[list[dict], list[str]]:
    ranked, too_large = [], []
    for number, choice in enumerate(tried, 1):
        plan = estimate.plan_training(choice.apply(config), topology, resident_rows)
        outcome = f"{plan['bytes_per_device'] / memory.GIB:.2f} GiB"
        if plan["fits"]:
            ranked.append(plan)
            outcome += f", {plan['images_per_second']:.0f} images/s" if plan["images_per_second"] else ""
        else:
            too_large.append(str(choice))
            outcome += ", too large"
        say(f"{number}/{len(tried)} {choice}: {outcome} (compiled in {duration(plan['compile_seconds'])})")
    return ranked, too_large
