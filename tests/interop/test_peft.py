"""Adapters in PEFT's layout: read as PEFT merges them, written as PEFT reads them."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from dit_files import arrays, tiny_weights

from dit_jax.build import Run
from dit_jax.convert import formats
from dit_jax.errors import UserError
from dit_jax.interop import diffusers_dit, official, peft
from dit_jax.interop.tensors import open_safetensors

GOLDEN = Path(__file__).parent.parent / "golden" / "peft"
BASE = tiny_weights(depth=2, width=8, heads=2)
SHAPES = {name: tensor.shape for name, tensor in BASE.tensors.items()}
NETWORK = Run(formats.config_of(BASE.sections)).network
TABLE = official.OUR_TABLE


def read(folder, shapes=SHAPES):
    return peft.read(folder, shapes, NETWORK)


def test_merged_as_peft_merges():
    """Catches another order of query, key and value, a transposed matrix, a scale without alpha, a label table left behind."""
    merged = formats.with_adapter(BASE, GOLDEN)
    theirs = diffusers_dit.from_official(official.to_theirs(merged.tensors, 2, 4), depth=2)
    with np.load(GOLDEN / "merged.npz") as expected:
        assert len(expected.files) == 13
        for name in expected.files:
            np.testing.assert_allclose(theirs[name].load(), expected[name], atol=1e-6, err_msg=name)
    unchanged = {name for name, x in arrays(merged).items() if (x == arrays(BASE)[name]).all()}
    assert unchanged == {name for name in SHAPES if not re.search("(qkv|attention/out|mlp/.*)/kernel", name)} - {TABLE}


def random_adapter(classes=4):
    rng = np.random.default_rng(3)
    pairs = {}
    for name in ("blocks/attention/qkv/kernel", "blocks/mlp/in/kernel", "blocks/modulation/linear/kernel"):
        kinds = next(kinds for pattern, kinds in NETWORK.matrices.items() if re.fullmatch(pattern, name))
        shapes = peft.adapter_shapes(SHAPES[name], kinds, 3)
        pairs[name] = tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes)
    whole = {TABLE: (classes + 1, 8), "blocks/mlp/out/bias": SHAPES["blocks/mlp/out/bias"], "final/linear/kernel": (8, 32)}
    return peft.Adapter(pairs, {name: rng.normal(size=shape).astype(np.float32) for name, shape in whole.items()}, 4 / 3)


@pytest.mark.parametrize("layout", peft.LAYOUTS)
def test_written_and_read(tmp_path, layout):
    """Catches a part that the names of one code base cannot bring back, and parameters of other classes."""
    adapter = random_adapter()
    peft.write(tmp_path / "adapter", adapter, layout, SHAPES, NETWORK)
    again = read(tmp_path / "adapter")
    assert (
        again.scale == adapter.scale and again.pairs.keys() == adapter.pairs.keys() and again.whole.keys() == adapter.whole.keys()
    )
    for name, pair in adapter.pairs.items():
        for x, y in zip(pair, again.pairs[name], strict=True):
            np.testing.assert_array_equal(x, y)
    for name, x in adapter.whole.items():
        np.testing.assert_array_equal(x, again.whole[name])
    merged = formats.with_adapter(BASE, tmp_path / "adapter")
    assert merged.sections["model"]["num_classes"] == 4 and merged.origin["lora"]["name"] == "adapter"


def test_what_is_written_is_a_layer_of_the_papers_code(tmp_path):
    """Catches W + s B A that holds for our own reading alone."""
    adapter = random_adapter()
    peft.write(tmp_path / "adapter", adapter, "official", SHAPES, NETWORK)
    tensors = {name: x.load() for name, x in open_safetensors(tmp_path / "adapter" / peft.FILE)[0].items()}
    scale = json.loads((tmp_path / "adapter" / peft.CONFIG).read_text())["lora_alpha"] / 3
    before = official.to_theirs(BASE.tensors, 2, 4)
    after = official.to_theirs(formats.with_adapter(BASE, tmp_path / "adapter").tensors, 2, 4)
    names = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith("lora_A.weight")]
    assert len(names) == 6
    for name in names:
        plain = name.removeprefix("base_model.model.") + ".weight"
        expected = before[plain].load() + scale * tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
        np.testing.assert_allclose(after[plain].load(), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"peft_type": "LOHA"}, "peft_type 'LOHA'"),
        ({"use_dora": True}, "use_dora = True, which is not supported"),
        ({"alpha_pattern": {"to_q": 3}}, "alpha_pattern"),
        ({"r": "2"}, "r is '2'"),
        (None, "has no adapter_config.json"),
    ],
)
def test_settings_that_are_not_read(tmp_path, change, words):
    """Catches an adapter that is merged although it computes something else."""
    shutil.copytree(GOLDEN, tmp_path / "a")
    config = tmp_path / "a" / peft.CONFIG
    if change is None:
        config.unlink()
    else:
        config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(UserError, match=words):
        read(tmp_path / "a")


def test_adapters_of_another_network(tmp_path):
    """Catches adapters that are cut, broadcast or left out where the network differs."""
    deeper, wider = tiny_weights(depth=1, width=8, heads=2), tiny_weights(depth=2, width=16, heads=2)
    for other, words in ((deeper, "no part of this network"), (wider, "is of 8 x 8, and the kernel is 16 x 16")):
        with pytest.raises(UserError, match=words):
            read(GOLDEN, {name: tensor.shape for name, tensor in other.tensors.items()})
    with pytest.raises(UserError, match=r"has no adapter_model.safetensors"):
        read(tmp_path)
