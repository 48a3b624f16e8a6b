"""Methods of an ``AutoParallel`` that change its settings; each drops the plans made before."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from shardwright.api.settings import SearchSettings, Settings, refuse_with_pipeline
from shardwright.base.user_code import user_line
from shardwright.cost.machine_files import load_machine
from shardwright.data.strategy import check_dataset_strategy
from shardwright.errors import ArgumentTypeError, ShardwrightError
from shardwright.pipeline.cell import read_pipeline
from shardwright.pipeline.schedules.schedule import Schedule
from shardwright.plan.asked.sizes import memory_bytes, optimizer_bytes_per_byte
from shardwright.plan.file.read import load_plan_file
from shardwright.train.fusion.settings import read_fusion
from shardwright.train.optimizer_parallel.stored import read_hsdp
from shardwright.train.recompute.request import request_for

if TYPE_CHECKING:
    from typing_extensions import Self


class SettingsMethods:
    """Settings of an ``AutoParallel`` and the methods that change them; each method returns the object itself."""

    settings: Settings

    def _forget(self) -> None:
        """Drops all plans, since a setting has changed."""
        raise NotImplementedError

    def dataset_strategy(self, config: Any) -> Self:
        """Sets how the input tensors of a rank are slices of the global ones.

        Args:
            config: ``"full_batch"`` (the default: every rank gives the whole batch), ``"data_parallel"`` (a rank gives its
                slice of
                dim 0 of every input that has the batch there), or a tuple with slice counts or a Layout per input. In the
                simulated world the caller always gives the whole batch. :func:`shardwright.data.loader` makes batches that fit.

        Raises:
            ShardwrightError: no such strategy; an :class:`ArgumentTypeError` where a type is wrong. What does not fit the
                inputs is
                refused at the first call.
        """
        check_dataset_strategy(config)
        self.settings.dataset_strategy = config
        self._forget()
        return self

    def enable_alltoall(self, enable: bool = True) -> Self:
        """Allows pieces to move straight between layouts, or forbids it. The default is to allow it.

        Args:
            enable: where ``False``, all-gathers and slices take the place of all-to-alls, permutes and exchanges. More bytes
                move
                and tensors are larger in between; for backends whose all-to-all is slow or missing.

        Raises:
            ArgumentTypeError: ``enable`` is not a bool.
        """
        if not isinstance(enable, bool):
            raise ArgumentTypeError(f"enable_alltoall({enable!r}): give True or False")
        self.settings.enable_alltoall = enable
        self._forget()
        return self

    def shard(self, strategies: dict[str, Any]) -> Self:
        """Gives modules and parameters strategies by name, leaving the model as it is.

        Args:
            strategies: pattern (as in ``fnmatch``) -> for modules, an ``in_strategy`` tuple, or a dict with ``in_strategy``,
                ``out_strategy``, ``parameter_plan`` and ``attributes``; for parameters, slice counts or a Layout. A pattern
                that
                matches nothing is an error at the first call.

        Raises:
            ArgumentTypeError: not a dict.
        """
        if not isinstance(strategies, dict):
            raise ArgumentTypeError(f"shard({strategies!r}): give a dict from name patterns to strategies")
        self.settings.strategies = {**(self.settings.strategies or {}), **strategies}
        self.settings.source = user_line()
        self._forget()
        return self

    def load_strategies(self, path: str | os.PathLike[str]) -> Self:
        """Follows a plan file: a whole plan as it is, or parts of one as strategies that the mode keeps.

        Args:
            path: what :meth:`Plan.save` wrote, or a file written by hand; see the page on plan files.

        Raises:
            ShardwrightError: no such file, or not a plan file. What does not fit the model is refused at the first call.
        """
        self.settings.file = load_plan_file(path)
        self._forget()
        return self

    def search(
        self,
        machine: Any = None,
        memory: float | str | None = None,
        mesh: tuple[int, ...] | None = None,
        axes: tuple[str, ...] = (),
        optimizer: str | float = "adamw",
        seconds: float = 30.0,
    ) -> Self:
        """Sets the machine that plans are priced on, their limits, and how modes search.

        Args:
            machine: a preset (``"h100"``, ...), a TOML file or a :class:`~shardwright.ir.machine.Machine`; default:
                ``"cpu-gloo"``, and ``"h100"`` where the job runs on GPUs.
            memory: bytes that a rank may use over a step, ``"80GB"`` or a number; default: no limit.
            mesh: the device matrix to search on; default: several are tried.
            axes: the aliases of its axes.
            optimizer: name of the optimizer whose states count, or bytes of state per byte of parameter.
            seconds: how long a search may take.

        Raises:
            ShardwrightError: an unknown machine, optimizer or size; a mesh that is not a tuple of sizes.
        """
        if mesh is not None and not (isinstance(mesh, tuple) and mesh and all(type(n) is int and n > 0 for n in mesh)):
            raise ArgumentTypeError(f"search(mesh={mesh!r}): give a tuple of sizes, (2, 4)")
        if len(axes) not in (0, len(mesh or ())):
            raise ShardwrightError(f"search(axes={axes!r}): give one alias for each of the {len(mesh or ())} axes of the mesh")
        chosen = None if machine is None else load_machine(machine)
        limit = None if memory is None else memory_bytes(memory)
        self.settings.search = SearchSettings(chosen, limit, mesh, tuple(axes), optimizer_bytes_per_byte(optimizer), seconds)
        self._forget()
        return self

    def hsdp(self, shard_size: int = -1, threshold: int = 64, optimizer_level: str = "level1") -> Self:
        """Splits parameters, their gradients and optimizer states over ranks that would hold the same.

        A parameter with ``parameter.parallel_optimizer = False`` stays as it is.

        Args:
            shard_size: how many ranks share a parameter, neighbours in the order of ranks; -1: all that would hold the same.
                Ignored where it does not divide their number.
            threshold: KB; a smaller parameter stays as it is.
            optimizer_level: ``"level1"``: parameters are gathered once per step. ``"level2"``: the gradients of each
                micro-batch
                are scattered too, so that they add up in pieces. ``"level3"``: gathered parameters are dropped after use and
                gathered a second time for the backward pass.

        Raises:
            ShardwrightError: a value out of range.
        """
        self.settings.hsdp = read_hsdp(shard_size, threshold, optimizer_level)
        self._forget()
        return self

    def pipeline(
        self, stages: int | tuple[int, ...] = 1, output_broadcast: bool = False, interleave: bool = False,
        scheduler: str | Schedule = "1f1b", slices: int = 1,
    ) -> Self:  # fmt: skip
        """Runs the target, a :class:`~shardwright.PipelineCell`, in stages on ranks of their own.

        Args:
            stages: how many parts of equal size the ranks are divided into, in their order; or the ranks of each part.
            output_broadcast: whether every rank gets the results; else those of the last stage, and all of them the loss.
            interleave: whether each part of the ranks has two stages, one after the other along the model.
            scheduler: the name of a schedule (``"gpipe"``, ``"1f1b"``, ``"zero_bubble_h1"``, ``"zero_bubble_v"``,
                ``"searched"``, ``"seqpipe"``), or a schedule.
            slices: how many slices of its sequence each micro-batch passes in, with ``scheduler="seqpipe"``.

        Raises:
            TypeError: a number of stages that is no int.
            PipelineError: a value out of range, or a mode or setting that does not go with a pipeline.
        """
        refuse_with_pipeline(self.settings)
        self.settings.pipeline = read_pipeline(stages, output_broadcast, interleave, scheduler, slices)
        self._forget()
        return self

    def comm_fusion(self, config: dict[str, Any]) -> Self:
        """Sets which parameters share the collectives that reduce their gradients or gather them.

        Parameters with the attribute ``comm_fusion`` (:func:`shardwright.set_comm_fusion`) share with those of the same number,
        whatever the sizes.

        Args:
            config: ``{"openstate": True, "allreduce": {"mode": ..., "config": ...}, "allgather": ..., "reducescatter": ...}``.
                Modes: ``"auto"``: buckets of 64 MB. ``"size"``: buckets that are full at ``config`` MB; 0: each parameter
                    alone.
                ``"index"`` (of ``allreduce``): ``config`` lists where buckets begin, ``[20, 35]``, counted in the order in
                which
                parameters are read. With ``openstate`` false each parameter is alone. Kinds that are not named stay as they are
                without settings.

        Raises:
            ShardwrightError: a configuration that makes no sense.
        """
        self.settings.schedule = read_fusion(config)
        self._forget()
        return self

    def recompute(self, targets: Any, *, memory: float | str | None = None, **switches: bool) -> Self:
        """Marks modules to be computed again in the backward pass. What is inside them is not kept.

        Args:
            targets: a name pattern (as in ``fnmatch``), a module, or several of these; or ``"auto"``: as many modules as it
                takes to stay under a memory limit, at the least cost.
            memory: with ``"auto"``, bytes that a rank may use over a step, ``"80GB"`` or a number; default: that of
                :meth:`search`.
            switches: ``mp_comm_recompute``, ``parallel_optimizer_comm_recompute``, ``recompute_slice_activation``; see
                :func:`shardwright.recompute`.

        Raises:
            ShardwrightError: an unknown switch. A pattern that matches no module is refused at the first call.

        >>> import torch
        >>> from shardwright.api.auto_parallel import AutoParallel
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh())
        >>> net = AutoParallel(model).recompute("0")
        """
        limit = None if memory is None else memory_bytes(memory)
        request = request_for("recompute", targets, user_line(), switches, limit)
        self.settings.recompute = (*self.settings.recompute, request)
        self._forget()
        return self

    def enable_gradients_mean(self, enable: bool = True) -> Self:
        """Sets whether ``"hybrid_parallel"`` averages losses over the data axes; the default is yes.

        With averaging, each rank's loss is weighted by its share of the batch, so that a mean over a rank's part becomes the
        mean
        over the whole batch, and gradients are those of one device. In the other modes losses are global, and this has no
        effect.

        Args:
            enable: where ``False``, losses and with them gradients are summed over the data axes, which is right where the loss
                is
                a sum over the batch.

        Raises:
            ShardwrightError: ``False`` in another mode.
        """
        if not isinstance(enable, bool):
            raise ArgumentTypeError(f"enable_gradients_mean({enable!r}): give True or False")
        if not enable and self.settings.mode != "hybrid_parallel":
            raise ShardwrightError(
                f"enable_gradients_mean(False): in mode {self.settings.mode!r} gradients are those of the loss on the whole "
                "batch; for their sum, sum the loss over the batch (reduction='sum')"
            )
        self.settings.gradients_mean = enable
        self._forget()
        return self

    def mixed_precision(self, dtype: torch.dtype | None = torch.bfloat16, reduce_dtype: torch.dtype | None = None) -> Self:
        """Computes under autocast, with parameters, their gradients and the optimizer's states in their own dtype.

        Args:
            dtype: ``torch.bfloat16`` or ``torch.float16``; ``None``: no autocast but the one around the call.
            reduce_dtype: dtype in which gradients of parameters are summed over ranks; default: their own, half precision
                in float32.

        Raises:
            ShardwrightError: not such a dtype; a ``reduce_dtype`` beside :meth:`disable_gradient_fp32_sync`.
        """
        self.settings.precision = replace(self.settings.precision, dtype=dtype, reduce_dtype=reduce_dtype)
        self._forget()
        return self

    def disable_gradient_fp32_sync(self) -> Self:
        """Sums gradients of parameters over ranks in half precision where they are in half precision: half the bytes."""
        self.settings.precision = replace(self.settings.precision, gradient_fp32_sync=False)
        self._forget()
        return self

    def enable_fp32_communication(self) -> Self:
        """Takes every sum over ranks of half-precision tensors in float32, forward and backward; twice the bytes."""
        self.settings.precision = replace(self.settings.precision, fp32_communication=True)
        self._forget()
        return self
