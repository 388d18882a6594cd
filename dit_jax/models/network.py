"""The protocol of networks, and the checks that all networks share."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.errors import UserError
from dit_jax.parallel.rules import Rules

Shape = tuple[int, ...]  # of one example, without the batch axis: (h, w, c) or (f, h, w, c)
Cond = Mapping[str, jax.Array]  # arrays [B, ...]
MIXED = ("second_label", "second_share")  # entries of a condition that mix the embeddings of two labels


class Network(Protocol):
    """A Linen module that maps (x_t, t, cond) to an output. It is a pure function: no random numbers, dropout or guidance.

    Fields:
        rules: how its parameters are split over the mesh (`parallel.rules`).

    A network that takes the entries "second_label" and "second_share" of a condition (`encoders.labels.Labels`) says so by
    `mixes_labels = True`.

    A network that can be trained with Muon or with adapters (LoRA) also has `matrices`, {pattern of paths: kinds of the trailing
    axes}: "i" for inputs, "o" for outputs, "s" for separate matrices. [D, 3, H, E], the kernel of queries, keys and values, is
    "isoo". Axes before those, as of a stack of blocks, are separate matrices too. `lora_targets` are the patterns of the kernels
    that adapters change by default, where they are not those of `tasks.adaptation.TARGETS`. A network with labels may have
    `label_table`, the path of its table [num_classes + 1, width] whose last row is the null label: other classes can then be
    trained from its weights. A network with labels but without the null label says so by `has_null_label = False`: it has no
    classifier-free guidance. A network of `depth` blocks in sequence whose `control` takes "keep", bool[depth], says so by
    `skips_blocks = True`: skip-layer guidance needs it. A parameter named "constant", such as random Fourier features, is drawn
    at the start, saved, and never trained or counted. A network may have a function `family(fields)` of its section of a config,
    which names models that belong together in the figures of a sweep; without it, all networks of a name do.
    """

    @property
    def rules(self) -> Rules: ...

    def init(self, rngs: jax.Array, *args: Any, **kwargs: Any) -> Any:
        """Linen's method: {"params": ...} for the arguments of `__call__`."""
        ...

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """Linen's method: `__call__`, or another method by its name, with these parameters."""
        ...

    def __call__(self, x_t: jax.Array, t: jax.Array, cond: Cond, control: Mapping[str, Any] | None = None) -> jax.Array:
        """The output [B, ..., output channels] in float32.

        Args:
            x_t: [B, h, w, c] or [B, f, h, w, c], as `Process.network_input` returns it.
            t: f32[B], as `Process.network_time` returns it.
            cond: arrays [B, ...] by name. An entry that the network does not use is an error.
            control: settings of a call without a batch axis, the same for all examples, such as keep[L] of skip-layer
                guidance; None changes nothing.
        """
        ...

    def check(self, latent_shape: Shape) -> None:
        """Raises a UserError if the fields do not fit one another or the input."""
        ...

    def macs(self, latent_shape: Shape, cond_shapes: Mapping[str, Shape]) -> int:
        """Multiply-adds of one forward pass of one example. FLOPs are twice that."""
        ...

    def num_tokens(self, latent_shape: Shape) -> int:
        """Number of tokens (or pixels of the finest level) of one example. The sampler's chunk size depends on it."""
        ...

    def describe(self) -> str:
        """One line: the kind of network and its sizes."""
        ...


class Resizable(Protocol):
    """Optional members of a network that takes inputs of other sizes than that of its training. Without them it takes only that.

    Fields:
        size_unit: both sides of an input are multiples of it.
        position_grid: (rows, columns), in cells of size_unit, of the input that positions are scaled to; None for the input's own
            grid. A network without positions, or with relative ones, does not have this field.
    """

    @property
    def size_unit(self) -> int: ...


class Planned(Protocol):
    """Optional members of a network: memory estimates for `plan`, and choices that depend on the platform.

    A method `check_times(low, high)` may raise a UserError for a process whose network times, from low to high, it cannot take.

    Fields:
        remat_policies: values of the network's field `remat` that `plan --search` tries, the least recomputation first.
    """

    def activation_bytes(self, latent_shape: Shape, rows: int, mesh_shape: Mapping[str, int]) -> int:
        """Lower bound on the bytes that a device keeps between the forward and the backward pass of `rows` examples."""
        ...

    def savings(self, latent_shape: Shape, rows: int, mesh_shape: Mapping[str, int], activations: int) -> dict[str, int]:
        """Changes of the network's fields that store fewer activations: {config override: bytes saved per device}.

        activations: bytes per device that activations take in the compiled step.
        """
        ...

    def for_platform(self, platform: str) -> "Network":
        """The same network with every choice resolved that depends on the platform ("cpu", "gpu", "tpu")."""
        ...


def activation_bytes(network: Network, latent_shape: Shape, rows: int, mesh_shape: Mapping[str, int]) -> int:
    """See `Planned`; 0 if the network has no such method."""
    method = getattr(network, "activation_bytes", None)
    return 0 if method is None else method(latent_shape, rows, mesh_shape)


def savings(network: Network, latent_shape: Shape, rows: int, mesh_shape: Mapping[str, int], activations: int) -> dict[str, int]:
    """See `Planned`; {} if the network has no such method."""
    method = getattr(network, "savings", None)
    return {} if method is None else method(latent_shape, rows, mesh_shape, activations)


def for_platform(network: Network, platform: str) -> Network:
    """See `Planned`; the network unchanged if it has no such method."""
    method = getattr(network, "for_platform", None)
    return network if method is None else method(platform)


def for_input(network: Network, latent_shape: Shape) -> Network:
    """The same network with every choice resolved that depends on the input of training, by its method `for_input`.

    The network unchanged if it has no such method.
    """
    method = getattr(network, "for_input", None)
    return network if method is None else method(latent_shape)


def remat_policies(network: Network) -> tuple[str, ...]:
    """See `Planned`; () if the network has no such choice."""
    return tuple(getattr(network, "remat_policies", ()))


def size_unit(network: Network) -> int | None:
    """See `Resizable`; None for a network that takes only the size of its training."""
    return getattr(network, "size_unit", None)


def scales_positions(network: Network) -> bool:
    """Whether the network has `Resizable.position_grid`."""
    return size_unit(network) is not None and hasattr(network, "position_grid")


def position_grid(network: Network, latent_shape: Shape) -> tuple[int, int]:
    """(rows, columns) that the positions of a network with `scales_positions` have for inputs of `latent_shape`."""
    own = tuple(side // network.size_unit for side in latent_shape[-3:-1])  # type: ignore[attr-defined]
    return tuple(network.position_grid or own)  # type: ignore[attr-defined]


def label_vectors(
    embed: Callable[[jax.Array], jax.Array], cond: Cond, batch: int, num_classes: int, null: bool = True
) -> jax.Array:
    """[B, D]: the embedding of the label, or of two, (1 - share) of the first and share of the second.

    null: whether the network has the null label.

    Raises:
        UserError: there is no label, or only a part of what a mixture of two needs; see `check_labels`.
    """
    if "label" not in (cond or {}):
        raise UserError(
            f"model.num_classes is {num_classes} and the condition has no label; set conditioner.name to labels, or "
            "model.num_classes to 0"
        )
    check_labels(cond["label"], batch, num_classes, null)
    label = embed(cond["label"])
    if not cond.keys() & set(MIXED):
        return label
    if not cond.keys() >= set(MIXED):
        raise UserError(f"to mix two labels, the condition needs all of 'label', {', '.join(map(repr, MIXED))}")
    check_labels(cond["second_label"], batch, num_classes, null)
    share = cond["second_share"][:, None].astype(label.dtype)
    return (1 - share) * label + share * embed(cond["second_label"])


def has_null_label(network: Network) -> bool:
    """See `Network`; True if the network does not say."""
    return bool(getattr(network, "has_null_label", True))


def skipping(network: Network, layers: tuple[int, ...]) -> dict[str, np.ndarray]:
    """The control of a call without these blocks: {"keep": bool[depth]}, see `Network`.

    Raises:
        UserError: the network cannot skip blocks, has no block of such a number, or none would be left.
    """
    if not getattr(network, "skips_blocks", False):
        raise UserError(
            f"guidance.skip_layers is {layers}, and {type(network).__name__} cannot skip blocks; leave guidance.skip_layers empty"
        )
    depth: int = network.depth  # type: ignore[attr-defined]
    if wrong := [layer for layer in layers if not 0 <= layer < depth]:
        raise UserError(f"guidance.skip_layers has block {wrong[0]}, and the network has the blocks 0 to {depth - 1}")
    keep = np.isin(np.arange(depth), layers, invert=True)
    if not keep.any():
        raise UserError(f"guidance.skip_layers has all {depth} blocks of the network; leave some of them")
    return {"keep": keep}


def check_labels(label: Any, batch: int, num_classes: int, null: bool = True) -> None:
    """Raises a UserError unless labels are whole numbers [batch] from 0 to num_classes (the null label).

    The values of traced labels are not known.

    null: whether the network has the null label.

    An embedding gives NaN for a label outside of its table.
    """
    if not hasattr(label, "dtype") or not jnp.issubdtype(label.dtype, jnp.integer) or label.shape != (batch,):
        raise UserError(
            f'cond["label"] is {_kind(label)}; an array int32[{batch}] is needed, with values from 0 to {num_classes - 1}'
        )
    if isinstance(label, jax.core.Tracer) or not getattr(label, "is_fully_addressable", True):
        return
    values = np.asarray(label)
    last = num_classes if null else num_classes - 1
    if values.size and not 0 <= values.min() <= values.max() <= last:
        wrong = values[(values < 0) | (values > last)][0]
        none = f", or {num_classes} for no label" if null else "; the network has no null label (model.null_label is False)"
        raise UserError(f"label {wrong} is out of range: 0 to {num_classes - 1}{none}")


def _kind(x: Any) -> str:
    """ "int32[8]" of an array, "list" of a list."""
    return f"{x.dtype}{list(x.shape)}" if hasattr(x, "dtype") else type(x).__name__


def check_entries(what: str, given: Mapping[str, Any] | None, known: tuple[str, ...], network: str) -> None:
    """Raises a UserError if `given` is not a dict, or has an entry that the network does not use.

    what: "cond" or "control".
    """
    if not isinstance(given, (Mapping, type(None))):
        example = "{" + ", ".join(f'"{name}": y' for name in known[:1]) + "}"
        raise UserError(f"{what} is {_kind(given)}; {network} takes a dict of arrays by name, as in {example}")
    unknown = sorted(set(given or ()) - set(known))
    if unknown:
        raise UserError(
            f"{network} has no {what} entry {', '.join(map(repr, unknown))}; it takes {', '.join(map(repr, known)) or 'none'}"
        )
