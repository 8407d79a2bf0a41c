"""Names that a user types: an unknown one is an error that says which names there are, and which was meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def check(kind: str, name: str, names: Iterable[str], *, words: str = "") -> None:
    """Raises ValueError if a name is none of those that there are.

    Args:
      kind: what is named, such as "model".
      name: what was typed.
      names: those that there are.
      words: said of them in place of the list.
    """
    if name not in (names := sorted(names)):
        close = " or ".join(map(repr, difflib.get_close_matches(name, names, n=2)))
        meant = f"; did you mean {close}?" if close else ""
        raise ValueError(f"unknown {kind} {name!r}; {words or f'choose from {names}'}{meant}")
