"""Values of a config's fields from the texts of a command line."""

from typing import Any, Literal

import pytest

from dit_jax.runtime.field_values import FieldType

A = FieldType.of_annotation


@pytest.mark.parametrize(
    "annotation, text, value",
    [
        (int, "7", 7),
        (int, "1e3", 1000),
        (int, "1_000", 1000),
        (int, "12.0", 12),
        (int, "123456789012345678901", 123456789012345678901),
        (int | None, "None", None),
        (int | None, "", None),
        (int | None, "3", 3),
        (float, "1", 1.0),
        (float, "1e-3", 1e-3),
        (bool, "true", True),
        (bool, "False", False),
        (bool, "0", False),
        (str, "true", "true"),
        (str, "", ""),
        (str, "None", "None"),
        (str | None, "None", None),
        (tuple[int, ...], "(1,2)", (1, 2)),
        (tuple[int, ...], "1,2", (1, 2)),
        (tuple[int, ...], "7", (7,)),
        (tuple[int, ...], "1e3,2", (1000, 2)),
        (tuple[int, ...], "()", ()),
        (tuple[str, ...], "a,b", ("a", "b")),
        (tuple, "1,'a'", (1, "a")),
        (float | tuple[float, ...], "0.5", 0.5),
        (float | tuple[float, ...], "1,2", (1.0, 2.0)),
        (float | tuple[float, ...] | None, "none", None),
        (Literal["a", "b"], "a", "a"),
        (Any, "(1, 'a')", (1, "a")),
        (Any, "true", True),
        (Any, "text", "text"),
    ],
)
def test_values(annotation, text, value):
    """A number that arrives as text, another number, or another type; an optional field that cannot be emptied."""
    found = A(annotation).parse(text)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "annotation, text, said",
    [
        (int, "1.5", "a whole number"),
        (int, "1e-3", "a whole number"),
        (int, "None", "a whole number"),
        (int, "1e999", "a whole number"),
        (int | None, "x", "a whole number or None"),
        (float, "x", "a number"),
        (float, "nan", "a number"),
        (tuple[int, ...], "(8, 8", "a tuple, as in (1,2)"),
        (tuple[str, ...], "(a, b", "a tuple, as in (1,2)"),
        (bool, "2", "true or false"),
        (tuple[int, ...], "1,x", "a tuple, as in (1,2)"),
    ],
)
def test_refused(annotation, text, said):
    """A value that is rounded, or that is nothing of the kind."""
    with pytest.raises(ValueError, match=r".*"):
        A(annotation).parse(text)
    assert A(annotation).describe() == said


def test_types_of_values():
    """A field without an annotation that changes its type."""
    assert FieldType.of_value((1, 2)).parse("3,4") == (3, 4)
    assert FieldType.of_value(1.0).parse("3") == 3.0
    assert FieldType.of_value(True).optional().parse("None") is None
    assert FieldType.of_value(None).parse("3") == 3
