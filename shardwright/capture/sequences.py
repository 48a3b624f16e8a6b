"""Sequences of several lengths: packed ones and recurrent networks on them, and the CTC loss, each as one opaque operator.

Sizes that depend on values have no place in a graph. A packed sequence is therefore the padded tensor and the lengths, while
the callable is captured: what reads it packs it, on every rank as on a single device, and pads what it returns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from shardwright.base.opaque import FUNCTION, OpaqueFunction
from shardwright.base.operators import RECURRENT
from shardwright.base.torch_private import FakeTensor, variable_functions
from shardwright.base.user_code import user_source
from shardwright.capture.decisions import Decisions
from shardwright.capture.ragged import Call, RaggedFunctions
from shardwright.capture.size_stand_ins import SizeStandIn, like


class Packed(SizeStandIn):
    """A stand-in for the data of a packed sequence.

    Args:
        padded: the sequences, by time and sequence.
        lengths: of the sequences, in descending order.
        is_zero: whether the padding is zero.
    """

    what = "the data of a packed sequence"
    instead = "Compute it of the padded tensor, before packing or after padding again"

    def __init__(self, padded: Tensor, lengths: Tensor, is_zero: bool = False):
        self.padded, self.lengths, self.is_zero = padded, lengths, is_zero
        self.dtype, self.device, self.requires_grad = padded.dtype, padded.device, padded.requires_grad
        self.is_cuda, self.source = padded.is_cuda, user_source()

    def dim(self) -> int:
        return self.padded.dim() - 1

    def size(self, dim: int) -> int:
        """Returns the size of a dim, other than that of all elements.

        Raises:
            CaptureError: it is that one.
        """
        if dim % self.dim() == 0:
            raise self._refused("size(0)")
        return int(self.padded.shape[dim % self.dim() + 1])


class BatchSizes(SizeStandIn):
    """A stand-in for the batch sizes of a packed sequence.

    Args:
        of: the data.
        decisions: read the longest length.
    """

    what = "the batch sizes of a packed sequence"
    instead = "Compute it of the lengths"

    def __init__(self, of: Packed, decisions: Decisions):
        self.of, self.decisions, self.device = of, decisions, torch.device("cpu")

    def __getitem__(self, at: Any) -> int:
        if at != 0:
            raise self._refused("an element")
        return int(self.of.padded.shape[1])

    def size(self, dim: int = 0) -> _Longest:
        return _Longest.of(self)


class _Longest(int):
    """The longest length of a packed sequence, as long as the padded tensor; what it really is is read where it is needed."""

    sizes: BatchSizes

    @classmethod
    def of(cls, sizes: BatchSizes) -> _Longest:
        made = cls(sizes.of.padded.shape[0])
        made.sizes = sizes
        return made

    def read(self) -> int:
        """Reads the length, as a decision."""
        return self.sizes.decisions.integer(self.sizes.of.lengths.max(), int(self.sizes.of.padded.shape[0]))

    def __gt__(self, other: int) -> bool:
        return other < self.sizes.of.padded.shape[0] and self.read() > other

    def __format__(self, form: str) -> str:
        return format(self.read(), form)


class Sequences:
    """Records the functions of sequences that a captured callable calls.

    Args:
        decisions: those by values of tensors.
    """

    def __init__(self, decisions: Decisions):
        self.decisions = decisions
        self.ragged = RaggedFunctions(decisions)
        self.kept: list[OpaqueFunction] = []  # recorded calls name them by number, which keeps nothing alive

    def pack(self, function: Any, padded: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Packed, BatchSizes]:
        """Stands for ``torch._VF._pack_padded_sequence``.

        Args:
            function: that one.
            padded: the sequences.
            lengths: of them.
            batch_first: whether dim 0 is that of the sequences.
        """
        padded = padded.transpose(0, 1) if batch_first else padded
        shape = tuple(padded.shape)

        def check(lengths: Tensor) -> Tensor:
            if not isinstance(lengths, FakeTensor):  # raises what is wrong with them
                packed, sizes = function(torch.empty(shape), lengths.cpu(), False)
                _PAD(packed, sizes, False, 0.0, len(sizes))
            return lengths.clone()

        data = Packed(padded, self._recorded("pack_padded_sequence", check, [lengths]))
        return data, BatchSizes(data, self.decisions)

    def pad(
        self, function: Any, data: Packed, sizes: BatchSizes, batch_first: bool, value: float, longest: Any
    ) -> tuple[Tensor, Tensor]:
        """Stands for ``torch._VF._pad_packed_sequence``.

        Args:
            function: that one.
            data, sizes: the packed sequence.
            batch_first: whether the result has the sequences in dim 0.
            value: of the padding.
            longest: the length of the result.
        """
        padded, steps = data.padded, longest.read() if isinstance(longest, _Longest) else longest
        padded = torch.nn.functional.pad(padded, (0, 0) * (padded.dim() - 1) + (0, steps - padded.shape[0]))
        if not data.is_zero or value != 0:
            there = torch.arange(steps, device=padded.device)[:, None] < data.lengths.to(padded.device)[None]
            padded = torch.where(there.reshape(*there.shape, *(1,) * (padded.dim() - 2)), padded, value)
        return padded.transpose(0, 1) if batch_first else padded, data.lengths.clone()

    def recurrent(self, function: Any, data: Packed, sizes: BatchSizes, hidden: Any, weights: Any, *options: Any) -> Any:
        """Stands for one of torch's recurrent networks on a packed sequence.

        Args:
            function: the network: ``torch._VF.lstm``, ``gru``, ``rnn_tanh`` or ``rnn_relu``.
            data, sizes: the packed sequence.
            hidden: the hidden state before, of an LSTM with the cells.
            weights: of the network, in torch's order.
            options: the arguments after these.
        """
        states = tuple(hidden) if isinstance(hidden, (tuple, list)) else (hidden,)
        steps, count = data.padded.shape[:2]
        _, _, dropout, training, is_bidirectional = options
        width = states[0].shape[-1] * (2 if is_bidirectional else 1)

        def call(padded: Tensor, lengths: Tensor, *rest: Tensor) -> list[Tensor]:
            if isinstance(padded, FakeTensor):
                return [like(padded, (steps, count, width), rest), *(like(state, state.shape, rest) for state in states)]
            packed, sizes = variable_functions._pack_padded_sequence(padded, lengths.cpu(), False)
            before = rest[: len(states)] if isinstance(hidden, (tuple, list)) else rest[0]
            made, *after = function(packed, sizes, before, list(rest[len(states) :]), *options)
            return [variable_functions._pad_packed_sequence(made, sizes, False, 0.0, steps)[0], *after]

        made = self._recorded(function.__name__, call, [data.padded, data.lengths, *states, *weights], dropout and training)
        return Packed(made[0], data.lengths, True), *made[1:]

    def covariance(self, function: Any, tensor: Tensor, **options: Any) -> Any:
        """Stands for ``torch.cov`` and ``torch.corrcoef``, which look at the values of their weights.

        Args:
            function: the one of them.
            tensor, options: its arguments.
        """
        shape = (tensor.shape[0],) * 2 if tensor.dim() == 2 else ()
        dtype = tensor.dtype if tensor.is_floating_point() or tensor.is_complex() else torch.get_default_dtype()
        return self.ragged.ended(Call(function, (tensor,), options), (shape, dtype))

    def ctc_loss(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Stands for the CTC loss, whose graph depends on the lengths.

        Args:
            function: the loss: that of ``torch.nn.functional``, or of ``torch``.
            args, kwargs: its arguments.
        """
        log_probs = args[0] if args else kwargs["log_probs"]
        reduction = args[5] if len(args) > 5 else kwargs.get("reduction", "mean")
        shape = tuple(log_probs.shape[1:-1]) if reduction in ("none", 0) else ()
        return self.ragged.ended(Call(function, args, kwargs), (shape, log_probs.dtype))

    def _recorded(self, name: str, call: Callable[..., Any], tensors: Sequence[Tensor], draws: Any = False) -> Any:
        function = OpaqueFunction(name, call)
        if draws:
            function.tags.add(torch.Tag.nondeterministic_seeded)
        self.kept.append(function)
        return function.with_result(FUNCTION(list(tensors), function.number))


_PACK, _PAD = variable_functions._pack_padded_sequence, variable_functions._pad_packed_sequence
_LOSS = (torch.nn.functional.ctc_loss, torch.ctc_loss)
_RECURRENT = tuple(getattr(variable_functions, name) for name in RECURRENT)
_COVARIANCE = (torch.cov, Tensor.cov, torch.corrcoef, Tensor.corrcoef)
OF_SEQUENCES = (*_COVARIANCE, _PACK, _PAD, *_LOSS, *_RECURRENT)


def handled(function: Any, args: Any) -> str | None:
    """Tells which method of :class:`Sequences` stands for a torch function on these arguments; ``None`` for no one."""
    if function in _RECURRENT:
        return "recurrent" if isinstance(args[0], Packed) else None
    if function in _COVARIANCE:
        return "covariance" if isinstance(args[0], Tensor) else None
    return {_PACK: "pack", _PAD: "pad"}.get(function, "ctc_loss")
