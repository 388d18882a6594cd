"""Casts the parameters of a network for sampling, and computes the digest that identifies them.

A sampler evaluates one network with the same parameters hundreds of times. Parameters that the network casts at every use are
cast once. In bfloat16 this halves their memory, and no step casts weights.
"""

import functools
import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from dit_jax.encoders.conditioner import constants_of
from dit_jax.errors import NotFinite
from dit_jax.storage.fingerprint import fingerprints, leaf_names
from dit_jax.tasks.adaptation import BASE, LORA
from dit_jax.tasks.diffusion import CONDITIONER
from dit_jax.tasks.state import HOST, on_device

LAYOUT = {"slice", "dynamic_slice", "gather", "squeeze", "reshape", "transpose", "broadcast_in_dim", "copy"}


def check_finite(params: Any, what: str) -> None:
    """Raises unless all parameters are finite.

    what: the network, for the message.

    Raises:
        NotFinite: with the names of the first arrays that are not.
    """
    leaves = jax.tree.leaves(params)
    counts = [int(x) for x in _count_not_finite(leaves)]
    names = [f"{name} ({count} of {x.size})" for name, x, count in zip(leaf_names(params), leaves, counts, strict=True) if count]
    if names:
        more = f", and {len(names) - 5} more" if len(names) > 5 else ""
        raise NotFinite(
            f"{what} has NaN or infinity in {', '.join(names[:5])}{more}; sample an earlier step, or train again from one "
            "with a lower learning rate"
        )


def whole_network(task: Any, params: Any, constants: Mapping[str, Any]) -> Any:
    """The parameters of the whole network, where a part of it is trained; else `params`.

    Args:
        task: a `DiffusionTask`.
        params: trained parameters, or an average of them.
        constants: of a step; {"base": the frozen parameters} is used.
    """
    if not task.adaptation.active:
        return params
    constants = {BASE: constants[BASE]}
    names = flatten_dict(params, sep="/") | flatten_dict(constants[BASE], sep="/")
    shardings = unflatten_dict({name: x.sharding for name, x in names.items() if not name.startswith(f"{LORA}/")}, sep="/")
    return jax.jit(task.network_params, out_shardings=shardings)(on_device(params), constants)


@jax.jit
def _count_not_finite(arrays):
    return [jnp.sum(~jnp.isfinite(on_device(x))) for x in arrays]


def weights_fingerprint(params: Any) -> str:
    """64 hexadecimal digits that change with any bit, name or shape of the arrays; computed on the arrays' devices."""
    arrays = jax.tree.leaves(params)
    facts = [
        (name, str(x.dtype), x.shape, digest)
        for name, x, digest in zip(leaf_names(params), arrays, fingerprints(arrays), strict=True)
    ]
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def cast_for_inference(task: Any, params: Any) -> Any:
    """Casts each parameter to the narrowest dtype that does not change a bit of the network's output.

    A parameter is cast if the network uses it in one, narrower dtype only. A norm's scale, which is used in
    float32, is not cast in a bfloat16 network. Other arrays are returned unchanged; arrays in host memory move to the devices.

    Args:
        task: a `DiffusionTask`, whose network is traced.
        params: of its network, with shardings: arrays or ShapeDtypeStructs (then the result has ShapeDtypeStructs too).
    """
    leaves, tree = jax.tree.flatten(params)
    wanted = [
        x
        if x.dtype == dtype and x.sharding.memory_kind != HOST
        else jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding.with_memory_kind(None))
        for x, dtype in zip(leaves, used_dtypes(task, params), strict=True)
    ]
    changed = [i for i, (x, other) in enumerate(zip(leaves, wanted, strict=True)) if x is not other]
    if changed and isinstance(leaves[0], jax.Array):
        for i, x in zip(changed, _cast([leaves[i] for i in changed], tuple(wanted[i].dtype for i in changed)), strict=True):
            wanted[i] = x
    return jax.tree.unflatten(tree, wanted)


@functools.partial(jax.jit, static_argnums=1)
def _cast(arrays, dtypes):
    return [on_device(x).astype(dtype) for x, dtype in zip(arrays, dtypes, strict=True)]


def used_dtypes(task: Any, params: Any) -> list[jnp.dtype]:
    """For each leaf, the narrower dtype that the network casts it to at every use; else the leaf's own dtype."""

    def network(params, requests, x, t, encoders):
        cond, _ = task.condition(params, encoders, requests)
        return task.apply(params, x, t, cond)

    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    spec = task.conditioner.batch_spec() | task.low_res_spec()
    requests = {name: jax.ShapeDtypeStruct((1, *x.shape), x.dtype) for name, x in spec.items()}
    x, t = jax.ShapeDtypeStruct((1, *task.latent_shape), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.float32)
    encoders = {CONDITIONER: constants_of(task.conditioner)[0]}
    jaxpr = jax.make_jaxpr(network)(shapes, requests, x, t, encoders).jaxpr
    dtypes_of_leaves = []
    for leaf, var in zip(jax.tree.leaves(shapes), jaxpr.invars, strict=False):  # the other arguments follow
        dtypes = _uses(jaxpr, var)
        narrower = len(dtypes) == 1 and min(dtypes).itemsize < leaf.dtype.itemsize
        dtypes_of_leaves.append(dtypes.pop() if narrower else leaf.dtype)
    return dtypes_of_leaves


def _uses(jaxpr, var) -> set[jnp.dtype]:
    """The dtypes in which a value is used, also inside loops and calls; its own dtype where the use cannot be traced."""
    dtypes = {var.aval.dtype} if any(out is var for out in jaxpr.outvars) else set()
    for eqn in jaxpr.eqns:
        for place, operand in enumerate(eqn.invars):
            if operand is not var:
                continue
            inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
            inner = getattr(inner, "jaxpr", inner)
            if eqn.primitive.name == "convert_element_type":
                dtypes.add(jnp.dtype(eqn.params["new_dtype"]))
            elif eqn.primitive.name in LAYOUT and place == 0:
                dtypes |= _uses(jaxpr, eqn.outvars[0])
            elif inner is not None and len(inner.invars) == len(eqn.invars):
                dtypes |= _uses(inner, inner.invars[place])
            else:
                dtypes.add(var.aval.dtype)
    return dtypes
