"""Training a part of a network: frozen parameters, and low-rank adapters (LoRA).

The parameters of the training state are those that are trained. The others, the base, are constants of the step. `merged` gives
the network's parameters of both.

r rank of the adapters.
"""

import functools
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from dit_jax.errors import UserError
from dit_jax.parallel.mesh import constrain
from dit_jax.parallel.rules import Rules, spec_of

BASE = "base"  # key of the frozen parameters in the constants of a step
LORA = "lora"  # key of the adapters in the trained parameters
TARGETS = ("attention/.*/kernel", "mlp/.*/kernel")
RULES: Rules = ((rf"{LORA}/.*/(a|b)", ()),)  # kilobytes to megabytes, replicated


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters: a kernel W [in, out] is replaced by W + (alpha / r) a b with a [in, r] and b [r, out].

    The adapters are trained and the network is frozen. a is uniform in +-1 / sqrt(in) and b is zero at the start, as PEFT has
    them. Each kernel of a stack of blocks has its own adapter; the kernel of queries, keys and values has one.
    Source: Hu et al. 2021, section 4.1.

    Fields:
        rank: r; 0 for no adapters.
        alpha: scale of the product times r; None for r.
        targets: patterns of the kernels that get adapters.
        train: patterns of parameters that are trained whole, such as "label_embedding/embedding" for new classes.

    Raises:
        UserError: a value is out of range, or a pattern is no regular expression.
    """

    rank: int = 0
    alpha: float | None = None
    targets: Sequence[str] = TARGETS
    train: Sequence[str] = ()

    def __post_init__(self):
        if self.rank < 0:
            raise UserError(f"init.lora.rank is {self.rank}; it must be at least 1, or 0 for no adapters")
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha > 0):
            raise UserError(f"init.lora.alpha is {self.alpha}; it must be positive, or None for the rank")
        check_patterns("init.lora.targets", self.targets)
        check_patterns("init.lora.train", self.train)

    @property
    def scale(self) -> float:
        """Factor of the product of an adapter's two matrices."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


@dataclass(frozen=True)
class Adaptation:
    """Which parameters of a network are trained.

    Fields:
        freeze: patterns of parameters that keep their values. A pattern is a regular expression for the end of a path.
        lora: low-rank adapters; with them all other parameters are frozen, except those that `lora.train` names.
        matrices: `Network.matrices`, which says what the axes of a kernel are.

    Raises:
        UserError: both are given, or a pattern is no regular expression.
    """

    freeze: Sequence[str] = ()
    lora: Lora = field(default_factory=Lora)
    matrices: Mapping[str, str] = field(default_factory=dict)

    rules = RULES

    def __post_init__(self):
        check_patterns("init.freeze", self.freeze)
        if self.freeze and self.lora.rank:
            raise UserError(
                f"init.freeze is {tuple(self.freeze)} and init.lora.rank is {self.lora.rank}: with adapters all other parameters "
                "are frozen; leave init.freeze empty, and name what is trained whole in init.lora.train"
            )

    @property
    def active(self) -> bool:
        """Whether any parameter is frozen."""
        return bool(self.freeze or self.lora.rank)

    def base(self, params: Any) -> Any:
        """The parameters that are constants of the step, of the network's parameters (arrays or ShapeDtypeStructs)."""
        flat = flatten_dict(params, sep="/")
        return unflatten_dict({name: x for name, x in flat.items() if not self._is_trained_whole(name)}, sep="/")

    def trained(self, params: Any, key: jax.Array) -> Any:
        """The parameters of the training state at the start, of the network's parameters.

        Raises:
            UserError: a pattern matches nothing, a target is not a matrix, or nothing is left to train.
        """
        flat = flatten_dict(params, sep="/")
        self._check(flat)
        trained = {name: x for name, x in flat.items() if self._is_trained_whole(name)}
        for name, x in flat.items():
            if self._is_target(name):
                a, b = adapter_shapes(x.shape, self._kinds(name), self.lora.rank)
                bound, own = a[-2] ** -0.5, jax.random.fold_in(key, zlib.crc32(f"{LORA}/{name}".encode()))
                trained[f"{LORA}/{name}/a"] = jax.random.uniform(own, a, jnp.float32, -bound, bound)
                trained[f"{LORA}/{name}/b"] = jnp.zeros(b, jnp.float32)
        return unflatten_dict(trained, sep="/")

    def merged(self, trained: Any, base: Any, rules: Rules | None = None) -> Any:
        """The network's parameters.

        rules: how they are split over the mesh; products of adapters, and their gradients, are split alike.
        """
        whole = {name: x for name, x in flatten_dict(trained, sep="/").items() if not name.startswith(f"{LORA}/")}
        adapters = trained.get(LORA, {})
        return with_adapters(unflatten_dict({**flatten_dict(base, sep="/"), **whole}, sep="/"), adapters, self.lora.scale, rules)

    def _is_target(self, name: str) -> bool:
        return bool(self.lora.rank) and matches(self.lora.targets, name) and not matches(self.lora.train, name)

    def _is_trained_whole(self, name: str) -> bool:
        return matches(self.lora.train, name) if self.lora.rank else not matches(self.freeze, name)

    def _kinds(self, name: str) -> str:
        kinds = next((kinds for pattern, kinds in self.matrices.items() if matches((pattern,), name)), None)
        if kinds is None:
            raise UserError(
                f"init.lora.targets: {name} is not one of the network's matrices ({', '.join(self.matrices) or 'none'}); choose "
                "other targets, or train it whole with init.lora.train"
            )
        return kinds

    def _check(self, names: Mapping[str, Any]) -> None:
        patterns = {"init.freeze": self.freeze}
        if self.lora.rank:
            patterns = {"init.lora.targets": self.lora.targets, "init.lora.train": self.lora.train}
        for where, given in patterns.items():
            for pattern in given:
                if not any(matches((pattern,), name) for name in names):
                    raise UserError(f"{where}: {pattern!r} matches no parameter; paths are such as {', '.join(list(names)[:3])}")
        if not any(self._is_target(name) or self._is_trained_whole(name) for name in names):
            raise UserError("init.freeze and init.lora leave no parameter to train; freeze fewer, or give targets")


def with_adapters(params: Any, adapters: Any, scale: float, rules: Rules | None = None) -> Any:
    """The network's parameters with the products of the adapters added, in the dtype of the parameters.

    rules: how the parameters are split over the mesh; None leaves that to the compiler.

    adapters: nested as the parameters, with {"a": [.., in, r], "b": [.., r, out]} in the place of a kernel.
    """
    flat, pairs = flatten_dict(params, sep="/"), flatten_dict(adapters, sep="/")
    for name in [name.removesuffix("/a") for name in pairs if name.endswith("/a")]:
        kernel = flat[name]
        product = jnp.matmul(pairs[f"{name}/a"], pairs[f"{name}/b"], precision=jax.lax.Precision.HIGHEST)
        product = product.reshape(kernel.shape)
        if rules is not None:
            product = constrain(product, functools.partial(spec_of, name, kernel.shape, rules=rules))
        flat[name] = (kernel + scale * product).astype(kernel.dtype)
    return unflatten_dict(flat, sep="/")


def adapter_shapes(shape: Sequence[int], kinds: str, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of a and b for a kernel. Axes in front of those that `kinds` names are a stack; "s" counts as outputs."""
    lead, inputs = len(shape) - len(kinds), len(kinds) - len(kinds.lstrip("i"))
    stack, rows, columns = shape[:lead], shape[lead : lead + inputs], shape[lead + inputs :]
    return (*stack, math.prod(rows), rank), (*stack, rank, math.prod(columns))


def matches(patterns: Sequence[str], name: str) -> bool:
    """Whether the end of a path matches one of the patterns, from the start of a part of the path."""
    return any(re.search(rf"(^|/){pattern}$", name) for pattern in patterns)


def check_patterns(where: str, patterns: Sequence[str]) -> None:
    """Raises a UserError unless the patterns are regular expressions."""
    if isinstance(patterns, str):
        raise UserError(f"{where} is {patterns!r}; give a tuple of patterns, as in ('{patterns}',)")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise UserError(f"{where}: {pattern!r} is no regular expression ({error})") from None
