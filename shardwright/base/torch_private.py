"""Door to PyTorch's private modules, the only one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch._functorch.apis as functorch_apis
import torch._functorch.eager_transforms as functorch_transforms
import torch.utils.checkpoint as checkpoint_module
from torch import overrides
from torch._C import DisableTorchFunctionSubclass
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.function import _SingleLevelFunction as SingleLevelFunction
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import _StridedShard as StridedShard
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import has_side_effect
from torch.fx.traceback import annotate, preserve_node_meta
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules import module as module_calls
from torch.nn.modules import transformer as transformer_module
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._python_dispatch import _disable_current_modes as disable_current_modes
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack as current_dispatch_modes
from torch.utils.checkpoint import CheckpointFunction
from torch.utils.hooks import BackwardHook

wrapper_tensor: Callable[..., Any] = torch.Tensor._make_wrapper_subclass  # type: ignore[attr-defined]


def cpp_compiler() -> str:
    """Returns the C++ compiler that Inductor uses.

    Raises:
        RuntimeError: there is none.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler

    return get_cpp_compiler()


def untraceable() -> tuple[type[Exception], ...]:
    """Returns the errors that ``torch.compile`` raises when it cannot trace or compile a function."""
    from torch._dynamo import exc

    return (exc.TorchDynamoException,)


def failed_toolchain(error: BaseException) -> bool:
    """Tells whether such an error comes from a compiler outside of PyTorch. It may be missing or fail."""
    from torch._inductor import exc

    kinds = (exc.InvalidCxxCompiler, exc.CppCompileError, exc.TritonMissing, exc.GPUTooOldForTriton)
    return any(isinstance(e, kinds) for e in (error, error.__cause__, getattr(error, "inner_exception", None)))


def replace_dtensor_handler(operator: torch._ops.OpOverload, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replaces the function by which DTensor runs an operator that it does not dispatch."""
    handlers = DTensor._op_dispatcher._custom_op_handlers
    handlers[operator] = make(handlers[operator])


def add_dtensor_handlers(make: Callable[[Callable[..., Any]], Callable[..., Any]], besides: Any = ()) -> None:
    """Makes DTensor run every operator of torch by the function that ``make`` returns.

    Args:
        make: is called with a function that runs an operator as before: ``otherwise(operator, args, kwargs)``.
        besides: overloads that are left as they are.
    """
    handlers = DTensor._op_dispatcher._custom_op_handlers
    before = dict(handlers)

    def otherwise(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if operator in before:
            return before[operator](operator, args, kwargs)
        mine = handlers.pop(operator)
        try:
            return operator(*args, **kwargs)
        finally:
            handlers[operator] = mine

    made = make(otherwise)
    for name in torch._C._dispatch_get_all_op_names():
        library, _, rest = name.partition("::")
        packet, _, overload = rest.partition(".")
        if library == "aten":
            found = getattr(getattr(torch.ops.aten, packet), overload or "default")
            if found not in besides:
                handlers[found] = made


def cloned_store() -> torch.distributed.Store:
    """Returns a new client of the store by which ranks find each other. A client that waits blocks no other."""
    return torch.distributed.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined,no-any-return]


def job_timeout(device_type: str = "cpu") -> timedelta | None:
    """Returns how long a collective of the whole job may wait. ``None`` if its backend does not say."""
    group: Any = torch.distributed.group.WORLD
    try:
        found: timedelta = group._get_backend(torch.device(device_type)).options._timeout
    except (RuntimeError, AttributeError):
        return None
    return found


def set_group_timeout(timeout: timedelta, group: Any = None) -> None:
    """Sets how long a collective of a group of this rank may wait. Default is the group of the whole job."""
    torch.distributed.distributed_c10d._set_pg_timeout(timeout, group)


# Tells whether the running backward pass will execute a node, as torch's register_multi_grad_hook does.
will_execute_node = torch._C._will_engine_execute_node


def is_captured_alone(node: Any) -> bool:
    """Tells, in a backward pass, whether it ends at a node of the graph, whose gradient was asked for."""
    before = [function for function, _ in node.next_functions if function is not None]
    if not before or any(not function.next_functions for function in before):  # which torch does not answer for leaves
        return False
    return not any(will_execute_node(function) for function in before)


# The number of the backward pass in progress, below 0 outside of any; and what has it call a function when it ends.
current_graph_task = torch._C._current_graph_task_id
queue_callback = torch.autograd.Variable._execution_engine.queue_callback
# Forward of batch norms that know of one device only.
batch_norm_forward = BatchNorm.forward
# Tells whether a transformation of ``torch.func`` is running.
transforms_are_active: Callable[[], bool] = torch._C._are_functorch_transforms_active
# What ``torch.no_grad`` calls, as an export records it.
set_grad_mode: Callable[[bool], None] = torch._C._set_grad_enabled
# Torch functions that have a name here only, such as those of packed sequences.
variable_functions: Any = torch._C._VariableFunctions
# Tells which kernel attention on these tensors would run.
fused_attention_choice: Callable[..., int] = torch.ops.aten._fused_sdp_choice.default
# Computes the norms of many tensors in few kernels, as torch.nn.utils.get_total_norm does.
copy_each: Callable[..., None] = torch._foreach_copy_
foreach_norm: Callable[..., tuple[torch.Tensor, ...]] = torch._foreach_norm


# What runs while a module is called.
module_call_code = torch.nn.Module._call_impl.__code__


def call_with_hooks(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Calls a module with its hooks, past what may stand in the place of ``nn.Module.__call__``."""
    return module._call_impl(*args, **kwargs)


@contextmanager
def no_function_modes() -> Iterator[None]:
    """Leaves all ``TorchFunctionMode`` blocks within this one."""
    left = []
    try:
        while torch._C._len_torch_function_stack():
            left.append(overrides._pop_mode())
        yield
    finally:
        for mode in reversed(left):
            overrides._push_mode(mode)


def function_modes() -> list[Any]:
    """Returns the ``TorchFunctionMode`` blocks around, the innermost last."""
    return list(overrides._get_current_function_mode_stack())


@contextmanager
def within_function_modes(modes: Sequence[Any]) -> Iterator[None]:
    """Enters modes, within the block, that have been left to handle a function."""
    for mode in modes:
        overrides._push_mode(mode)
    try:
        yield
    finally:
        for _ in modes:
            overrides._pop_mode()


@contextmanager
def no_saved_tensors_hooks() -> Iterator[None]:
    """Leaves all ``saved_tensors_hooks`` blocks within this one. Transformations of ``torch.func`` refuse to run in them."""
    left = []
    try:
        while (hooks := torch._C._autograd._top_saved_tensors_default_hooks(False)) is not None:
            torch._C._autograd._pop_saved_tensors_default_hooks()
            left.append(hooks)
        yield
    finally:
        for pack, unpack in reversed(left):
            torch._C._autograd._push_saved_tensors_default_hooks(pack, unpack)


def tracer_of_export() -> Any:
    """Returns the tracer of the export in progress, which has its graph; ``None`` outside of any."""
    mode = proxy_tensor.get_proxy_mode()
    return None if mode is None else mode.tracer


def modules_in_export() -> dict[Any, Any]:
    """Returns the modules that run in the export in progress, the innermost last. One that raises is not taken off."""
    return getattr(tracer_of_export(), "module_stack", {})


def recorded_node(tensor: torch.Tensor, tracer: Any) -> torch.fx.Node | None:
    """Returns the node that a tracer has recorded for a tensor."""
    slot: Any = proxy_tensor.get_proxy_slot(tensor, tracer, None)
    return None if slot is None else slot.proxy.node


def track_as(tensor: torch.Tensor, node: torch.fx.Node, tracer: Any) -> None:
    """Makes a tensor stand for a node of a tracer."""
    proxy_tensor.track_tensor(tensor, torch.fx.Proxy(node, tracer), constant=None, tracer=tracer)


def node_in_make_fx(tensor: torch.Tensor) -> torch.fx.Node:
    """Returns the node for a tensor in the innermost trace of ``make_fx``."""
    node = recorded_node(tensor, tracer_of_export())
    assert node is not None
    return node


__all__ = [
    "BackwardHook",
    "CheckpointFunction",
    "DisableTorchFunctionSubclass",
    "FakeTensor",
    "FakeTensorMode",
    "SingleLevelFunction",
    "StorageWeakRef",
    "StridedShard",
    "TorchDispatchMode",
    "add_dtensor_handlers",
    "annotate",
    "BatchNorm",
    "batch_norm_forward",
    "checkpoint_module",
    "cloned_store",
    "call_with_hooks",
    "cpp_compiler",
    "current_dispatch_modes",
    "current_graph_task",
    "disable_current_modes",
    "failed_toolchain",
    "copy_each",
    "foreach_norm",
    "function_modes",
    "functorch_apis",
    "functorch_transforms",
    "fused_attention_choice",
    "has_side_effect",
    "make_fx",
    "module_call_code",
    "module_calls",
    "is_captured_alone",
    "modules_in_export",
    "job_timeout",
    "no_function_modes",
    "no_saved_tensors_hooks",
    "node_in_make_fx",
    "preserve_node_meta",
    "pytree",
    "queue_callback",
    "recorded_node",
    "replace_dtensor_handler",
    "set_grad_mode",
    "return_and_correct_aliasing",
    "set_group_timeout",
    "tracer_of_export",
    "transformer_module",
    "transforms_are_active",
    "track_as",
    "untraceable",
    "will_execute_node",
    "wrapper_tensor",
    "within_function_modes",
]


def worker_processes(agent: Any) -> dict[int, Any]:
    """Returns the processes that a ``LocalElasticAgent`` has started last, by local rank."""
    context = agent._pcontext
    return {} if context is None else {rank: handler.proc for rank, handler in context.subprocess_handlers.items()}


def end_workers(agent: Any, seconds: float, number: Any = None) -> None:
    """Ends the processes of a ``LocalElasticAgent``, and kills those that are still there after some seconds.

    Args:
        agent: the agent.
        seconds: between the two.
        number: signal by which they are to end; default: ``SIGTERM``.
    """
    if agent._pcontext is not None:
        agent._pcontext.close(number, int(seconds))
