"""The table of published networks: tokens, parameters and multiply-adds, counted from shapes, and the FIDs of their papers."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from dit_jax.models.published import Published
from dit_jax.models.registered import networks
from dit_jax.tasks.state import count_parameters

CONSTANT = "/constant"  # ending of the paths of parameters that are never trained, such as random Fourier frequencies


def counts(constructor: Any, published: Published) -> dict:
    """Counts the cost of a network without creating arrays."""
    network = constructor(**published.fields)
    shapes = published.cond_shapes
    x, t = jnp.zeros((1, *published.input_shape)), jnp.zeros((1,))
    cond = {name: jnp.zeros((1, *shape), jnp.int32 if name == "label" else jnp.float32) for name, shape in shapes.items()}
    params = flatten_dict(jax.eval_shape(network.init, jax.random.key(0), x, t, cond)["params"], sep="/")
    trained = {path: x for path, x in params.items() if not path.endswith(CONSTANT)}
    macs = network.macs(published.input_shape, shapes)
    return {
        "tokens": network.num_tokens(published.input_shape),
        "params": count_parameters(trained),
        "gmacs": macs / 1e9,
        "train_flops_per_image": 6 * macs,
        "fids": [fid._asdict() for fid in published.fids],
    }


def table() -> dict[str, dict]:
    """{"XL/2@256": counts, ..., "ADM@256": counts, ...}.

    A network that upsamples also has "cascade": the network before it, and the sums of both.
    """
    entries = list(networks())
    rows = {name: counts(constructor, published) for name, constructor, published in entries}
    for name, _, published in entries:
        if published.after:
            both = rows[name], rows[published.after]
            rows[name]["cascade"] = {"after": published.after} | {
                key: sum(row[key] for row in both) for key in ("params", "gmacs")
            }
    return rows


def lines(rows: dict[str, dict]) -> Iterator[str]:
    """The table as text."""
    yield f"{'network':26} {'tokens':>6} {'parameters':>12} {'GMACs':>8} {'training GFLOPs/image':>22}  FID-50K"
    for name, row in rows.items():
        fids = ", ".join(f"{fid['value']} ({fid['setting']})" for fid in row["fids"])
        cost = f"{row['tokens']:6} {row['params']:12,} {row['gmacs']:8.2f} {row['train_flops_per_image'] / 1e9:22.1f}"
        cascade = row.get("cascade")
        both = f"; with {cascade['after']} {cascade['params']:,} parameters, {cascade['gmacs']:.2f} GMACs" if cascade else ""
        yield f"{name:26} {cost}  {fids}{both}".rstrip()
