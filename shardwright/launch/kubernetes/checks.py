"""Checks mappings key by key: unknown keys, types and allowed values, each with the place where it stands."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any

from shardwright.errors import Problems

_NAMES = {str: "a string", int: "a whole number", bool: "true or false", dict: "a mapping", list: "a list"}


class Checked:
    """A mapping that is read key by key.

    Args:
        value: what stands there.
        place: where it stands: ``spec.runPolicy``.
        problems: gets what is wrong.
        keys: the keys that there may be.
    """

    def __init__(self, value: Any, place: str, problems: Problems, keys: Collection[str]):
        self.place, self.problems = place, problems
        self.values: Mapping[str, Any] = {}
        if not isinstance(value, Mapping):
            problems.add(f"{place or 'the file'} is {value!r}; write a mapping with {', '.join(keys)}")
            return
        self.values = value
        for key in value:
            if key not in keys:
                problems.add(f"{self.at(str(key))}: there is no such key; {meant(str(key), keys)}")

    def at(self, key: str) -> str:
        """Returns the place of a key."""
        return f"{self.place}.{key}" if self.place else key

    def get(self, key: str, kind: type, default: Any = None, allowed: Collection[Any] = (), least: int | None = None) -> Any:
        """Returns the value of a key, or the default where there is none or a wrong one.

        Args:
            key: the key.
            kind: the type of its value.
            default: what counts where there is none.
            allowed: the values that it may have; none: any.
            least: the smallest number that it may be.
        """
        value = self.values.get(key)
        fits: bool = isinstance(value, kind) and not (kind is int and isinstance(value, bool))
        if value is None:
            return default
        if not fits:
            self.problems.add(f"{self.at(key)} is {value!r}; write {_NAMES[kind]}")
        elif allowed and value not in allowed:
            self.problems.add(f"{self.at(key)} is {value!r}; {meant(str(value), [str(v) for v in allowed])}")
        elif least is not None and value < least:
            self.problems.add(f"{self.at(key)} is {value}; write {least} or more")
        else:
            return value
        return default


def meant(word: str, words: Collection[str]) -> str:
    """Returns the advice to write another word: the one that is much like it, or one of all."""
    lower = {known.lower(): known for known in words}
    close = get_close_matches(word.lower(), list(lower), 1)
    shown = [known or '""' for known in words]
    return f"did you mean {lower[close[0]]}?" if close and lower[close[0]] else f"write one of {', '.join(shown)}"
