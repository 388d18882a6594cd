"""Writes a sampler as StableHLO, with its weights; `Pipeline.export` says how the files are read."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from dit_jax.encoders.conditioner import Requests
from dit_jax.errors import UserError
from dit_jax.parallel.rules import path_name
from dit_jax.sample.generator import Generator, has_replicated_params
from dit_jax.storage.atomic import remove_leftovers, replacing_folder, write_json
from dit_jax.storage.paths import local_path
from dit_jax.tasks.diffusion import CONDITIONER

PROGRAM, WEIGHTS, MADE_BY = "sampler.stablehlo", "weights.npz", "made_by.json"


def write(
    path: str | os.PathLike, generator: Generator, trees: Mapping[str, Any], requests: Requests, facts: Mapping[str, Any]
) -> Path:
    """Writes the folder and returns its path. A call of the program draws one chunk of images, on one device.

    Args:
        path: a folder; one that exists is replaced if it holds nothing but an export.
        trees: {"params", "weak_params", "codec", and "conditioner" of a frozen encoder}: what the generator reads.
        requests: as the generator takes them; their dtypes and the shapes of a row count.
        facts: more entries of made_by.json.

    Raises:
        UserError: the weights are split over devices; the folder holds something else, or cannot be written.
    """
    path = local_path(path).absolute()
    strange = sorted(p.name for p in path.iterdir() if p.name not in (PROGRAM, WEIGHTS, MADE_BY)) if path.is_dir() else []
    if strange or path.is_file():
        raise UserError(f"{path} {f'holds {strange[0]}' if strange else 'is a file'}; give a folder that does not exist")
    if not has_replicated_params(generator.mesh):
        raise UserError(
            f"an exported sampler runs on one device, and the weights are split over {generator.mesh.size}; use fsdp=1"
        )
    rows = generator.chunk_size
    leaves, structure = jax.tree_util.tree_flatten_with_path(dict(trees))
    names, dtypes = [path_name(keys) for keys, _ in leaves], [x.dtype for _, x in leaves]
    # NumPy has no bfloat16: its bits travel as uint16.
    stored = [np.asarray(x) if x.dtype != jnp.bfloat16 else np.asarray(x).view(np.uint16) for _, x in leaves]

    def images(weights, seed, indices, requests):
        arrays = [
            x if x.dtype == dtype else jax.lax.bitcast_convert_type(x, dtype)
            for x, dtype in zip((weights[name] for name in names), dtypes, strict=True)
        ]
        trees = jax.tree.unflatten(structure, arrays)
        constants = {name: trees[name] for name in ("codec", CONDITIONER) if name in trees}
        args = trees["params"], constants, indices, requests, trees["weak_params"], seed, None
        return generator.images_of_one_device(*args)[0]  # the file has no place for whether they are finite

    weights: dict[str, Any] = dict(zip(names, stored, strict=True))
    exported = export.export(jax.jit(images))(
        {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in weights.items()},
        jax.ShapeDtypeStruct((), jnp.uint32),
        jax.ShapeDtypeStruct((rows,), jnp.int32),
        {k: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype) for k, x in requests.items()},
    )
    known = {"rows": rows, "image_shape": list(generator.image_shape), "platform": exported.platforms[0]}
    try:
        remove_leftovers(path.parent, path.name)
        with replacing_folder(path) as folder:
            (folder / PROGRAM).write_bytes(exported.serialize())
            np.savez(folder / WEIGHTS, **weights)
            write_json(folder / MADE_BY, {**known, **facts}, indent=2)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); give another folder") from None
    return path
