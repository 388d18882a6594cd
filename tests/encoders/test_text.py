"""Text as a condition: tokens of captions, the composition of several encoders, the null condition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.encoders import text, tokens
from dit_jax.encoders.text import Part, Text
from dit_jax.errors import UserError
from dit_jax.parallel.rules import rule_of

SD3 = Text(("clip_l", "clip_g", "t5_xxl"), lengths=(77, 77, 256))


def small(**fields):
    return Text(("bytes",), **{"lengths": (12,), "width": 8} | fields)


def test_null_is_the_encoding_of_the_empty_text():
    """Catches zeros, or the encoding of padding, as the null condition; a null condition without the batch's rows."""
    conditioner = small(depth=1)
    params = conditioner.init(jax.random.key(0))
    batch = conditioner.from_requests({"caption": ["a three", "", "seven"]})
    cond = conditioner.from_batch(params, {}, batch)
    null = conditioner.null(params, {}, cond)
    for name, spec in conditioner.cond_spec().items():
        assert cond[name].shape == null[name].shape == (3, *spec.shape) and cond[name].dtype == spec.dtype
        np.testing.assert_array_equal(null[name], np.broadcast_to(cond[name][1], null[name].shape))
        assert np.abs(cond[name][0] - cond[name][1]).max() > 0.1


def test_pooled_is_the_mean_over_real_tokens():
    """Catches padding that is part of the mean, and positions that are not added."""
    conditioner = small()
    params = conditioner.init(jax.random.key(0))
    cond = conditioner.from_batch(params, {}, conditioner.from_requests({"caption": ["ab"]}))
    own = params["bytes"]
    ids = [ord("a") + 3, ord("b") + 3, 1]
    expected = np.asarray(own["token_embedding"]["embedding"])[ids] + np.asarray(own["position_embedding"])[:3]
    np.testing.assert_allclose(cond["context"][0, :3], expected, rtol=1e-6)
    np.testing.assert_allclose(cond["pooled"][0], expected.mean(0), rtol=1e-5, atol=1e-6)


def parts_of(conditioner, rows=2):
    """Random outputs of each encoder."""
    rng = np.random.default_rng(0)
    found = {}
    for name in conditioner.used:
        channels, pooled = conditioner._widths(name)
        context = jnp.asarray(rng.normal(size=(rows, conditioner.length(name), channels)), jnp.float32)
        own = jnp.asarray(rng.normal(size=(rows, pooled)), jnp.float32) if pooled else None
        found[name] = Part(context, own, jnp.ones(context.shape[:2], bool))
    return found


def test_composition_of_stable_diffusion_3():
    """Catches encoders that are joined along the wrong axis or in another order: [[L G 0], [T5]], and the pooled texts L, G."""
    parts = parts_of(SD3)
    cond = SD3._joined(parts, None)
    assert {name: x.shape[1:] for name, x in cond.items()} == {"context": (333, 4096), "pooled": (2048,)}
    context = np.asarray(cond["context"])
    np.testing.assert_array_equal(context[:, :77, :768], parts["clip_l"].context)
    np.testing.assert_array_equal(context[:, :77, 768:2048], parts["clip_g"].context)
    assert not context[:, :77, 2048:].any()
    np.testing.assert_array_equal(context[:, 77:], parts["t5_xxl"].context)
    np.testing.assert_array_equal(cond["pooled"], np.concatenate([parts["clip_l"].pooled, parts["clip_g"].pooled], axis=1))


def test_missing_and_dropped_encoders_are_zeros():
    """Catches a missing T5 that changes the shapes, and a dropped encoder that drops another one or that of another row."""
    without = Text(SD3.encoders, lengths=SD3.lengths, missing=("t5_xxl",))
    parts = parts_of(SD3)
    whole = SD3._joined(parts, None)
    cond = without._joined({name: parts[name] for name in without.used}, None)
    assert without.cond_spec() == SD3.cond_spec() and "tokens_t5_xxl" not in without.batch_spec()
    assert not np.asarray(cond["context"][:, 77:]).any()
    np.testing.assert_array_equal(cond["context"][:, :77], whole["context"][:, :77])
    dropped = SD3._joined(parts, jnp.array([[True, False, True], [True, True, True]]))
    expected = np.array(whole["context"])
    expected[0, :77, 768:2048] = 0
    np.testing.assert_array_equal(dropped["context"], expected)
    assert not np.asarray(dropped["pooled"][0, 768:]).any() and np.asarray(dropped["pooled"][1, 768:]).all()


def test_requests_are_tokenized_once(capsys):
    """Catches entries that cannot be given again, a cut that is not said or said for each image, and a lost negative prompt."""
    conditioner = small()
    requests = {"caption": np.array(["a very long caption", "x" * 30]), "negative": ["", "bad"]}
    entries = conditioner.from_requests(requests)
    assert entries.keys() == {"tokens_bytes", "negative_tokens_bytes"}
    expected = tokens.Bytes(12)(["", "bad"]).ids
    np.testing.assert_array_equal(entries["negative_tokens_bytes"], expected)
    again = conditioner.from_requests(entries)
    assert all(again[name] is entries[name] for name in entries)
    conditioner.from_requests(requests)
    said = capsys.readouterr().err
    assert said.count("does not see the end of 'a very long caption': ' caption'") == 1 and "of 1 others here" in said


@pytest.mark.parametrize(
    "requests, words",
    [
        ({"label": np.array([3])}, "cannot take labels; give a prompt"),
        ({"caption": "a three"}, "are one text, 'a three'; give a list"),
        ({"caption": ["a", 3]}, "a caption is 3; it must be a text"),
        ({"caption": ["a", "b"], "negative": ["c"]}, "numbers of prompts and of negative prompts differ"),
        ({}, "there is none for bytes; give a prompt"),
        ({"second_label": [1]}, "cannot take second_label"),
    ],
)
def test_requests_that_cannot_be_met(requests, words):
    """Catches labels for a network of text, one text for many images, and requests that are ignored."""
    with pytest.raises(UserError, match=words):
        small().from_requests(requests)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"encoders": ()}, "list one or several"),
        ({"encoders": ("t5",)}, "text encoder 't5' does not exist; choose from bytes, bpe, t5_small"),
        ({"encoders": ("bytes",), "missing": ("bytes",)}, "lists all encoders"),
        ({"encoders": ("bytes",), "missing": ("clip_l",)}, "'clip_l', which is not one of the encoders"),
        ({"encoders": ("clip_l", "clip_g"), "lengths": (77, 20)}, "they must be equal"),
        ({"encoders": ("clip_l", "clip_g"), "lengths": (77,)}, "one length for each of the 2"),
        ({"encoders": ("clip_l",), "weights": ("/x",)}, "write <encoder>=<path>, once for each of clip_l"),
        ({"encoders": ("clip_l", "t5_xl"), "dropout": (0.1, 1.0)}, "give one rate from 0 to below 1"),
        ({"encoders": ("bpe",), "merges": (5,)}, "has 1 ids"),
        ({"encoders": ("bytes",), "lengths": (1,)}, "the length of texts is 1"),
        ({"encoders": ("bytes",), "width": 129, "depth": 1}, "must be a multiple of 64"),
    ],
)
def test_fields_that_do_not_fit(fields, words):
    """Catches lists of encoders that no network could read, which would end in an error of shapes in the step."""
    with pytest.raises(UserError, match=words):
        Text(**fields)


def test_paths_of_pretrained_encoders():
    """Catches an encoder without weights that is drawn at random, and a tokenizer that is looked for in the wrong folder."""
    conditioner = Text(("clip_l", "clip_g", "t5_xxl"), weights=("clip_l=/l", "clip_g=/g"), tokenizers=("clip_g=/tokenizer_2",))
    with pytest.raises(UserError, match=r"no path for t5_xxl; give --config\.conditioner\.weights=t5_xxl="):
        conditioner.weights_of("t5_xxl")
    found = [conditioner.tokenizer_of(name) for name in ("clip_l", "clip_g")]
    assert [(x.path, x.pad) for x in found] == [("/l", text.clip_text.END), ("/tokenizer_2", 0)]


def test_rules_of_the_conditioner_precede_those_of_the_network():
    """Catches a layer of an encoder whose name the network's table has too: two rules, which end the start of a run."""
    rules = ((r"mlp/in/kernel", ("tensor", None)), *small(depth=1).rules)
    assert rule_of("params/conditioner/bytes/blocks/mlp/in/kernel", (1, 8, 32), rules) == ("fsdp", "tensor")
    assert rule_of("params/blocks/mlp/in/kernel", (1, 8, 32), rules) == ("tensor", None)


@pytest.mark.parametrize("name", ["bytes", "bpe", "t5_small", "clip_l", "clip_g"])
def test_the_empty_text_needs_no_files(name):
    """Catches tokens of "" that are not those of the tokenizer, and an unconditional sample that asks for its files."""
    conditioner = Text((name,), lengths=(6,))
    start = [49406] if name.startswith("clip") else []
    end, pad = {"clip_l": (49407, 49407), "clip_g": (49407, 0)}.get(name, (1, 0))
    ids = conditioner.from_requests({"caption": ["", ""], "negative": ["", ""]})
    assert ids.keys() == {f"tokens_{name}", f"negative_tokens_{name}"}
    for x in ids.values():
        assert x.dtype == np.int32 and x.tolist() == [[*start, end, *[pad] * (5 - len(start))]] * 2
    if name in text.TRAINED:
        np.testing.assert_array_equal(conditioner.tokenizer_of(name)([""]).ids, x[:1])
