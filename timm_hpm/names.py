"""Names in messages: those that a user mistyped, and the first ones of many."""

import difflib
from collections.abc import Iterable


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """Returns the end of an error's message, such as `"; did you mean fc or soft?"`; "" if no name is near."""
    near = difflib.get_close_matches(str(name), known, n=2, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def some(texts: Iterable[str], most: int = 5) -> str:
    """Returns the first of some texts, and an ellipsis if there are more than `most`."""
    texts = list(texts)
    return ", ".join(texts[:most]) + (", ..." if len(texts) > most else "")
