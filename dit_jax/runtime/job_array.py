"""The flag --part=i/n: one of n commands that share the work of a verb without talking to each other."""

import re
from dataclasses import dataclass

from dit_jax.errors import UserError

HELP = (
    "As in 0/3: do part 0 of 3 of the work, for arrays of jobs; the parts need a common folder and nothing else. When all are "
    "done, the same command without --part puts them together."
)


@dataclass(frozen=True)
class Part:
    """Part `index`, from 0, of `count`: it takes the items k with k mod count = index."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def of(self, total: int) -> range:
        """The numbers of this part's items, of `total`."""
        return range(self.index, total, self.count)


def parse_part(text: str | None) -> Part | None:
    """The part of a flag's value; None without one.

    Raises:
        UserError: not "i/n" with 0 <= i < n.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if match is None or not int(match[1]) < int(match[2]):
        raise UserError(f"--part={text}: give i/n with i from 0 to n - 1, as in --part=0/3")
    return Part(int(match[1]), int(match[2]))
