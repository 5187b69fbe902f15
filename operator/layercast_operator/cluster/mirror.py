"""What the API server told, by kind and key: events and lists in, the newest objects out. Pure.

Events come from a watch that may break; lists come now and then and mend what was missed. Both can be late, so every
object is compared by its resourceVersion (one order per collection), and what was deleted leaves a mark that a list
from before cannot bring back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

MARKS_MAX = 10_000

Object = Mapping[str, Any]
Key = tuple[str, str]
"""Namespace and name."""


def key_of(item: Object) -> Key:
    """Namespace and name of an object."""
    metadata = item.get("metadata") or {}
    return str(metadata.get("namespace") or ""), str(metadata.get("name") or "")


def version_of(item: Object) -> int:
    """The resourceVersion; 0 when there is none that can be compared."""
    text = str((item.get("metadata") or {}).get("resourceVersion") or "")
    return int(text) if text.isdecimal() else 0


@dataclass(slots=True)
class Mirror:
    """All objects of one kind. `version` grows with every change."""

    objects: dict[Key, Object] = field(default_factory=dict)
    listed: bool = False
    """A whole list has been seen once: what is missing is not there."""
    version: int = 0
    _deleted: dict[Key, int] = field(default_factory=dict)

    def take(self, event_type: str, item: Object) -> bool:
        """One event; whether anything is different now."""
        key, version = key_of(item), version_of(item)
        held = self.objects.get(key)
        if held is not None and version_of(held) > version:
            return False
        if event_type == "DELETED":
            self._mark(key, version)
            if self.objects.pop(key, None) is None:
                return False
        elif not self._put(key, item, version):
            return False
        self.version += 1
        return True

    def replace(self, items: Iterable[Object], *, version: int) -> bool:
        """A whole list, true at `version`; whether anything is different now."""
        changed = not self.listed
        there = set()
        for item in items:
            key = key_of(item)
            there.add(key)
            held = self.objects.get(key)
            if held is None or version_of(item) > version_of(held):
                changed |= self._put(key, item, version_of(item))
        for key in [key for key in self.objects if key not in there]:
            if version_of(self.objects[key]) <= version:
                del self.objects[key]
                changed = True
        self.listed = True
        self.version += int(changed)
        return changed

    def _put(self, key: Key, item: Object, version: int) -> bool:
        if key in self._deleted and version <= self._deleted[key]:
            return False
        if self.objects.get(key) == item:
            return False
        self._deleted.pop(key, None)
        self.objects[key] = item
        return True

    def _mark(self, key: Key, version: int) -> None:
        self._deleted.pop(key, None)
        self._deleted[key] = version
        if len(self._deleted) > MARKS_MAX:
            del self._deleted[next(iter(self._deleted))]
