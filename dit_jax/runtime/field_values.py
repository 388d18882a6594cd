"""Values of a config's fields from texts, by the types that a constructor's annotations allow."""

import ast
import decimal
import math
import types
import typing
from collections.abc import Sequence
from typing import Any, NamedTuple

NONE: type = type(None)
WORDS_FOR_NONE = ("", "none", "null")
WORDS_FOR_BOOL = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}
LARGEST_EXPONENT = 30
_DESCRIPTIONS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", tuple: "a tuple, as in (1,2)"}


class FieldType(NamedTuple):
    """What a field may hold.

    Fields:
        allowed: of bool, int, float, str, tuple and NoneType; any Python literal or text if empty.
        element: of the elements of a tuple; any literal if empty.
    """

    allowed: tuple[type, ...] = ()
    element: tuple[type, ...] = ()

    @classmethod
    def of_annotation(cls, annotation: Any) -> "FieldType":
        """The types that `int | None`, `tuple[int, ...]` and the like name; empty for `Any` and for classes."""
        origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
        if origin in (typing.Union, types.UnionType):
            found = [cls.of_annotation(part) for part in parts]
            return cls(_unique(t for x in found for t in x.allowed), _unique(t for x in found for t in x.element))
        if origin is typing.Literal:
            return cls(_unique(map(type, parts)))
        if (origin or annotation) in (tuple, list, Sequence):
            return cls((tuple,), _unique(t for part in parts if part is not ... for t in cls.of_annotation(part).allowed))
        if annotation is None:
            return cls((NONE,))
        return cls((annotation,)) if annotation in (bool, int, float, str, NONE) else cls()

    @classmethod
    def of_value(cls, value: Any) -> "FieldType":
        """The type of a value that a field has already."""
        if isinstance(value, (tuple, list)):
            return cls((tuple,), _unique(map(type, value)))
        return cls.of_annotation(type(value)) if value is not None else cls()

    def optional(self) -> "FieldType":
        return self._replace(allowed=_unique((*self.allowed, NONE))) if self.allowed else self

    def describe(self) -> str:
        """ "a whole number or None"."""
        return " or ".join(_DESCRIPTIONS.get(t, "None") for t in self.allowed)

    def python(self) -> str:
        """ "int | None", as in Python."""
        if not self.allowed:
            return "Any"
        names = {NONE: "None", tuple: f"tuple[{' | '.join(t.__name__ for t in self.element)}, ...]" if self.element else "tuple"}
        return " | ".join(names.get(t, t.__name__) for t in self.allowed)

    def parse(self, text: str) -> Any:
        """The value that a text means: "" and None, true and false, 1e3 as an int where no digit is lost, (1,2) or 1,2.

        Raises:
            ValueError: none of the types has such a value.
        """
        word = text.strip().lower()
        if not self.allowed:
            return None if word in WORDS_FOR_NONE else _literal(text.capitalize() if word in ("true", "false") else text)
        if NONE in self.allowed and word in WORDS_FOR_NONE:
            return None
        if bool in self.allowed and word in WORDS_FOR_BOOL:
            return WORDS_FOR_BOOL[word]
        for convert, of_type in ((whole_number, int), (_number, float)):
            if of_type in self.allowed:
                try:
                    return convert(text)
                except ValueError:
                    continue
        if tuple in self.allowed:
            return self._parse_tuple(text)
        if str in self.allowed:
            return text
        raise ValueError(text)

    def _parse_tuple(self, text: str) -> tuple:
        found = _literal(text) if text.strip() else ()
        if isinstance(found, str):  # a,b without quotes
            if (found[0], found[-1]) not in (("(", ")"), ("[", "]")) and set(found) & set("()[]{}"):
                raise ValueError(text)
            found = [part.strip() for part in found.strip("()[]").split(",") if part.strip()]
        elements = tuple(found) if isinstance(found, (tuple, list)) else (found,)
        return tuple(FieldType(self.element).parse(str(x)) for x in elements) if self.element else elements


def _unique(found) -> tuple[type, ...]:
    return tuple(dict.fromkeys(found))


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text.strip())
    except (SyntaxError, ValueError):
        return text


def _number(text: str) -> float:
    number = float(text)
    if math.isnan(number):
        raise ValueError(text)
    return number


def whole_number(text: str) -> int:
    """The integer that a text means: 1000, 1_000, 0x10, and 1e3 where no digit is lost.

    Raises:
        ValueError: it means none.
    """
    try:
        return int(text, 0)  # 1_000 and 0x10 too
    except ValueError:
        pass
    try:
        number = decimal.Decimal(text.strip())
    except decimal.InvalidOperation:
        raise ValueError(text) from None
    if not number.is_finite() or number.adjusted() > LARGEST_EXPONENT or number != number.to_integral_value():
        raise ValueError(text)
    return int(number)
