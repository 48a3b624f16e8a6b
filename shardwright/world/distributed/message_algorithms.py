"""Algorithms of collectives made of point-to-point messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shardwright.cost.message_sizes import WINDOW, chunks_of_chain
from shardwright.world.distributed.messages import (
    Algorithm,
    Messenger,
    Reduction,
    _arriving,
    _exhaust,
    _Incoming,
    _others,
    _parts,
    _pieces,
    _receive_into,
    _wait,
    both,
    plain,
)
from shardwright.world.execute.summation import prepare_reduce


def hub_all_reduce(link: Messenger, count: int, how: Reduction, inplace: bool) -> Algorithm:
    """All-reduces ``count`` elements through the first member.

    Args:
        link: the process group.
        count: elements.
        how: how contributions are combined.
        inplace: whether the result may overwrite the argument.
    """
    hub, *others = how.order
    if link.position != hub:
        return _hub_leaf(link, hub, inplace)
    combine = prepare_reduce(how.dtype, how.op, link.size)

    def begin(x: Tensor) -> Any:
        send, receive, tag = link.open()
        x = plain(x)
        result = x if inplace else torch.empty_like(x)
        return result, result.view(-1), send, tag + 1, _Incoming(link, receive, tag, [x.view(-1)], how)

    def finish(state: Any) -> Tensor:
        result, out, send, tag, incoming = state
        _exhaust(incoming.combine(combine, [out]))
        _wait([send([out], member, tag) for member in others])
        return result  # type: ignore[no-any-return]

    return both(begin, finish, continues=True)


def _hub_leaf(link: Messenger, hub: int, inplace: bool) -> Algorithm:
    def begin(x: Tensor) -> Any:
        send, receive, tag = link.open()
        x = plain(x)
        result = x if inplace else torch.empty_like(x)
        return result, receive([result], hub, tag + 1), send([x], hub, tag)

    return both(begin, _finish_two)


def _finish_two(state: Any) -> Tensor:
    result, received, sent = state
    received.wait()
    sent.wait()
    return result  # type: ignore[no-any-return]


def copies_all_reduce(link: Messenger, count: int, how: Reduction, inplace: bool) -> Algorithm:
    """All-reduces ``count`` elements, which each member sends to each other; never in place.

    Args:
        link: the process group.
        count: elements.
        how: how contributions are combined.
        inplace: ignored, since the argument is still being sent.
    """
    others = _others(link)
    combine = prepare_reduce(how.dtype, how.op, link.size)

    def begin(x: Tensor) -> Any:
        send, receive, tag = link.open()
        x = plain(x)
        result = torch.empty_like(x)
        sent = [send([x], member, tag) for member in others]
        memory = link.scratch.take((link.size - 1) * count, how.dtype)
        return result, result.view(-1), _receive_into(link, receive, tag, memory, x.view(-1), how), memory, sent

    def finish(state: Any) -> Tensor:
        result, out, parts, memory, sent = state
        combine(_arriving(parts), out)
        link.scratch.give(memory)
        _wait(sent)
        return result  # type: ignore[no-any-return]

    return both(begin, finish)


def pieces_all_reduce(link: Messenger, count: int, how: Reduction, inplace: bool) -> Algorithm:
    """All-reduces ``count`` elements, of which each member combines a piece, part by part.

    Args:
        link: the process group.
        count: elements.
        how: how contributions are combined.
        inplace: whether the result may overwrite the argument.
    """
    me, others = link.position, _others(link)
    sizes = _pieces(count, link.size)
    parts_of = [_parts(size, how.dtype, link.size) for size in sizes]
    combine = prepare_reduce(how.dtype, how.op, link.size, how.order.index(me) if inplace else 0)
    rounds = [[m for m in others if k < len(parts_of[m])] for k in range(len(parts_of[0]))]  # the first piece is the longest

    def cut(flat: Tensor) -> list[Sequence[Tensor]]:
        return [piece.split(parts) if parts else () for piece, parts in zip(flat.split(sizes), parts_of)]

    def begin(x: Tensor) -> Any:
        send, receive, tag = link.open()
        x = plain(x)
        result = x if inplace else torch.empty_like(x)
        pieces = cut(x.view(-1))
        outs = pieces if inplace else cut(result.view(-1))
        sent = [send([pieces[m][k]], m, tag) for k, members in enumerate(rounds) for m in members]
        return result, outs, (send, receive, tag + 1), _Incoming(link, receive, tag, pieces[me], how), sent

    def finish(state: Any) -> Tensor:
        result, outs, (send, receive, tag), incoming, sent = state
        gathered = []
        done = incoming.combine(combine, outs[me])
        for k, members in enumerate(rounds):
            if (out := next(done, None)) is not None:
                sent += [send([out], member, tag) for member in others]
            gathered += [receive([outs[m][k]], m, tag) for m in members]
        _exhaust(done)
        _wait(sent)
        _wait(gathered)
        return result  # type: ignore[no-any-return]

    return both(begin, finish, continues=True)


def chain_all_reduce(link: Messenger, count: int, how: Reduction, inplace: bool) -> Algorithm:
    """All-reduces ``count`` elements along the members and back; not for sums in another dtype.

    Args:
        link: the process group.
        count: elements.
        how: how contributions are combined.
        inplace: whether the result may overwrite the argument.
    """
    at = how.order.index(link.position)
    before = how.order[at - 1] if at else None
    after = how.order[at + 1] if at + 1 < link.size else None
    number = chunks_of_chain(count * how.dtype.itemsize)
    chunks = [c for c in _pieces(count, number) if c]
    combine = prepare_reduce(how.dtype, how.op, 2, 1 if inplace else 0)

    def begin(x: Tensor) -> Any:
        send, receive, tag = link.open()
        x = plain(x)
        result = x if inplace else torch.empty_like(x)
        pieces = x.view(-1).split(chunks)
        outs = pieces if inplace else result.view(-1).split(chunks)
        memory: Tensor | None = None
        buffers: list[Tensor] = []
        coming: list[Any] = []
        if before is not None:
            memory = link.scratch.take(WINDOW * chunks[0], how.dtype)
            starts = [i % WINDOW * chunks[0] for i in range(len(chunks))]
            buffers = [memory[start : start + size] for start, size in zip(starts, chunks)]
            coming = [receive([buffer], before, tag) for buffer in buffers[:WINDOW]]
        back = [] if after is None else [receive([out], after, tag + 1) for out in outs]
        sent = [] if before is not None else [send([piece], after, tag) for piece in pieces]
        return result, (send, receive, tag), pieces, outs, memory, buffers, coming, back, sent

    def finish(state: Any) -> Tensor:
        result, (send, receive, tag), pieces, outs, memory, buffers, coming, back, sent = state
        onwards = (after, tag) if after is not None else (before, tag + 1)
        for i, (buffer, piece, out) in enumerate(zip(buffers, pieces, outs)):
            coming[i].wait()
            combine((buffer, piece), out)
            sent.append(send([out], *onwards))
            if i + WINDOW < len(buffers):
                coming.append(receive([buffers[i + WINDOW]], before, tag))
        if memory is not None:
            link.scratch.give(memory)
        for work, out in zip(back, outs):
            work.wait()
            if before is not None:
                sent.append(send([out], before, tag + 1))
        _wait(sent)
        return result  # type: ignore[no-any-return]

    return both(begin, finish, continues=True)


def hub_reduce_scatter(link: Messenger, sizes: Sequence[int], how: Reduction) -> Algorithm:
    """Reduce-scatters a flat tensor through the first member."""
    hub, *others = how.order
    me, total, own = link.position, sum(sizes), sizes[link.position]
    combine = prepare_reduce(how.dtype, how.op, link.size)
    receivers = [m for m in others if sizes[m]]

    def begin_leaf(x: Tensor) -> Any:
        send, receive, tag = link.open()
        x = plain(x)
        result = x.new_empty(own)
        received = [receive([result], hub, tag + 1)] if own else []
        return result, [*received, send([x], hub, tag)]

    def begin(x: Tensor) -> Any:
        send, receive, tag = link.open()
        x = plain(x)
        whole = x.new_empty(total)
        return x.new_empty(own), whole, whole.split(list(sizes)), send, tag + 1, _Incoming(link, receive, tag, [x], how)

    def finish(state: Any) -> Tensor:
        result, whole, pieces, send, tag, incoming = state
        _exhaust(incoming.combine(combine, [whole]))
        sent = [send([pieces[m]], m, tag) for m in receivers]
        result.copy_(pieces[me])
        _wait(sent)
        return result  # type: ignore[no-any-return]

    return both(begin_leaf, _finish_all) if me != hub else both(begin, finish, continues=True)


def _finish_all(state: Any) -> Tensor:
    result, works = state
    _wait(works)
    return result  # type: ignore[no-any-return]


def direct_reduce_scatter(link: Messenger, sizes: Sequence[int], how: Reduction) -> Algorithm:
    """Reduce-scatters a flat tensor: each member gets its piece from each other, part by part."""
    me, own, pieces_of = link.position, sizes[link.position], list(sizes)
    parts_of = [_parts(size, how.dtype, link.size) for size in sizes]
    rounds = [[m for m in _others(link) if k < len(parts_of[m])] for k in range(max(map(len, parts_of)))]
    combine = prepare_reduce(how.dtype, how.op, link.size)

    def begin(x: Tensor) -> Any:
        send, receive, tag = link.open()
        pieces = [piece.split(parts) if parts else () for piece, parts in zip(plain(x).split(pieces_of), parts_of)]
        sent = [send([pieces[m][k]], m, tag) for k, members in enumerate(rounds) for m in members]
        return x.new_empty(own), _Incoming(link, receive, tag, pieces[me], how), sent

    def finish(state: Any) -> Tensor:
        result, incoming, sent = state
        _exhaust(incoming.combine(combine, result.split(parts_of[me]) if own else ()))
        _wait(sent)
        return result  # type: ignore[no-any-return]

    return both(begin, finish, continues=True)


def hub_all_gather(link: Messenger, sizes: Sequence[int]) -> Algorithm:
    """All-gathers flat pieces through the member that has the largest."""
    me, total, pieces_of = link.position, sum(sizes), list(sizes)
    hub, own = pieces_of.index(max(pieces_of)), sizes[me]
    others = _others(link)

    def begin_leaf(x: Tensor) -> Any:
        send, receive, tag = link.open()
        out = x.new_empty(total)
        received = receive([out], hub, tag + 1)
        return out, [received, send([plain(x)], hub, tag)] if own else [received]

    def begin(x: Tensor) -> Any:
        send, receive, tag = link.open()
        out = x.new_empty(total)
        pieces = out.split(pieces_of)
        received = [receive([pieces[m]], m, tag) for m in others if pieces_of[m]]
        pieces[me].copy_(plain(x).view(-1))
        return out, send, tag + 1, received

    def finish(state: Any) -> Tensor:
        out, send, tag, received = state
        _wait(received)
        _wait([send([out], member, tag) for member in others])
        return out  # type: ignore[no-any-return]

    return both(begin_leaf, _finish_all) if me != hub else both(begin, finish, continues=True)


def direct_all_gather(link: Messenger, sizes: Sequence[int]) -> Algorithm:
    """All-gathers flat pieces, which each member sends to each other, straight into the result."""
    me, total, pieces_of = link.position, sum(sizes), list(sizes)
    others = _others(link)
    own, senders = sizes[me], [m for m in others if sizes[m]]

    def begin(x: Tensor) -> Any:
        send, receive, tag = link.open()
        x = plain(x)
        out = x.new_empty(total)
        pieces = out.split(pieces_of)
        works = [send([x], member, tag) for member in others] if own else []
        works += [receive([pieces[m]], m, tag) for m in senders]
        pieces[me].copy_(x.view(-1))
        return out, works

    return both(begin, _finish_all)


def direct_exchange(link: Messenger, sent: Sequence[int], received: Sequence[int]) -> Algorithm:
    """Exchanges flat tensors among the members that have something for each other."""
    me, total, takes, gives = link.position, sum(received), list(received), list(sent)
    sources = [m for m in reversed(_others(link)) if received[m]]
    targets = [m for m in _others(link) if sent[m]]
    keeps = sent[me] > 0

    def begin(x: Tensor) -> Any:
        send, receive, tag = link.open()
        out = x.new_empty(total)
        places, pieces = out.split(takes), plain(x).split(gives)
        works = [send([pieces[m]], m, tag) for m in targets]
        works += [receive([places[m]], m, tag) for m in sources]
        if keeps:
            places[me].copy_(pieces[me])
        return out, works

    return both(begin, _finish_all)
