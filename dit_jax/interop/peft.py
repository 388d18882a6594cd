"""Low-rank adapters in the layout of PEFT: a folder with adapter_config.json and adapter_model.safetensors.

Names of a DiT's modules are those of the paper's code ("blocks.0.attn.qkv") or of diffusers' `DiTTransformer2DModel`
("transformer_blocks.0.attn1.to_q"), in which query, key and value are separate. Of any network they can be our own paths
("blocks.0.attention.qkv"). Our kernels may be stacked over blocks, and are [in, out] where PyTorch's weight is [out, in].

r rank, L depth.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from dit_jax.errors import UserError
from dit_jax.interop import diffusers_dit, official
from dit_jax.interop.official import Shapes
from dit_jax.interop.tensors import Tensor, Tensors, finite, open_safetensors, write_safetensors
from dit_jax.storage.atomic import remove_leftovers, write_json
from dit_jax.storage.bounded import read_json
from dit_jax.storage.claim import LOCK, claim
from dit_jax.storage.paths import local_path
from dit_jax.tasks.adaptation import LORA, adapter_shapes, matches

CONFIG, FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
OWN = "dit_jax"  # our own paths
LAYOUTS = ("official", "diffusers", OWN)
# Settings of PEFT that change what an adapter computes, with the only value that is read.
PLAIN: dict[str, Any] = {"bias": "none", "fan_in_fan_out": False, "use_dora": False, "alpha_pattern": {}, "lora_bias": False}
LAYER = re.compile(rf"{re.escape(PREFIX)}(.+)\.lora_(A|B)\.weight")


@dataclass(frozen=True)
class Adapter:
    """Adapters and parameters that were trained whole, as NumPy arrays.

    Fields:
        pairs: {path of a kernel: (a [.., in, r], b [.., r, out])}, stacked as the kernel.
        whole: {path: parameter}.
        scale: factor of the product of a and b.
    """

    pairs: Mapping[str, tuple[np.ndarray, np.ndarray]]
    whole: Mapping[str, np.ndarray]
    scale: float

    def tree(self) -> dict[str, Any]:
        """`pairs` as `tasks.adaptation.with_adapters` takes them."""
        return unflatten_dict(
            {f"{path}/{part}": x for path, pair in self.pairs.items() for part, x in zip("ab", pair, strict=True)}, sep="/"
        )

    def merged(self, tensors: Tensors) -> dict[str, Tensor]:
        """Our tensors with the adapters in them; each is read and merged lazily, in float32, and keeps its dtype.

        Raises:
            UserError: a kernel does not exist, or has another shape.
        """
        unknown = sorted({*self.pairs, *self.whole} - {*tensors})
        if unknown:
            raise UserError(f"the adapter is of another network, which has {', '.join(unknown[:3])}")
        merged = dict(tensors)
        for path, x in self.whole.items():
            merged[path] = Tensor(x.shape, tensors[path].dtype, lambda x=x, path=path: x.astype(tensors[path].dtype))  # type: ignore[misc]
        for path in self.pairs:
            merged[path] = tensors[path]._replace(load=self._load(path, tensors[path]))
        return merged

    def _load(self, path: str, kernel: Tensor) -> Callable[[], np.ndarray]:
        a, b = self.pairs[path]
        if a.shape[-2] * b.shape[-1] * int(np.prod(a.shape[:-2])) != int(np.prod(kernel.shape)):
            raise UserError(f"the adapter of {path} is of {a.shape[-2]} x {b.shape[-1]}, and the kernel is {kernel.shape}")

        def load() -> np.ndarray:
            product = np.matmul(a.astype(np.float32), b.astype(np.float32)).reshape(kernel.shape)
            return (kernel.load().astype(np.float32) + np.float32(self.scale) * product).astype(kernel.dtype)

        return load


def of_run(trained: Tensors, scale: float) -> Adapter:
    """The adapter of a run's trained parameters, by their paths."""
    flat = {name: np.asarray(tensor.load()) for name, tensor in trained.items()}
    kernels = [name.removeprefix(f"{LORA}/").removesuffix("/a") for name in flat if re.fullmatch(rf"{LORA}/.*/a", name)]
    pairs = {name: (flat[f"{LORA}/{name}/a"], flat[f"{LORA}/{name}/b"]) for name in kernels}
    return Adapter(pairs, {name: x for name, x in flat.items() if not name.startswith(f"{LORA}/")}, scale)


def layouts_of(shapes: Shapes) -> tuple[str, ...]:
    """The layouts of names that modules of a network with these parameters have."""
    try:
        official.check_kind(shapes)
    except UserError:
        return (OWN,)
    return LAYOUTS


def write(folder: str | os.PathLike, adapter: Adapter, layout: str | None, shapes: Shapes, network: Any) -> dict[str, int]:
    """Writes the folder; returns {"tensors", "parameters"}.

    Args:
        layout: one of LAYOUTS, whose names of modules are used; None for the first of `layouts_of`.
        shapes: of the network's parameters.
        network: the `models.network.Network`.

    Raises:
        UserError: the layout cannot represent the network; the folder holds other files; another command is writing it.
        ValueError: the adapters have several ranks, as those of diffusers' names may have after `read`.
    """
    if len({a.shape[-1] for a, _ in adapter.pairs.values()}) != 1:
        raise ValueError("the adapters have several ranks; merge them instead")
    folder, layout = local_path(folder), layout or layouts_of(shapes)[0]
    if layout != OWN:
        official.check_kind(shapes)
    rank = next(iter(adapter.pairs.values()))[0].shape[-1]
    tensors: dict[str, np.ndarray] = {}
    modules: dict[str, None] = {}
    for path, (a, b) in adapter.pairs.items():
        for name, x, y in _modules(path, a, b, layout):
            modules[re.sub(r".*blocks\.\d+\.", "", name)] = None
            tensors[f"{PREFIX}{name}.lora_A.weight"] = np.ascontiguousarray(x.T)
            tensors[f"{PREFIX}{name}.lora_B.weight"] = np.ascontiguousarray(y.T)
    saved: dict[str, None] = {}
    for path, x in adapter.whole.items():
        for theirs, part in _whole_tensors(path, x, layout, shapes, network):
            saved[theirs.rpartition(".")[0].rpartition(".")[2]] = None
            tensors[f"{PREFIX}{theirs}"] = part
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": _whole(adapter.scale * rank),
        "target_modules": list(modules),
        "modules_to_save": list(saved) or None,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "base_model_name_or_path": None,
        "task_type": None,
    }
    with claim(folder, "writing adapters", "--out"):
        remove_leftovers(folder, FILE, CONFIG)
        if strange := sorted({path.name for path in folder.iterdir()} - {LOCK, FILE, CONFIG}):
            raise UserError(f"--out={folder} holds {strange[0]}; give an empty folder, or one that does not exist")
        held = {name: Tensor(x.shape, x.dtype, lambda x=x: x) for name, x in tensors.items()}  # type: ignore[misc]
        write_safetensors(folder / FILE, held, {"format": "pt"})
        write_json(folder / CONFIG, config, indent=2)
    return {"tensors": len(tensors), "parameters": sum(x.size for x in tensors.values())}


def read(folder: str | os.PathLike, shapes: Shapes, network: Any) -> Adapter:
    """Reads a folder that PEFT or `write` wrote, for a network with these parameters and with `Network.matrices`.

    Blocks without an adapter get zeros. Adapters of query, key and value become one, of three times the rank if they differ.

    Raises:
        UserError: files are missing or damaged, a setting or a tensor is not known, or a shape does not fit.
    """
    folder = local_path(folder)
    remedy = "give a folder that PEFT's save_pretrained or dit_jax.convert --to=peft wrote"
    if not (folder / FILE).exists():
        raise UserError(f"{folder} has no {FILE}; {remedy}")
    try:
        config = read_json(folder / CONFIG, remedy, {"peft_type": str, "r": int, "lora_alpha": float})
    except FileNotFoundError:
        raise UserError(f"{folder} has no {CONFIG}, which says the scale; {remedy}") from None
    if config["peft_type"] != "LORA" or config["r"] < 1:
        raise UserError(f"{folder / CONFIG} is of peft_type {config['peft_type']!r:.50} and r {config['r']}; LORA is read")
    for name, plain in PLAIN.items():
        if (config.get(name) or plain) != plain:
            raise UserError(f"{folder / CONFIG} has {name} = {config[name]!r:.100}, which is not supported; only {plain!r} is")
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    tensors = finite(open_safetensors(folder / FILE)[0], str(folder / FILE))
    layers = {match[1] for match in map(LAYER.fullmatch, tensors) if match}
    others = {name: tensors[name] for name in tensors if not LAYER.fullmatch(name)}
    pairs: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for path, kinds in _kernels(shapes, getattr(network, "matrices", {})):
        if (pair := _read_kernel(path, shapes, kinds, tensors, layers)) is not None:
            pairs[path] = pair
    whole = {}
    for path in shapes:
        if (array := _read_whole(path, others, shapes, network)) is not None:
            whole[path] = array
    if layers or others:
        raise UserError(
            f"{folder / FILE} has {', '.join(sorted([*layers, *others])[:3])}, which is no part of this network; {remedy} for it"
        )
    return Adapter(pairs, whole, scale)


def _kernels(shapes: Shapes, matrices: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for path in shapes:
        for pattern, kinds in matrices.items():
            if matches((pattern,), path):
                yield path, kinds
                break


def _module_names(path: str, index: tuple[int, ...], layout: str) -> list[str]:
    """The names of the module of a kernel: one, or three of query, key and value in the layout "diffusers".

    index: place in the stack; () for a kernel that is not stacked.
    """
    if layout == OWN:
        first, *others = path.removesuffix("/kernel").split("/")
        return [".".join((first, *map(str, index), *others))]
    name = f"blocks.{index[0]}.{official.BLOCK_NAMES[path.removeprefix('blocks/')]}" if index else official.NAMES[path]
    names = [name] if layout == "official" else diffusers_dit.names(name, 1)
    return [each.removesuffix(".weight") for each in names]


def _modules(path: str, a: np.ndarray, b: np.ndarray, layout: str) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(name of a module, its a [in, r], its b [r, out])."""
    for index in np.ndindex(a.shape[:-2]):
        names = _module_names(path, index, layout)
        for name, part in zip(names, np.split(b[index], len(names), axis=-1), strict=True):
            yield name, a[index], part


def _read_kernel(path: str, shapes: Shapes, kinds: str, tensors: Tensors, layers: set[str]) -> Any:
    """(a, b) of a kernel, stacked as it is; None if it has no adapter. Takes its modules out of `layers`."""
    shape = shapes[path]
    found: dict[tuple[int, ...], tuple[np.ndarray, np.ndarray]] = {}
    for index in np.ndindex(shape[: len(shape) - len(kinds)]):
        for layout in layouts_of(shapes):
            names = _module_names(path, index, layout)
            present = [name for name in names if name in layers]
            if present:
                found[index] = _joined([_pair(name, tensors) if name in layers else None for name in names])
                layers.difference_update(present)
    if not found:
        return None
    rank = max(a.shape[1] for a, _ in found.values())
    (a_shape, b_shape) = adapter_shapes(shape, kinds, rank)
    stack_a, stack_b = np.zeros(a_shape, np.float32), np.zeros(b_shape, np.float32)
    for index, (a, b) in found.items():
        if a.shape[0] != a_shape[-2] or b.shape[1] != b_shape[-1]:
            raise UserError(
                f"the adapter of {path} is of {a.shape[0]} x {b.shape[1]}, and the kernel is {a_shape[-2]} x {b_shape[-1]}"
            )
        stack_a[index][:, : a.shape[1]], stack_b[index][: b.shape[0]] = a, b
    return stack_a, stack_b


def _pair(name: str, tensors: Tensors) -> tuple[np.ndarray, np.ndarray]:
    arrays = []
    for part in "AB":
        tensor = tensors.get(f"{PREFIX}{name}.lora_{part}.weight")
        if tensor is None or len(tensor.shape) != 2:
            raise UserError(f"the adapter of {name} has no matrix lora_{part}.weight; write it again with PEFT")
        arrays.append(np.asarray(tensor.load(), np.float32).T)
    if arrays[0].shape[1] != arrays[1].shape[0]:
        raise UserError(f"the adapter of {name} has rank {arrays[0].shape[1]} in lora_A and {arrays[1].shape[0]} in lora_B")
    return arrays[0], arrays[1]


def _joined(pairs: list[tuple[np.ndarray, np.ndarray] | None]) -> tuple[np.ndarray, np.ndarray]:
    """The adapter of a fused kernel, of those of its equal parts; None is a part without one."""
    given = [pair for pair in pairs if pair is not None]
    width = given[0][1].shape[1]
    if len(given) == len(pairs) and all(np.array_equal(pair[0], given[0][0]) for pair in given):
        return given[0][0], np.concatenate([b for _, b in given], axis=1)
    rows, done = sum(b.shape[0] for _, b in given), 0
    b_all = np.zeros((rows, len(pairs) * width), np.float32)
    for i, pair in enumerate(pairs):
        if pair is not None:
            b_all[done : done + pair[1].shape[0], i * width : (i + 1) * width] = pair[1]
            done += pair[1].shape[0]
    return np.concatenate([a for a, _ in given], axis=1), b_all


def _whole_names(path: str, shapes: Shapes, layout: str) -> dict[str, list[str]]:
    """{official name, or our own: the names in the layout} of a parameter's tensors."""
    if layout == OWN:
        return {path: [path.replace("/", ".")]}
    depth = shapes["blocks/attention/qkv/bias"][0]
    theirs = [name for name, _ in official.parts(path, shapes[path])]
    return {name: [name] if layout == "official" else diffusers_dit.names(name, depth) for name in theirs}


def _whole_tensors(path: str, x: np.ndarray, layout: str, shapes: Shapes, network: Any) -> Iterator[tuple[str, np.ndarray]]:
    """(name, tensor) of a parameter that was trained whole."""
    arrays = {path: x} if layout == OWN else official.one_to_theirs(path, x, network.patch_size)
    for name, names in _whole_names(path, shapes, layout).items():
        fused = len(names) == 3 and ".attn.qkv." in name
        parts = np.split(arrays[name], 3) if fused else [arrays[name]] * len(names)
        yield from zip(names, parts, strict=True)


def _read_whole(path: str, others: dict[str, Tensor], shapes: Shapes, network: Any) -> Any:
    """A parameter that was trained whole; None if it is not in the file. Takes its tensors out of `others`."""
    for layout in layouts_of(shapes):
        groups = _whole_names(path, shapes, layout)
        if all(f"{PREFIX}{name}" in others for names in groups.values() for name in names):
            arrays = {}
            for name, names in groups.items():
                loaded = [np.asarray(others.pop(f"{PREFIX}{each}").load()) for each in names]
                arrays[name] = np.concatenate(loaded) if len(loaded) == 3 and ".attn.qkv." in name else loaded[0]
            rows, shape = next(iter(arrays.values())).shape[:1], shapes[path]
            own = (*rows, *shape[1:]) if path == getattr(network, "label_table", None) else shape  # of other classes
            if layout != OWN:
                return official.one_to_ours(path, own, arrays)
            if arrays[path].shape != own:
                raise UserError(f"the adapter's {path} is {arrays[path].shape}, and the network's is {shape}")
            return arrays[path]
    return None


def _whole(number: float) -> float | int:
    return int(number) if float(number).is_integer() else number
