"""Random weights of the metrics' networks under their published names, and test images."""

from functools import lru_cache

import numpy as np
from dit_files import held

from dit_jax.interop.inception import LAYOUT

DINOV2 = {"plain": (0, False), "registers": (4, False), "gated": (0, True)}  # kind -> (register tokens, SwiGLU)


@lru_cache
def inception() -> dict[str, np.ndarray]:
    """Random weights with Kaiming scale: with PyTorch's initialization all features are nearly equal."""
    rng, found = np.random.default_rng(0), {}
    for name, shape in LAYOUT.items():
        if name.endswith("conv.weight") or name == "fc.weight":
            found[name] = rng.standard_normal(shape, np.float32) * np.float32(np.sqrt(2 / np.prod(shape[1:])))
        elif name.endswith(("bn.weight", "running_var")):
            found[name] = rng.uniform(0.7, 1.3, shape).astype(np.float32)
        else:
            found[name] = rng.normal(0, 0.1, shape).astype(np.float32)
    return found


@lru_cache
def dinov2(kind: str, width: int = 128, depth: int = 2, grid: int = 37) -> dict[str, np.ndarray]:
    """Random weights in the published layout, with two heads of 64."""
    registers, gated = DINOV2[kind]
    hidden = 4 * width
    into, out = ("w12", "w3") if gated else ("fc1", "fc2")
    linears = {
        "attn.qkv": (3 * width, width),
        "attn.proj": (width, width),
        f"mlp.{into}": (hidden * (1 + gated), width),
        f"mlp.{out}": (width, hidden),
    }
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, grid * grid + 1, width),
        "mask_token": (1, width),
        "patch_embed.proj.weight": (width, 3, 14, 14),
        "patch_embed.proj.bias": (width,),
    }
    if registers:
        shapes["register_tokens"] = 1, registers, width
    for i in range(depth):
        for name, shape in linears.items():
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
        shapes |= {
            f"blocks.{i}.{name}": (width,)
            for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1.gamma", "ls2.gamma")
        }
    shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
    rng, found = np.random.default_rng(1), {}
    for name, shape in shapes.items():
        scale = 0.05 if name.endswith(".weight") and len(shape) > 1 else 0.5
        found[name] = (rng.standard_normal(shape) * scale + ("norm" in name and name.endswith("weight"))).astype(np.float32)
    return found


def tensors(arrays, **changes):
    """Arrays as readable tensors, with changes by name (__ for a dot); None removes a tensor."""
    changed = arrays | {name.replace("__", "."): value for name, value in changes.items()}
    return {name: held(array) for name, array in changed.items() if array is not None}


def photographs(height: int, width: int) -> np.ndarray:
    """uint8 [2, height, width, 3]: crops of the photograph of a temple that scikit-learn carries."""
    from sklearn.datasets import load_sample_image

    image = load_sample_image("china.jpg")
    return np.stack([image[:height, :width], image[60 : 60 + height, 250 : 250 + width]])
