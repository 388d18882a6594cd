"""Writes extractors.npz: features of torch-fidelity's Inception-v3 and of DINOv2's own code, for the weights of metric_networks.

    PYTHONPATH=tests/support python tests/golden/make_extractors.py --dinov2=DIR

DIR is a checkout of github.com/facebookresearch/dinov2; needs torch, torchvision and torch-fidelity.
"""

import argparse
import os
import sys
import tempfile
from functools import partial
from pathlib import Path

import metric_networks
import numpy as np
import torch
from PIL import Image

LAYERS = ("64", "192", "768", "2048", "logits_unbiased")
SIZES = {"shrunk": (331, 217), "enlarged": (64, 50), "unchanged": (299, 299)}
KINDS = {
    "plain": {},
    "registers": {"num_register_tokens": 4, "interpolate_antialias": True, "interpolate_offset": 0.0},
    "gated": {"ffn_layer": "swiglufused"},
}


def nchw(x) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def inception() -> dict[str, np.ndarray]:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/x.pth"
        torch.save({name: torch.from_numpy(array) for name, array in metric_networks.inception().items()}, path)
        network = FeatureExtractorInceptionV3("inception-v3-compat", list(LAYERS), feature_extractor_weights_path=path)
    spatial = []  # ADM's: the graph's mixed_6 is Mixed_6d by torch-fidelity's table of names
    network.Mixed_6d.branch1x1.register_forward_hook(lambda module, args, out: spatial.append(out[:, :7].permute(0, 2, 3, 1)))
    found = {}
    for size, sides in SIZES.items():
        outputs = network(nchw(metric_networks.photographs(*sides)))
        found |= {f"inception/{size}/{name}": output.numpy() for name, output in zip(LAYERS, outputs, strict=True)}
        found[f"inception/{size}/spatial"] = spatial.pop().flatten(1).numpy()
    return {name: array if "unchanged" in name else array[:, ::8] for name, array in found.items()}


def dinov2() -> dict[str, np.ndarray]:
    from dinov2.layers import MemEffAttention, NestedTensorBlock
    from dinov2.models.vision_transformer import DinoVisionTransformer

    found = {}
    for kind, options in KINDS.items():
        network = DinoVisionTransformer(
            img_size=518,
            patch_size=14,
            embed_dim=128,
            depth=2,
            num_heads=2,
            mlp_ratio=6 if kind == "gated" else 4,
            init_values=1.0,
            block_chunks=0,
            block_fn=partial(NestedTensorBlock, attn_class=MemEffAttention),
            **options,
        ).eval()
        network.load_state_dict({name: torch.from_numpy(array) for name, array in metric_networks.dinov2(kind).items()})
        images = [Image.fromarray(x).resize((224, 224), Image.BICUBIC) for x in metric_networks.photographs(256, 300)]
        x = (np.stack(images).astype(np.float32) / 255 - np.float32([0.485, 0.456, 0.406])) / np.float32([0.229, 0.224, 0.225])
        with torch.no_grad():
            found[f"dinov2/{kind}"] = network(nchw(x)).numpy()
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dinov2", required=True)
    os.environ["XFORMERS_DISABLED"] = "1"
    sys.path.insert(0, parser.parse_args().dinov2)
    with torch.no_grad():
        np.savez_compressed(Path(__file__).with_name("extractors.npz"), **inception(), **dinov2())
