"""Reads one saved step from disk and verifies that it equals the saved state.

`<root>/<step>/state` is an orbax PyTree checkpoint (typed PRNG keys as uint32 key data); `<root>/<step>/meta` is JSON:
{"meta": the caller's dict, "fingerprints": {leaf name: [dtype, shape, uint32]}, "checksum": CRC-32 of these two}.
Orbax silently returns garbage for a flipped byte and silently casts dtypes (0.12.8), hence both checks. Nothing in this
module writes to disk.
"""

import json
import math
import re
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from dit_jax.errors import UserError
from dit_jax.storage.fingerprint import fingerprints, host_fingerprint, is_key, leaf_names

_STEP_NAME = re.compile(r"^(0|[1-9]\d*)$")
READ_BACK_BYTES = 256 * 2**20  # host memory for verifying a step
# Failures of the machine, not of the files. They do not mean that a step is damaged, so they are raised unchanged.
_MACHINE_FAULTS = ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "UNAVAILABLE", "DEADLINE_EXCEEDED")


class BadStep(Exception):
    """A step folder does not contain the saved state; the message is the reason."""


class OtherStructure(UserError):
    """A checkpoint has other leaves, shapes or dtypes than wanted."""


def steps_in(root: epath.Path) -> list[int]:
    """Sorted step numbers of the folders under `root` whose name is a number; [] if `root` does not exist."""
    if not root.exists():
        return []
    return sorted(int(path.name) for path in root.iterdir() if _STEP_NAME.match(path.name) and path.is_dir())


def without_keys(state: Any) -> Any:
    """`state` with typed PRNG keys replaced by their uint32 key data."""
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if is_key(leaf) else leaf, state)


def record(state: Any, meta: dict) -> dict:
    """The JSON object to store with `state`: meta, fingerprints and the checksum of both.

    Raises: ValueError if meta is not a dict of JSON values.
    """
    names, leaves = leaf_names(state), jax.tree.leaves(state)
    stored = {
        name: [str(leaf.dtype), list(leaf.shape), value]
        for name, leaf, value in zip(names, leaves, fingerprints(leaves), strict=True)
    }
    try:
        body = json.loads(json.dumps({"meta": dict(meta), "fingerprints": stored}))
    except (TypeError, ValueError) as error:
        raise ValueError(f"meta must be a dict of str, int, float, bool, None, list and dict: {error}") from error
    return {**body, "checksum": _checksum(body)}


def read_record(path: epath.Path) -> tuple[dict, dict]:
    """Reads (meta, {leaf name: [dtype, shape, fingerprint]}) from the step folder `path`. Raises: BadStep."""
    reader = ocp.Checkpointer(ocp.JsonCheckpointHandler(multiprocessing_options=_alone()), multiprocessing_options=_alone())
    try:
        body = reader.restore(path / "meta", args=ocp.args.JsonRestore())
    except Exception as error:
        _raise_machine_fault(error)
        raise BadStep(f"its meta cannot be read ({_brief(error)})") from error
    checksum = body.pop("checksum", None) if isinstance(body, dict) else None
    if checksum is None or checksum != _checksum(body):
        raise BadStep(f"its meta does not match its checksum {checksum!r}")
    return body["meta"], body["fingerprints"]


def read_step(path: epath.Path, abstract: Any, partial: bool = False) -> tuple[Any, dict]:
    """Restores the leaves of `abstract` with its shardings and verifies every fingerprint; returns (tree, meta).

    Args:
        path: step folder.
        abstract: pytree whose leaves have shape, dtype and sharding (jax.ShapeDtypeStruct or jax.Array).
        partial: whether `abstract` may omit saved leaves.
    Raises:
        BadStep: the folder does not contain the saved state.
        UserError: it does, but `abstract` has other leaves, shapes or dtypes; names them.
    """
    meta, stored = read_record(path)
    names, leaves = leaf_names(abstract), jax.tree.leaves(abstract)
    _check_structure(path, dict(zip(names, leaves, strict=True)), stored, partial)
    raw = jax.tree.map(_raw_struct, abstract)
    try:
        tree = _reader().restore(
            path / "state", args=_restore_args(raw, ocp.checkpoint_utils.construct_restore_args(raw), partial)
        )
    except Exception as error:
        _raise_machine_fault(error)
        raise BadStep(f"orbax cannot restore it ({_brief(error)})") from error
    tree = jax.tree.map(_typed, tree, abstract)
    values = fingerprints(jax.tree.leaves(tree))
    wrong = [name for name, value in zip(names, values, strict=True) if value != stored[name][2]]
    if wrong:
        raise BadStep(f"{len(wrong)} of {len(names)} arrays differ from the saved ones: {', '.join(wrong[:3])}")
    return tree, meta


def damage(path: epath.Path, abstract: Any, partial: bool = False) -> str:
    """The reason for which `read_step` would raise BadStep in this process, or ""; without communication.

    Raises: UserError as `read_step`.
    """
    try:
        _, stored = read_record(path)
    except BadStep as reason:
        return str(reason)
    names, leaves = leaf_names(abstract), jax.tree.leaves(abstract)
    _check_structure(path, dict(zip(names, leaves, strict=True)), stored, partial)
    return read_back(path, jax.tree.structure(abstract), names, stored, partial)


def read_back(path: epath.Path, treedef: Any, names: list[str], stored: dict, partial: bool = False) -> str:
    """Verifies this process's share of the arrays on disk; returns the reason if they differ from the saved ones, or "".

    The arrays are assigned round robin to the processes and read into host memory a few at a time (each read parses the step's
    complete metadata). There is no communication, so this may run on a background thread and fail on a single process.

    Args:
        path: step folder.
        treedef, names: of the saved tree (or, with `partial`, of a part of it).
        stored: {leaf name: [dtype, shape, fingerprint]}.
    """
    args = treedef.unflatten([ocp.RestoreArgs(restore_type=np.ndarray)] * len(names))
    mine = range(jax.process_index(), len(names), jax.process_count())
    for positions in _by_size(mine, [_stored_bytes(stored[name]) for name in names], READ_BACK_BYTES):
        item = [0 if position in positions else ocp.PLACEHOLDER for position in range(len(names))]
        try:
            tree = _reader(_alone()).restore(path / "state", args=_restore_args(treedef.unflatten(item), args, partial))
            leaves = treedef.flatten_up_to(tree)
            values = [host_fingerprint(leaves[position]) for position in positions]
        except Exception as error:
            _raise_machine_fault(error)
            return f"{names[positions[0]]} (or one of the {len(positions)} read with it) cannot be read ({_brief(error)})"
        for position, value in zip(positions, values, strict=True):
            saved = stored[names[position]][2]
            if value != saved:
                return f"{names[position]} differs from the saved array (read {value:#010x}, saved {saved:#010x})"
    return ""


def _stored_bytes(facts):
    dtype, shape, _ = facts
    return math.prod(shape) * (jnp.dtype(dtype).itemsize if "key" not in dtype else 8)


def _by_size(positions, sizes, limit):
    """Groups consecutive positions into lists of at most `limit` bytes, or of a single larger array."""
    lists, total = [], limit
    for position in positions:
        total += sizes[position]
        if total > limit:
            lists.append([])
            total = sizes[position]
        lists[-1].append(position)
    return lists


def _check_structure(path, wanted, stored, partial):
    unplaced = [name for name, leaf in wanted.items() if getattr(leaf, "sharding", None) is None]
    if unplaced:
        raise ValueError(
            f"leaf {unplaced[0]} has no sharding: pass jax.ShapeDtypeStruct(shape, dtype, sharding=...) for every leaf"
        )
    differences = [f"{name} is not in the checkpoint" for name in wanted if name not in stored]
    if not partial:
        differences += [f"{name} is only in the checkpoint" for name in stored if name not in wanted]
    for name in wanted:
        if name not in stored:
            continue
        dtype, shape, _ = stored[name]
        if list(wanted[name].shape) != shape:
            differences.append(f"{name} has shape {tuple(wanted[name].shape)}, the checkpoint {tuple(shape)}")
        if str(wanted[name].dtype) != dtype:
            differences.append(f"{name} has dtype {wanted[name].dtype}, the checkpoint {dtype}")
    if differences:
        more = f"; and {len(differences) - 5} more" if len(differences) > 5 else ""
        raise OtherStructure(
            f"the checkpoint {path} was made by another model or optimizer: {'; '.join(differences[:5])}{more}. "
            "Use its training config, or another workdir."
        )


def _raw_struct(leaf):
    if not is_key(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
    data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=leaf.sharding)


def _typed(array, abstract):
    if not is_key(abstract):
        return array
    impl = []  # jax.random.key_impl accepts only arrays and tracers, hence the trace
    jax.eval_shape(lambda key: impl.append(jax.random.key_impl(key)), jax.ShapeDtypeStruct((), abstract.dtype))
    return jax.random.wrap_key_data(array, impl=impl[0])


def _reader(options=None):
    options = options or ocp.options.MultiprocessingOptions()
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(multiprocessing_options=options), multiprocessing_options=options)


def _alone():
    """Options of a reader that does not wait for other processes."""
    me = jax.process_index()
    return ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"alone_{me}")


def _restore_args(item, restore_args, partial):
    return ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=partial)


def _checksum(body):
    return f"{zlib.crc32(json.dumps(body, sort_keys=True).encode()):08x}"


def _raise_machine_fault(error):
    if isinstance(error, (MemoryError, PermissionError)) or any(code in str(error) for code in _MACHINE_FAULTS):
        raise error


def _brief(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
