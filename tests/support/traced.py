"""Counts the multiply-adds of a function from its trace: an oracle for the closed forms of `Network.macs`."""

import math

import jax
from jax.extend.core import jaxprs_in_params


def traced_macs(function, *args):
    """Multiply-adds of every dot_general of a function, loops included."""
    return _macs(jax.make_jaxpr(function)(*args).jaxpr)


def _macs(jaxpr):
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracting, _), _ = eqn.params["dimension_numbers"]
            left = eqn.invars[0].aval.shape
            total += math.prod(eqn.outvars[0].aval.shape) * math.prod(left[i] for i in contracting)
        for inner in jaxprs_in_params(eqn.params):
            total += eqn.params.get("length", 1) * _macs(inner)
    return total
