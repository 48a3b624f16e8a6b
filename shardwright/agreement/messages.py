"""Messages that ranks write into the job's store, and the verdict on each set of them."""

from __future__ import annotations

import json
from collections import deque
from typing import Any

from shardwright.agreement.verdict import judge

_KEPT = 32  # verdicts in the store


class Messages:
    """Messages of this rank, and the verdicts that it writes if it arrives last.

    An event ``at`` has these keys: ``m/<at>/<rank>``, a rank's message; ``n/<at>``, how many have been written;
    ``v/<at>``, 1 where the ranks agree and more where they do not; ``w/<at>``, the words of the verdict.
    """

    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size
        self.deletable: deque[str] = deque()  # keys that nobody reads any more
        self._judged: deque[str] = deque()

    def write(self, store: Any, at: str, message: dict[str, Any]) -> int:
        """Writes a message of this rank, and judges if it is the last one.

        Args:
            store: the connection to write through; each thread has one.
            at: the index of the event and the stage of comparison.
            message: what :func:`~shardwright.agreement.verdict.judge` reads.

        Returns:
            How many ranks have written.
        """
        store.set(f"m/{at}/{self.rank}", json.dumps(message))
        arrived: int = store.add(f"n/{at}", 1)
        if arrived == self.size:
            keys = [f"m/{at}/{rank}" for rank in range(self.size)]
            self.publish(store, at, judge([json.loads(text) for text in store.multi_get(keys)]))
            self.deletable.extend(keys)
            self._judged.append(at)
            if len(self._judged) > _KEPT:  # all ranks have been in later comparisons
                old = self._judged.popleft()
                self.deletable.extend(f"{kind}/{old}" for kind in "nvwa")
        return arrived

    def publish(self, store: Any, at: str, verdict: str) -> None:
        """Writes a verdict for all ranks, unless there is one already."""
        if verdict == "=":
            store.add(f"v/{at}", 1)
        elif store.compare_set(f"w/{at}", "", verdict).decode() == verdict:
            store.add(f"v/{at}", 2)
