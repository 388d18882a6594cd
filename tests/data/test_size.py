"""Sizes on the command line."""

import pytest

from dit_jax.data.size import parse_size, size_text
from dit_jax.errors import UserError


def test_sizes_are_parsed_height_first():
    """Catches width before height, and a text that does not come back from its size."""
    for text, size in (("256", (256, 256)), ("256x384", (256, 384)), ("1x20", (1, 20))):
        assert parse_size(text) == size and size_text(size) == text


@pytest.mark.parametrize(
    "text",
    ["", "x", "256x", "x256", "256x384x3", "-8", "8.0", " 8", "8\n", "0", "0x8", "8x0", "8X9", "1e2", "\N{SUPERSCRIPT TWO}"],
)
def test_other_texts_are_refused(text):
    """Catches what int() takes and no size is, a side of 0, and an error without the value or the remedy."""
    with pytest.raises(UserError) as error:
        parse_size(text, "--size")
    assert f"--size={text}" in str(error.value) and "256x384" in str(error.value)
