"""PixArt against diffusers' `PixArtTransformer2DModel`, and its weights."""

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from dit_files import held
from flax.traverse_util import unflatten_dict

from dit_jax.interop import pixart
from dit_jax.models.pixart import PixArt

FIELDS = {"patch_size": 2, "depth": 3, "width": 32, "heads": 4, "context_width": 24, "mlp_ratio": 4.0}
SHAPE = (12, 12, 4)


def ours(grid):
    fields = FIELDS | {"position_grid": grid}
    rng = np.random.default_rng(1)
    shapes = pixart.shapes_of(PixArt(**fields, out_channels=8), 4)
    return fields, {path: held(0.15 * rng.standard_normal(shape).astype(np.float32)) for path, shape in shapes.items()}


@pytest.mark.parametrize("grid", [None, (3, 3)])
def test_round_trip(grid):
    """Catches a tensor that is lost or transposed, and a scale of positions that the config does not carry."""
    fields, tensors = ours(grid)
    theirs, config = pixart.write(tensors, "diffusers", {"name": "pixart", **fields}, SHAPE)
    assert pixart.recognises(theirs, "diffusers") and not pixart.recognises(theirs, "official")
    back, sections = pixart.read(theirs, "diffusers", "a file", config)
    assert all(sections["model"][name] == fields[name] for name in fields if name != "mlp_ratio")
    for path, tensor in tensors.items():
        np.testing.assert_array_equal(back[path].load(), tensor.load())


@pytest.mark.parametrize("grid", [None, (3, 3)])
def test_equals_diffusers(grid):
    """Catches a norm before the cross-attention, padding that is attended to, and vectors that are added to the wrong places."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    fields, tensors = ours(grid)
    theirs, config = pixart.write(tensors, "diffusers", {"name": "pixart", **fields}, SHAPE)
    module = diffusers.PixArtTransformer2DModel(**{name: value for name, value in config.items() if name[0] != "_"}).eval()
    module.load_state_dict({name: torch.tensor(x.load()) for name, x in theirs.items()}, strict=True)
    rng = np.random.default_rng(0)
    x, context = rng.standard_normal((2, *SHAPE)).astype(np.float32), rng.standard_normal((2, 7, 24)).astype(np.float32)
    t, mask = np.array([3.0, 721.5], np.float32), np.arange(7) < np.array([[7], [3]])
    with torch.no_grad():
        expected = module(
            torch.tensor(x).permute(0, 3, 1, 2),
            torch.tensor(context),
            torch.tensor(t),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            encoder_attention_mask=torch.tensor(mask),
            return_dict=False,
        )[0]
    params = unflatten_dict({path: jnp.asarray(tensor.load()) for path, tensor in tensors.items()}, sep="/")
    for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 0.05)):
        net = PixArt(**fields, out_channels=8, dtype=dtype)
        output = net.apply({"params": params}, x, t, {"context": context, "context_mask": mask})
        assert output.dtype == jnp.float32
        assert tiny.distance(output, expected.permute(0, 2, 3, 1).numpy()) < tolerance
