"""FLOPs that a traced function asks for: matrix products and convolutions, scans counted as often as they run.

Unlike XLA's count this sees the length of a scan, and what rematerialisation computes twice.
"""

import math

# cuDNN's attention by the products that it executes: scores and values; for the gradient the scores again, and of dv, dp, dq, dk.
CUDNN_ATTENTION = {"dot_product_attention_fwd_wrapper": 2, "dot_product_attention_bwd_wrapper": 5}


def count(jaxpr) -> int:
    """FLOPs (2 per multiply-add) of a Jaxpr or ClosedJaxpr, over all devices; elementwise work is left out.

    Of kernels cuDNN's attention is known, as if no mask let it skip a product; others count as nothing.

    Of a conditional the dearest branch counts, of a `while` of unknown length one pass.
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
        # The zeros between the rows of a dilated input (the gradient of a stride) are no work.
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
