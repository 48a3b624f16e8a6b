"""Public API: ``AutoParallel``, which captures, plans, partitions and runs a callable.

Read top to bottom: :class:`AutoParallel` looks up (or makes) a :class:`~shardwright.api.bound.BoundCall`, whose constructor
does the four steps, and calls it.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shardwright.agreement.job_watch import watch_of
from shardwright.agreement.signature import Signature, signature_of
from shardwright.api import train_step
from shardwright.api.ambiguous import check_nested, refuse_ambiguous_names, refuse_scaled_losses, refuse_wrapped
from shardwright.api.bound import BoundCall
from shardwright.api.call_key import _leaf_key, _out_of_inference, flat_inputs, input_summary, torch_modes, why_planned_again
from shardwright.api.decided import run_as_decided
from shardwright.api.hybrid import HybridBoundCall
from shardwright.api.marks import check_patterns
from shardwright.api.pipeline import PipelineBoundCall
from shardwright.api.settings import MODES, Settings
from shardwright.api.settings_methods import SettingsMethods
from shardwright.api.target_as_module import TargetAsModule
from shardwright.base.torch_private import transforms_are_active
from shardwright.base.user_code import user_source
from shardwright.capture.caches import register_caches
from shardwright.capture.capture import StepFound
from shardwright.capture.closure import FunctionModule
from shardwright.capture.python_state import PythonState
from shardwright.capture.session import current_session
from shardwright.data.rank_inputs import GlobalInputs, global_inputs, step_inputs, whole_samples
from shardwright.errors import ArgumentTypeError, ShardwrightError, WorldError
from shardwright.hybrid.mesh import chosen_mesh
from shardwright.ir.program import LocalProgram
from shardwright.parameters.whole_module import whole_parameters
from shardwright.report.plan_view import PlanView
from shardwright.train.accumulation.module import GradAccumulation
from shardwright.train.compile.compiler import segment_compiler
from shardwright.train.outputs.read_later import check_output
from shardwright.world.current import current_world

logger = logging.getLogger("shardwright")

MOST_PLANS = 64  # that an AutoParallel keeps; the oldest goes first


class AutoParallel(SettingsMethods, TargetAsModule):
    """A single-device callable that runs on all ranks of the world.

    The first call for each signature of inputs captures, plans and binds a program; later calls run it. The result is the
    global value on every rank.

    Args:
        target: an ``nn.Module``; a forward function, which may close over modules and parameters; or a train step,
            which runs as it is, while every module it calls and every :func:`value_and_grad` function in it is parallel.
        parallel_mode: how operators without a strategy of the user are split; those with one follow it.
            ``"semi_auto"``: data parallel. ``"sharding_propagation"``: with the least redistribution, starting from the
            configured operators. ``"auto"``: by a search over several device matrices, with a certified gap to the best
            plan. ``"dynamic_programming"``: the best plan under the cost model on one device matrix.
            ``"recursive_programming"``: the fastest search. ``"data_parallel"``: data parallel, strategies ignored.
            ``"hybrid_parallel"``: the target is the program of one rank, with
            :mod:`collectives <shardwright.hybrid.collectives>` of its own. ``"stand_alone"``: the target as it is.
        compile: ``True`` compiles what runs between collectives with ``torch.compile``; a string names its backend.
        output: ``"whole"``: every output is whole on every rank. ``"sharded"``: it is whole when it is read. Default: so are
            large ones beside a loss.

    Raises:
        ShardwrightError: an unknown mode or backend, or a target that is not callable.

    >>> import torch
    >>> model = torch.nn.Linear(4, 2)
    >>> net = AutoParallel(model)
    >>> net(torch.ones(6, 4)).shape
    torch.Size([6, 2])
    """

    def __init__(
        self, target: Callable[..., Any], parallel_mode: str = "semi_auto", compile: bool | str = False,
        output: str | None = None,
    ):  # fmt: skip
        if parallel_mode not in MODES:
            raise ShardwrightError(f"parallel_mode={parallel_mode!r} is unknown; use one of {', '.join(MODES)}")
        check_output(output)
        if not callable(target):
            raise ArgumentTypeError(f"AutoParallel({target!r}): give a module, a forward function or a train step")
        refuse_wrapped(target)
        register_caches()
        super().__init__(target)
        compiler = segment_compiler(compile, parallel_mode)
        self.settings = Settings(mode=parallel_mode, collective_mesh=chosen_mesh(), compiler=compiler, output=output)
        self._root: nn.Module | None = target if isinstance(target, nn.Module) else None
        self._is_step: bool | None = False if isinstance(target, nn.Module) else None
        self._bound_calls: dict[Any, list[BoundCall]] = {}  # by signature; several where Python decides by changing numbers
        self._changes: Counter[str] = Counter()  # how often a number of a module has changed
        self._constant: set[str] = set()  # numbers that change and can only be constants of a program
        self._latest: BoundCall | None = None
        self._step: train_step.StepContext | None = None
        self._state: PythonState | None = None
        self._is_whole = False
        self._told: set[str] = set()  # methods of the target whose first call was logged
        self._described: tuple[Any, dict[str, Any]] = (None, {})  # key and Python values of the latest planning
        self.__wrapped_function__ = target
        if isinstance(target, nn.Module):
            refuse_ambiguous_names(self, target)

    def _forget(self) -> None:
        self._bound_calls.clear()
        self._described = (None, {})
        self._step = None

    # -- running --------------------------------------------------------------------------------------------------

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the target in parallel, without the hooks that are registered on this object; calling it does both.

        Raises:
            ShardwrightError: a transformation of ``torch.func`` is running around it.
            WorldError: it is called within a block of :meth:`whole`.
        """
        if self._is_whole:
            raise WorldError(
                "net(...) within `with net.whole():`, where its parameters are whole: call the model itself there, model(...), "
                "or the net outside of the block"
            )
        if current_session() is not None or self.settings.mode == "stand_alone":
            if current_session() is not None:
                check_nested(self)
            if self.settings.precision.dtype is None:
                return self.target(*args, **kwargs)
            with self.settings.precision.computing(next((p.device.type for p in self.parameters()), "cpu")):
                return self.target(*args, **kwargs)
        if transforms_are_active():
            raise ShardwrightError(
                f"an AutoParallel is called within a transformation of torch.func, at {user_source()}: programs have no rule "
                "for that\n  Give AutoParallel the function that transforms the model: "
                "sw.AutoParallel(lambda x: torch.func.vmap(model)(x))"
            )
        if self._is_step is None:
            self._is_step = train_step.looks_like_step(self.target)
        if not self._is_step:
            try:
                leaves, bound = self._bound_call_for(args, kwargs)
            except StepFound:
                self._is_step = True
            else:
                again = partial(self._bound_call_for, args, kwargs)
                return bound(leaves) if bound.decisions is None else run_as_decided(bound, leaves, again)
        return self._run_step(args, kwargs)

    @contextmanager
    def whole(self) -> Iterator[nn.Module]:
        """Makes the parameters whole ordinary tensors on every rank, within a block, and yields the module that has them.

        There the model itself runs as on one device: ``model(x)``, ``model.generate(...)``,
        ``torch.save(model.state_dict(), path)``. Every rank enters the block; within it, one rank may work alone. What was
        written to parameters and gradients in place is cut back when the block ends, also by an error. On simulated ranks
        parameters are whole anyway.

        Raises:
            WorldError: a parameter has no value yet, or changed its shape in the block.

        >>> import torch
        >>> net = AutoParallel(torch.nn.Linear(4, 2))
        >>> with net.whole() as model:
        ...     model(torch.ones(3, 4)).shape
        torch.Size([3, 2])
        """
        world = current_world()
        alone = nullcontext() if self._latest is None else self._latest.single_device()
        if not world.keeps_pieces or self._is_whole:
            with alone:
                yield self.module
            return
        with whole_parameters(self.module, world.device_of(self.module)), alone:
            self._is_whole = True
            try:
                yield self.module
            finally:
                self._is_whole = False

    def _method(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """Makes a method of the target run on whole parameters, on every rank: it does not know of pieces."""
        if current_session() is not None or not current_world().keeps_pieces or self.settings.mode == "stand_alone":
            return method

        @functools.wraps(method)
        def on_whole_parameters(*args: Any, **kwargs: Any) -> Any:
            if name not in self._told:
                self._told.add(name)
                logger.warning("net.%s(...) runs on every rank as on one device, on whole parameters: net.whole()", name)
            with self.whole():
                return method(*args, **kwargs)

        return on_whole_parameters

    def _run_step(self, args: Any, kwargs: Any) -> Any:
        if self._step is None:
            check_patterns(FunctionModule(self.target), self.settings)
            self._step = train_step.StepContext(self._child)
        is_hybrid = self.settings.mode == "hybrid_parallel"  # reads the dataset strategy itself
        if self.settings.dataset_strategy != "full_batch" and not is_hybrid:
            args, kwargs = step_inputs(args, kwargs, self.settings.dataset_strategy, current_world())
        with self._step.active():
            return self.target(*args, **kwargs)

    def _child(self, target: Callable[..., Any]) -> AutoParallel:
        child = AutoParallel(target, self.settings.mode)
        child.settings = replace(self.settings, of_step=True)
        child._is_step = False
        return child

    def compile(self, *args: Any, **kwargs: Any) -> AutoParallel:  # type: ignore[override]
        """Captures, plans and binds for inputs like these, without running. Otherwise the first call does it.

        Raises:
            ShardwrightError: the target is a train step; compile the modules that it calls.
        """
        if self._is_step is None:
            self._is_step = train_step.looks_like_step(self.target)
        if self._is_step:
            raise ShardwrightError("a train step compiles what it calls at its first call; compile the module instead")
        self._bound_call_for(args, kwargs)
        return self

    def _bound_call_for(self, args: Any, kwargs: Any, decided: tuple[Any, ...] = ()) -> tuple[list[Any], BoundCall]:
        leaves: list[Any]
        spec: Any
        watch = watch_of(current_world())
        if watch is not None:
            watch.begin_call(self)
        if not kwargs and all(type(a) is Tensor for a in args):
            leaves, spec = list(args), len(args)  # the usual call, without walking trees
        else:
            args, kwargs, leaves, spec = flat_inputs(args, kwargs)
        given: GlobalInputs | None = None
        is_hybrid = self.settings.mode == "hybrid_parallel"  # reads the dataset strategy itself
        if self.settings.dataset_strategy != "full_batch" and not is_hybrid:
            leaves, given = global_inputs(leaves, self.settings.dataset_strategy, current_world(), self.settings.of_step)
            if isinstance(self._root, GradAccumulation):
                leaves, given = whole_samples(leaves, given, current_world())
        key = (spec, tuple(map(_leaf_key, leaves)), given, self._state_key())
        bound = self._known(key, decided)
        if bound is None and self._found_changing():
            key = (*key[:3], self._state_key())
            bound = self._known(key, decided)
        if bound is None:
            self._log_why_planned_again(key, leaves, decided)
            if given is not None and current_world().processes > 1:
                refuse_scaled_losses(kwargs)
            with self._compare_planning(leaves, spec, given) as signatures, _out_of_inference():
                bound = self._compile(args, kwargs, given, decided)
            bound.signatures = signatures
            while len(self._bound_calls) >= MOST_PLANS:
                del self._bound_calls[next(iter(self._bound_calls))]
            assert self._state is not None
            self._state.refresh()  # parameters may have been replaced by distributed ones
            if self._state.changing:  # those that could not be are constants again
                self._constant |= self._state.changing - set(bound.numbers.names if bound.numbers else ())
                self._state.changing -= self._constant
                self._state.refresh()
            self._described = key, dict(self._state.described)
            kept = self._bound_calls.setdefault((spec, key[1], given, self._state_key()), [])
            kept.insert(len(kept) if bound.raises else 0, bound)
            del kept[MOST_PLANS:]
        elif watch is not None:
            watch.known_call(bound, input_summary(leaves, given is None and not is_hybrid, bound.changing_values))
        self._latest = bound
        return leaves, bound

    @contextmanager
    def _compare_planning(self, leaves: list[Any], spec: Any, given: GlobalInputs | None) -> Iterator[dict[bool, Signature]]:
        """Surrounds planning: the ranks of a job compare what they plan. Yields the signature, by gradient mode."""
        watch = watch_of(current_world())
        if watch is None:
            yield {}
            return
        shapes = None if given is None else given.shapes
        sign = signature_of(self.module, leaves, spec, watch.name_of(self), shapes)
        with watch.new_call(sign, input_summary(leaves, given is None and self.settings.mode != "hybrid_parallel")):
            yield {torch.is_grad_enabled(): sign}

    def _known(self, key: Any, decided: tuple[Any, ...]) -> BoundCall | None:
        """Returns the program of a signature, for the decisions that Python would take. That of the latest call is first."""
        kept = self._bound_calls.get(key, [])
        bound = next((bound for bound in kept if bound.fits(decided)), None)
        if bound is not None and decided and not bound.raises:
            kept.insert(0, kept.pop(kept.index(bound)))
        return bound

    def _found_changing(self) -> bool:
        """Tells whether numbers of modules have changed for the second time, which makes them inputs of the next program."""
        assert self._state is not None
        if self._described[0] is None or self.settings.mode == "hybrid_parallel":
            return False
        names = self._state.changed_numbers(self._described[1]) - self._constant
        self._changes.update(names)
        found = {name for name in names if self._changes[name] >= 2}
        if found:
            logger.warning("%s changed again: a number of each call from now on, not of the plan", ", ".join(sorted(found)))
            self._state.changing |= found
            self._state.refresh()
        return bool(found)

    def _log_why_planned_again(self, key: Any, leaves: list[Any], decided: tuple[Any, ...]) -> None:
        """Logs, from the second planning on, what has changed since the one before."""
        assert self._state is not None
        before, described = self._described
        self._described = key, dict(self._state.described)
        if before is None:
            return
        if decided:
            made: Any = self.latest.decisions
            logger.warning("planning again: decided %s at %s", decided[-1], made.sources[len(decided) - 1])
            return
        logger.warning("planning again: %s", why_planned_again(key, before, self._state.changed(described), leaves))

    def _compile(self, args: Any, kwargs: Any, given: GlobalInputs | None, decided: tuple[Any, ...]) -> BoundCall:
        if self._root is None:
            self._root = FunctionModule(self.target)
        may_be_a_step = self._is_step is None or self._root is not self.target
        if self.settings.mode == "hybrid_parallel":
            with train_step.backward_is_a_step(may_be_a_step):
                return HybridBoundCall(self._root, args, kwargs, current_world(), self.settings)
        if self.settings.pipeline is not None:
            return PipelineBoundCall(self._root, args, kwargs, current_world(), self.settings)
        changing = self._state.changing if self._state is not None else ()
        return BoundCall(self._root, args, kwargs, current_world(), self.settings, given, may_be_a_step, changing, decided)

    def _state_key(self) -> Any:
        """Builds the key of all other state that the graph depends on: Python values, grad mode, autocast, the world."""
        if self._state is None:
            if self._root is None:
                self._root = FunctionModule(self.target)
            self._state = PythonState(self._root)
        version = self._state.version()
        if self._state.outdated:  # the function reaches other modules or tensors than those its root holds
            self._root = self._state = None
            self._bound_calls.clear()
            return self._state_key()
        return version, *torch_modes(), current_world()

    # -- looking ----------------------------------------------------------------------------------------------------

    @property
    def latest(self) -> BoundCall:
        """The bound program that the latest call ran; of a train step, its largest part.

        Raises:
            ShardwrightError: nothing is planned yet, or the mode makes no plans.
        """
        if self._latest is not None:
            return self._latest
        if self._step is not None:
            parts = [c._latest for c in self._step.children if c._latest is not None]
            if parts:
                return max(parts, key=lambda c: len(c.graph.nodes))
        if self.settings.mode == "stand_alone":
            raise ShardwrightError("a stand_alone target runs as it is, without a plan")
        raise ShardwrightError("nothing is planned yet: call it once, or call compile(*inputs)")

    @property
    def plan(self) -> PlanView:
        """The plan of the latest call; prints as a table."""
        return self.latest.view

    @property
    def program(self) -> LocalProgram:
        """The local program of the latest call; prints as readable code of rank 0, and as another rank's by ``text(rank)``."""
        return self.latest.program

    @property
    def module(self) -> nn.Module:
        """The module that owns the parameters: the target, or the module around the target function."""
        if self._root is None:
            self._root = FunctionModule(self.target)
        return self._root

    def __repr__(self) -> str:
        return f"AutoParallel({self.target!r}, parallel_mode={self.settings.mode!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> AutoParallel:
        """Copies the target and the settings; the copy plans for itself."""
        other = AutoParallel(copy.deepcopy(self.target, memo), self.settings.mode)
        memo[id(self)] = other
        other.settings = replace(self.settings)
        return other
