"""Loads a checkpoint into a model and what trains it; where anything does not fit, nothing is changed."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from shardwright.checkpoint.folder import recover
from shardwright.checkpoint.index import DTYPES
from shardwright.checkpoint.ranks import agree, fail_together, from_all_ranks, in_words, rank_and_size
from shardwright.checkpoint.reading import Wanted, overlaps, shares
from shardwright.checkpoint.source import Source, find_source, open_source, renamed
from shardwright.checkpoint.states import check_random_state, put_together, set_random_state
from shardwright.checkpoint.tensors import Bounds, held, local, named_tensors, names_of_parameters, parts_of, whole
from shardwright.errors import CheckpointError
from shardwright.parameters.handles import current
from shardwright.parameters.placements import _alike, _like


class Loaded(NamedTuple):
    """The content of a checkpoint beside what was loaded: its step, and the user's extra data."""

    step: int
    extra: dict[str, Any]


def load(
    folder: str | os.PathLike[str], *, model: Any = None, optimizer: Any = None, scheduler: Any = None, scaler: Any = None,
    loader: Any = None, step: int | None = None, random: bool = True,
) -> Loaded:  # fmt: skip
    """Loads a checkpoint of any plan and any number of ranks; every rank of a job makes this call.

    A rank reads what it holds, and what it reads is verified. If anything does not fit, nothing is changed.

    Args:
        folder: what :func:`save` was given, or the folder of one step.
        model: a module or net of the same parameters and buffers, or a dict of them as they were saved.
        optimizer: of the same kind and groups, or a dict of them.
        scheduler, scaler, loader: what has a ``load_state_dict``.
        step: which one; ``None``: the newest.
        random: whether the random generators are set to what they were.

    Returns:
        The step and the extra data that were given to :func:`save`.

    Raises:
        CheckpointError: names, shapes or dtypes differ, or files are missing or damaged; all is listed.
        TypeError: no module, no optimizer.

    >>> import tempfile
    >>> from shardwright.checkpoint.save import save
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = save(folder, model=nn.Linear(2, 2), step=3, extra={"epoch": 1})
    ...     load(folder, model=nn.Linear(2, 2))
    Loaded(step=3, extra={'epoch': 1})
    """
    agree("load", folder=str(Path(folder).absolute()), step=step, model=in_words(model), optimizer=in_words(optimizer))
    models, optimizers = parts_of(model, "model", nn.Module), parts_of(optimizer, "optimizer", Optimizer)
    what, problems, plan = f"{os.fspath(folder)} cannot be loaded", list[str](), None
    try:
        path = _path_of(Path(folder), step)
        plan = _Plan(open_source(path), problems)
        plan.of_models(models)
        for prefix, own in optimizers.items():
            plan.of_optimizer(prefix, own, models)
        for name, value in {"scheduler": scheduler, "scaler": scaler, "loader": loader}.items():
            if value is not None and not hasattr(value, "load_state_dict"):
                problems.append(f"{name} is a {type(value).__name__}, which has no load_state_dict(); leave it out")
            elif value is not None:
                plan.of_state(name, value.load_state_dict)
        if random and "random" in plan.index.states:
            plan.of_state("random", set_random_state)
    except CheckpointError as error:
        problems.append(str(error))
    except Exception as error:  # of what a forged file makes of our own steps; other ranks are told
        problems.append(f"what it says of itself is damaged or forged ({type(error).__name__}: {error}); load an earlier step")
    fail_together(what, problems)
    assert plan is not None
    plan.verify()
    fail_together(what, problems)
    plan.give_states()
    fail_together(what, problems)
    plan.carry_out()
    return Loaded(plan.index.step, plan.extra)


def _path_of(folder: Path, step: int | None) -> Path:
    """Returns the folder of a step as rank 0 sees it: another rank may see a newer one, or one less."""
    found: Path | str = ""
    if rank_and_size()[0] == 0:
        try:
            recover(folder)
            found = find_source(folder, step)
        except (CheckpointError, OSError) as error:
            found = str(error)
    chosen = from_all_ranks(found)[0]
    if isinstance(chosen, str):
        raise CheckpointError(chosen)
    path: Path = chosen
    return path


class _Plan:
    """The reads and changes of a load.

    Args:
        source: the checkpoint.
        problems: gets what does not fit.
    """

    def __init__(self, source: Source, problems: list[str]):
        self.source, self.index, self.reader, self.problems = source, source.index, source.reader, problems
        self.wanted: list[tuple[str, Bounds, Callable[[Tensor], None]]] = []  # what becomes new tensors
        self.early: list[tuple[str, Bounds, Callable[[Tensor], None]]] = []  # likewise, of states that may be refused
        self.copies: list[tuple[str, Bounds, Tensor]] = []
        self.tied: list[tuple[str, str, Bounds]] = []  # one tensor in the model, two in the checkpoint
        self.states: list[tuple[str, Callable[[Any], Any], Callable[[], Any]]] = []
        self.emptied: list[Callable[[], None]] = []  # gives up what is there, before what replaces it is read
        self.acts: list[Callable[[], None]] = []
        self.extra: dict[str, Any] = put_together(self.index.extra, self.index.tensors.__getitem__)

    # -- what is wanted ---------------------------------------------------------------------------------------------

    def of_models(self, models: Mapping[str, nn.Module]) -> None:
        """Wants the tensors of models."""
        tensors, aliases, others = named_tensors(models)
        is_ours = self.source.format == "shardwright"
        if not is_ours:
            self.problems += [] if list(models) == ["model"] else [f"{self.source.path} has one model; give one, model=net"]
            whole = models.get("model")
            self.index, unknown = renamed(self.index, {*tensors, *aliases}, getattr(whole, "module", whole))
            self.problems += unknown
        there, names = self.index.tensors, {**self.index.aliases}
        own = {*tensors, *aliases, *others}
        for prefix in models:
            known = {n for n in (*there, *names, *self.index.states) if n.startswith(f"{prefix}.")}
            self.problems += [f"{name} is in the checkpoint and not in the model" for name in sorted(known - own)]
        names_of: dict[str, list[str]] = {name: [name] for name in tensors}
        for alias, name in aliases.items():
            names_of[name].append(alias)
        for name, tensor in tensors.items():
            sources = list(dict.fromkeys(s for n in names_of[name] if (s := names.get(n, n)) in there))
            if not sources:
                self.problems.append(f"{name} is in the model and not in the checkpoint")
                continue
            source = sources[0]
            have, stored = held(tensor, name, self.problems), there[source]
            converts = not is_ours and DTYPES[stored.dtype].is_floating_point and tensor.is_floating_point()
            if have.shape != stored.shape or (have.dtype != stored.dtype and not converts):
                self.problems.append(
                    f"{name} is {list(stored.shape)} of {stored.dtype} in the checkpoint, and {list(have.shape)} of "
                    f"{have.dtype} in the model"
                )
            elif have.bounds is not None:
                self.copies.append((source, have.bounds, local(tensor)))
                self.tied += [(source, other, have.bounds) for other in sources[1:]]
        for name in others:
            module, _, _ = name.removeprefix(next(p for p in models if name.startswith(f"{p}."))).lstrip(".").rpartition(".")
            model = next(m for p, m in models.items() if name.startswith(f"{p}."))
            if name in self.index.states:
                self.of_state(name, model.get_submodule(module).set_extra_state)

    def of_optimizer(self, prefix: str, optimizer: Optimizer, models: Mapping[str, nn.Module]) -> None:
        """Wants the state of an optimizer.

        Args:
            prefix: its name in the checkpoint.
            optimizer: the optimizer.
            models: those whose parameters it has.
        """
        saved = self.index.states.get(prefix)
        if saved is None:
            self.problems.append(f"the checkpoint has no {prefix}; leave it out")
            return
        names = names_of_parameters(optimizer, models)
        groups = [group["params"] for group in saved["groups"]]
        if groups != names:
            differ = sorted({n for g in groups for n in g} ^ {n for g in names for n in g})
            self.problems.append(
                f"{prefix} has {len(groups)} groups of {', '.join(map(str, map(len, groups)))} parameters in the checkpoint, "
                f"and {len(names)} of {', '.join(map(str, map(len, names)))} here; make it alike"
                + (f" (they differ in {', '.join(differ[:5])})" if differ else "")
            )
            return
        for number, (group, own) in enumerate(zip(saved["groups"], optimizer.param_groups, strict=True)):
            lacks, has = sorted(own.keys() - group.keys()), sorted(group.keys() - own.keys() - {"initial_lr"})
            if lacks and has:  # one of the two alone is another version, or a scheduler
                self.problems.append(
                    f"{prefix} is of another kind: group {number} has {', '.join(has)} in the checkpoint, and "
                    f"{', '.join(lacks)} here; make it alike"
                )
        parameters = {n: p for own, group in zip(names, optimizer.param_groups) for n, p in zip(own, group["params"])}
        state: dict[Any, Any] = {}
        for name, own in saved["state"].items():
            state[parameters[name]] = self._later(own, parameters[name], self.wanted)
        values = [
            self._later({k: v for k, v in group.items() if k != "params"}, None, self.wanted) for group in saved["groups"]
        ]

        def act() -> None:
            for parameter, own in state.items():
                optimizer.state[parameter] = own()
            for group, own in zip(optimizer.param_groups, values, strict=True):
                group.update(own())

        def empty() -> None:
            optimizer.state_dict()  # ends what a step may have left
            optimizer.state.clear()

        self.emptied.append(empty)
        self.acts.append(act)

    def of_state(self, name: str, take: Callable[[Any], Any]) -> None:
        """Wants a state.

        Args:
            name: what it is of.
            take: is given it.
        """
        if name not in self.index.states:
            self.problems.append(f"the checkpoint has no {name}; leave it out")
            return
        self.states.append((name, take, self._later(self.index.states[name], None, self.early)))

    def _later(self, state: Any, parameter: Any, wanted: list[tuple[str, Bounds, Any]]) -> Callable[[], Any]:
        """Wants the tensors of a state, and returns what puts it together once they are read.

        Args:
            state: as JSON.
            parameter: that it is of: tensors of its shape are distributed as it is.
            wanted: gets the tensors.
        """
        made: dict[str, Tensor] = {}

        def want(name: str) -> None:
            stored, own = self.index.tensors[name], current(parameter)

            def take(value: Tensor) -> None:
                device = value.device if own is None or name.endswith(".step") else local(own).device
                made[name] = value.to(device)
                if isinstance(own, DTensor):
                    if tuple(own.shape) == stored.shape and stored.shape:
                        made[name] = _alike(own, made[name])
                    elif stored.shape:
                        made[name] = _like(own, made[name])

            if isinstance(own, DTensor) and tuple(own.shape) == stored.shape and stored.shape:
                bounds = held(own, name, self.problems).bounds
                if bounds is None:  # another stage's
                    dtype = DTYPES[stored.dtype]
                    made[name] = _alike(own, torch.empty(0, dtype=dtype))
                    return
                wanted.append((name, bounds, take))
            else:
                wanted.append((name, whole(stored.shape), take))

        put_together(state, want)
        return lambda: put_together(state, made.__getitem__)

    # -- reading and changing ---------------------------------------------------------------------------------------

    def verify(self) -> None:
        """Verifies this rank's share of all that the ranks need; every rank makes this call."""
        needs: Wanted = {}
        for name, bounds, _ in (*self.wanted, *self.early, *self.copies):
            needs.setdefault(name, set()).add(bounds)
        for _, other, bounds in self.tied:
            needs.setdefault(other, set()).add(bounds)
        everywhere = from_all_ranks(needs)
        try:
            if self.reader.has_checksums:
                for share in shares(self.reader, self.index.tensors, everywhere, rank_and_size()[0]):
                    self.reader.verify(share)
            else:
                self._check(needs)
            for name, other, bounds in self.tied:
                if not self._are_equal(name, other, bounds):
                    self.problems.append(
                        f"{name} and {other} are one tensor in the model, and differ in the checkpoint; untie them"
                    )
        except CheckpointError as error:
            self.problems.append(str(error))
        except Exception as error:  # other ranks are told
            self.problems.append(f"it cannot be read ({type(error).__name__}: {error}); load an earlier step")

    def _check(self, needs: Wanted) -> None:
        """Checks the files of what has no checksums, as far as their format lets it."""
        for name, parts in needs.items():
            tensor = self.index.tensors[name]
            slices = {own: None for bounds in parts for own, *_ in overlaps(tensor.slices, bounds)}
            for stored in slices:
                self.reader.check(stored, tensor.dtype)

    def _are_equal(self, name: str, other: str, bounds: Bounds) -> bool:
        """Tells whether two tensors of the checkpoint have the same bits in a part."""
        one, two = (self.index.tensors[n] for n in (name, other))
        if (one.shape, one.dtype) != (two.shape, two.dtype):
            return False
        parts = [torch.empty([b - a for a, b in bounds], dtype=DTYPES[one.dtype]) for _ in range(2)]
        for part, source in zip(parts, (name, other), strict=True):
            self._read(source, bounds, part)
        return torch.equal(*(part.reshape(-1).view(torch.uint8) for part in parts))

    def give_states(self) -> None:
        """Gives states to those that take them themselves, and may refuse them."""
        self._make(self.early)
        for name, take, state in self.states:
            try:
                if take is set_random_state:
                    check_random_state(state())
                else:
                    take(state())
            except Exception as error:  # of whoever takes it
                self.problems.append(f"{name} does not take its state ({type(error).__name__}: {error}); make it alike")

    def carry_out(self) -> None:
        """Changes models and optimizers, and sets generators."""
        for make in self.emptied:
            make()
        self._make(self.wanted)
        for act in self.acts:
            act()
        with torch.no_grad():
            for name, bounds, own in self.copies:
                self._read(name, bounds, own)
        for _, take, state in self.states:
            if take is set_random_state:
                take(state())

    def _make(self, wanted: list[tuple[str, Bounds, Callable[[Tensor], None]]]) -> None:
        for name, bounds, take in wanted:
            part = torch.empty([b - a for a, b in bounds], dtype=DTYPES[self.index.tensors[name].dtype])
            self._read(name, bounds, part)
            take(part)

    def _read(self, name: str, bounds: Bounds, into: Tensor) -> None:
        stored = self.index.tensors[name]
        self.reader.read(stored.slices, stored.dtype, bounds, into)
