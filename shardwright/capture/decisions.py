"""Decisions by values of tensors: what Python decides by a value that is computed in the captured callable.

A capture has no values, so it takes one way (``if (x < 0).any():``) and says which: the assumption. The program compares it
with what was decided by, whole on every rank, at the same place. Where it differs, the call is undone and repeated with the
program of the other way. So there is a program per sequence of decisions.

Invariants:

- The way that a program takes is determined by its decisions, in their order: the rest of what Python reads is in the key.
- A callable that raises is a way, too: its program computes what precedes, then the same error is raised.
"""

from __future__ import annotations

import copy
import dis
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from shardwright.base.opaque import FUNCTION, OpaqueFunction
from shardwright.base.operators import NEGATES, USUALLY_HOLDS
from shardwright.base.torch_private import FakeTensor, pytree
from shardwright.base.user_code import is_users, user_source
from shardwright.capture.recorded import Recorded
from shardwright.capture.refusals import refuse
from shardwright.capture.size_stand_ins import SizeStandIn
from shardwright.errors import CaptureError

MOST = 128  # decisions of one capture
_TRIES = 4  # captures that look for a way that can be captured
_TORCH = os.path.dirname(torch.__file__)
_CHECKING = tuple(os.path.join(_TORCH, path) for path in (f"distributions{os.sep}", f"nn{os.sep}", "__init__.py"))


class OtherWay(Exception):
    """The callable decides otherwise than its program assumes.

    Args:
        decided: the decisions, up to the first one that differs.
    """

    def __init__(self, decided: tuple[Any, ...]):
        super().__init__(decided)
        self.decided = decided


class UnknownError(BaseException):
    """Ends a way of the callable at an integer that it reads and that no call has told yet."""


class Decisions:
    """The decisions of one capture.

    Args:
        assumed: how the first of them go; the rest is guessed. Booleans, and integers that the callable reads.

    Attributes:
        taken: how each of them went.
        sources: the user's lines that decided.
        texts: tensors whose values are in a text, by the text that stands for them: how the values are formatted.
        error: what the callable raised on this way.
        count: how many tensors they add to the result.
    """

    def __init__(self, assumed: Sequence[Any] = ()):
        self.assumed = tuple(assumed)
        self.begin()

    def begin(self) -> None:
        """Forgets what an earlier run of the callable decided."""
        self.taken: list[Any] = []  # ``None`` for an integer that ends the way
        self.sources: list[str] = []
        self.texts: dict[str, Callable[[Tensor], str]] = {}
        self.error: BaseException | None = None
        self.count = 0
        self.likely: dict[int, tuple[Tensor, int]] = {}  # guesses of integers, by the id of the tensor that has one
        self._first = MOST
        self._functions: list[OpaqueFunction] = []  # recorded calls name them by number, which keeps nothing alive
        self._tensors: list[Tensor] = []
        self._printed: list[Tensor] = []
        self._known: dict[tuple[int, int, bool], tuple[Tensor, Any]] = {}

    def decide(self, tensor: Tensor) -> bool:
        """Decides by a tensor of one element, as assumed or as is likely. The same tensor decides the same again."""
        return bool(self._decided(tensor, True, _likely))

    def integer(self, tensor: Tensor, guess: int | None = None) -> int:
        """Reads an integer, which is a decision, too: there is a program for each value.

        Args:
            tensor: of one element.
            guess: what it is if no call has told; without one, the way ends here and the first call tells.

        Raises:
            UnknownError: it is not known yet.
        """
        if guess is None:
            guess = next((self.likely[id(t)][1] for t in (tensor, tensor._base) if id(t) in self.likely), None)
        found = self._decided(tensor, False, lambda tensor: guess)
        if found is None:
            raise UnknownError
        return int(found)

    def _decided(self, tensor: Tensor, as_truth: bool, guess: Callable[[Tensor], Any]) -> Any:
        key = (id(tensor), tensor._version, as_truth)
        if key in self._known:
            return self._known[key][1]
        if len(self.taken) >= MOST:
            raise refuse(
                f"a captured callable decides more than {MOST} times by values of tensors",
                "Compute both ways and select by torch.where, or move the loop out of the callable; for experts of "
                'transformers\' models, call model.set_experts_implementation("batched_mm")',
            )
        at = len(self.taken)
        decided = self.assumed[at] if at < len(self.assumed) else guess(tensor)
        value = tensor.detach().reshape(())
        value = torch.ne(value, 0) if as_truth else value.clone()
        self._functions.append(self._comparison(at))
        self._tensors += FUNCTION([value], self._functions[-1].number)
        self.taken.append(decided)
        self.sources.append(user_source())
        self._known[key] = (tensor, decided)
        return decided

    def text(self, tensor: Tensor, formatted: Callable[[Tensor], str]) -> str:
        """Returns a text that stands for the values of a tensor, in the message of an error."""
        name = f"<tensor {len(self.texts)} of the captured callable>"
        self.texts[name] = formatted
        self._printed.append(tensor.detach().clone())
        return name

    def fail(self, error: BaseException) -> None:
        """Takes notice of an error that ends the callable; raises it if it is not one of this way of the callable."""
        if isinstance(error, UnknownError):
            self.error = error.with_traceback(None)
            return
        if not self.taken or not _is_raised(error):
            raise error
        getattr(error, "add_note", str)(f"raised at {_line(error)}")  # from Python 3.11 on
        self.error = error.with_traceback(None)
        self.error.__cause__ = self.error.__context__ = None

    def with_result(self, result: Any) -> Any:
        """Adds the tensors that were decided by to a result, behind what the callable returns.

        Raises:
            CaptureError: the size of a result depends on values, or a text with such went elsewhere than into an error.
        """
        ragged = next((leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, SizeStandIn)), None)
        if ragged is not None:
            raise refuse(f"a result has a size that depends on values: it is made at {ragged.source}", ragged.instead)
        if self._printed and self.error is None:
            raise refuse(
                "a captured callable makes a text of the values of a tensor that is computed",
                "Return the tensor and print it outside",
            )
        made, self._known, self.likely = (*self._tensors, *self._printed), {}, {}
        self._tensors, self._printed = [], []
        self.count = len(made)
        return (result, made) if made else result

    # -- in a call --------------------------------------------------------------------------------------------------------

    def compare_from(self, first: int | None) -> None:
        """Says from which decision on a running program compares them; ``None``: none, as when it computes again."""
        self._first = MOST if first is None else first

    def _comparison(self, at: int) -> OpaqueFunction:
        """Returns the operator that compares a decision with the assumption, before anything runs that relies on it."""

        def compare(value: Tensor) -> Tensor:
            has_value = not isinstance(value, FakeTensor) and not value.is_meta
            if has_value and (at >= self._first or self.taken[at] is None) and (found := value.item()) != self.taken[at]:
                raise OtherWay((*self.taken[:at], found))
            return value.clone()

        return OpaqueFunction(f"decision_{at}", compare)

    def raised(self, outputs: Sequence[Any]) -> BaseException | None:
        """Returns the error that the callable raises on this way, with the values of this call in its message."""
        if self.error is None:
            return None
        try:
            error = copy.copy(self.error)
        except Exception:  # one that is made of other arguments than it keeps
            error = self.error
        values = dict(zip(self.texts, outputs[len(outputs) - len(self.texts) :]))

        def filled(argument: Any) -> Any:
            if not isinstance(argument, str):
                return argument
            argument = argument.replace(FakeTensor.__name__, Tensor.__name__)
            for name, value in values.items():
                argument = argument.replace(name, self.texts[name](value)) if name in argument else argument
            return argument

        error.args = tuple(filled(argument) for argument in self.error.args)
        return error


def explored(captured: Callable[[Decisions], Any], assumed: Sequence[Any] = ()) -> tuple[Any, Decisions]:
    """Captures one way of a callable. A guess that leads to an error, or to what cannot be captured, is taken back.

    Args:
        captured: captures the callable with decisions.
        assumed: how the first decisions go.

    Returns:
        What ``captured`` returned, and the decisions. A way that raises an error only if no other can be captured.

    Raises:
        CaptureError: no way can be captured.
    """
    failed: CaptureError | None = None
    raising: tuple[Any, Decisions] | None = None
    first = tuple(assumed)
    guesses: list[int] = []
    for _ in range(_TRIES):
        decisions = Decisions(first)
        try:
            found = captured(decisions), decisions
        except CaptureError as error:
            failed = failed or error
        else:
            if decisions.error is None or isinstance(decisions.error, UnknownError):
                return found
            raising = raising or found
        ahead = range(max(len(first), len(assumed)), len(decisions.taken))
        guesses += [at for at in ahead if isinstance(decisions.taken[at], bool)]  # those that were not taken back yet
        if not guesses:
            break
        last = guesses.pop()
        first = (*decisions.taken[:last], not decisions.taken[last])
    if raising is not None:
        return raising
    assert failed is not None
    raise failed


def _likely(tensor: Tensor) -> bool:
    """Guesses a decision, by the operator that made the tensor: that all hold, and that a comparison does not."""
    node, negated = Recorded().node(tensor), False
    while node is not None and node.all_input_nodes and getattr(node.target, "overloadpacket", None) in NEGATES:
        node, negated = node.all_input_nodes[0], not negated
    return (node is not None and getattr(node.target, "overloadpacket", None) in USUALLY_HOLDS) != negated


def _frame(error: BaseException) -> Any:
    """Returns the entry of the traceback at which an error was raised."""
    entry: Any = error.__traceback__
    while entry is not None and entry.tb_next is not None:
        entry = entry.tb_next
    return entry


def _is_raised(error: BaseException) -> bool:
    """Tells whether a statement of the callable raises the error, as it would on a single device."""
    entry = _frame(error)
    if entry is None:
        return False
    code = entry.tb_frame.f_code
    statement = dis.opname[code.co_code[entry.tb_lasti]] in ("RAISE_VARARGS", "RERAISE")
    return statement and (is_users(code.co_filename) or code.co_filename.startswith(_CHECKING))


def _line(error: BaseException) -> str:
    entry = _frame(error)
    return f"{os.path.basename(entry.tb_frame.f_code.co_filename)}:{entry.tb_lineno}"
