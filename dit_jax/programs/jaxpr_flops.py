"""FLOPs of a traced function: matrix products and convolutions, with scans counted once per iteration.

Unlike XLA's count, this one includes the length of a scan and the recomputation of rematerialisation.
"""

import math
from typing import Any

# Products that cuDNN's attention executes: scores and values; in the gradient the scores again, and dv, dp, dq, dk.
CUDNN_ATTENTION = {"dot_product_attention_fwd_wrapper": 2, "dot_product_attention_bwd_wrapper": 5}


def count(jaxpr: Any) -> int:
    """FLOPs (2 per multiply-add) of a Jaxpr or ClosedJaxpr, over all devices; elementwise operations do not count.

    Of custom kernels, only cuDNN's attention counts, without products skipped thanks to a mask.

    A conditional counts as its most expensive branch, a `while` with an unknown trip count as one iteration.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    return sum(_equation(eqn) for eqn in jaxpr.eqns)


def _equation(eqn) -> int:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        (contracting, _), _ = params["dimension_numbers"]
        return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(eqn.invars[0].aval.shape[i] for i in contracting)
    if name == "conv_general_dilated":
        kernel, features = eqn.invars[1].aval.shape, params["dimension_numbers"].rhs_spec[0]
        per_output = math.prod(kernel) // kernel[features]
        # The zeros between the rows of a dilated input (the gradient of a stride) cost nothing.
        return 2 * math.prod(eqn.outvars[0].aval.shape) * per_output // math.prod(params["lhs_dilation"])
    if name in CUDNN_ATTENTION:
        query, key = eqn.invars[0].aval.shape, eqn.invars[1].aval.shape  # [B, N, H, E], [B, M, H, E]; layout 1 has H before N
        return CUDNN_ATTENTION[name] * 2 * math.prod(query) * key[1 if params["layout"] == 0 else 2]
    if name == "cond":
        return max(count(branch) for branch in params["branches"])
    if name == "scan":
        return params["length"] * count(params["jaxpr"])
    if name == "shard_map":
        return params["mesh"].size * count(params["jaxpr"])
    return sum(count(part) for value in params.values() for part in _jaxprs(value))


def _jaxprs(value):
    """The jaxprs in one parameter of an equation."""
    for item in value if isinstance(value, (tuple, list)) else (value,):
        if hasattr(item, "eqns") or hasattr(item, "jaxpr"):
            yield item
