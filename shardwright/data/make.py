"""Makes a loader from its arguments, which are checked before anything is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler, default_collate

from shardwright.data.loading import Loader
from shardwright.data.order import Order, OrderFunction
from shardwright.data.strategy import check_dataset_strategy
from shardwright.errors import ArgumentTypeError, ShardwrightError

_TAKEN = ("batch_sampler", "sampler", "generator", "dataset")


def loader(
    dataset: Any,
    batch_size: int | None = None,
    *,
    net: Any = None,
    strategy: Any = None,
    shuffle: bool = False,
    seed: int = 0,
    drop_last: bool = False,
    num_workers: int = 0,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    transform: Callable[[Any], Any] | None = None,
    order: OrderFunction | None = None,
    seed_samples: bool = True,
    **options: Any,
) -> Loader:
    """Makes a loader of the batches that this rank gives to a net.

    The order of samples depends on ``seed`` and the epoch alone, whatever the number of ranks. The dataset strategy cuts each
    global batch. Where it slices dim 0, a rank reads its own samples only; slices of other dims are cut out of whole samples.
    In the simulated world, and under ``"full_batch"``, the batches are whole.

    Args:
        dataset: a data set with ``len`` and an index, an ``IterableDataset`` (all ranks see the same stream), or a
            ``DataLoader``, whose arguments hold where none are given here.
        batch_size: samples in a global batch.
        net: an ``AutoParallel``, whose ``dataset_strategy`` is followed.
        strategy: a dataset strategy to follow instead, one entry per tensor of a batch. Default: ``"full_batch"``.
        shuffle: whether each epoch has another order, which depends on ``seed``.
        drop_last: whether a shorter last batch is left out. If not, it is cut as by ``torch.chunk``, and some ranks may get
            no samples.
        num_workers: processes that read ahead; one at most for a stream.
        collate_fn: makes a batch from a list of samples, along dim 0. Default: torch's.
        transform: applied to each sample that the rank keeps.
        order: instead of ``shuffle``: a function from the epoch to the indices to read, the same on every rank.
        seed_samples: whether random draws of data set and transform depend on seed, epoch and sample alone, so that ranks
            with the same slice have the same.
        options: further arguments of ``DataLoader``: ``pin_memory``, ``prefetch_factor``, ...

    Returns:
        A :class:`Loader`: iterate over it once per epoch, on all ranks.

    Raises:
        ArgumentTypeError: an argument of the wrong type, or one that the loader decides itself.
        ShardwrightError: a value out of range, a stream with ``shuffle``, ``order`` or several workers.

    >>> import torch
    >>> from torch.utils.data import TensorDataset
    >>> for images, labels in loader(TensorDataset(torch.zeros(5, 4), torch.arange(5)), batch_size=3):
    ...     print(images.shape, labels)
    torch.Size([3, 4]) tensor([0, 1, 2])
    torch.Size([2, 4]) tensor([3, 4])
    """
    if isinstance(dataset, DataLoader):
        given = _arguments_of(dataset)
        batch_size = given["batch_size"] if batch_size is None else batch_size
        shuffle, drop_last = shuffle or given["shuffle"], drop_last or given["drop_last"]
        num_workers, collate_fn = num_workers or given["num_workers"], collate_fn or given["collate_fn"]
        dataset, options = dataset.dataset, {**{name: given[name] for name in _PASSED_ON}, **options}
    _check(dataset, batch_size, shuffle, seed, num_workers, order, options)
    _check_strategy(strategy, net)
    length = None if isinstance(dataset, IterableDataset) else len(dataset)
    where = Order(length, cast("int", batch_size), bool(shuffle), seed, bool(drop_last), order)
    options = {"num_workers": num_workers, **options}
    return Loader(dataset, where, net, strategy, collate_fn or default_collate, transform, seed_samples, options)


_PASSED_ON = (
    "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context", "prefetch_factor", "persistent_workers",
)  # fmt: skip


def _arguments_of(given: DataLoader[Any]) -> dict[str, Any]:
    """Reads the arguments of a ``DataLoader``. Anything with the same attributes will do, such as torchdata's."""
    shuffled = type(given.sampler) is RandomSampler and not given.sampler.replacement
    if given.batch_size is None or not (shuffled or type(given.sampler) is SequentialSampler or _is_stream(given.dataset)):
        raise ShardwrightError(
            f"loader({type(given).__name__}): it has a sampler of its own, {type(given.sampler).__name__}, whose order a rank "
            "cannot know; give the data set and order=, a function of the epoch"
        )
    return {**{name: getattr(given, name) for name in ("batch_size", "drop_last", "num_workers", "collate_fn")},
            "shuffle": shuffled, **{name: getattr(given, name) for name in _PASSED_ON}}  # fmt: skip


def _is_stream(dataset: Any) -> bool:
    return isinstance(dataset, IterableDataset)


def _check_strategy(strategy: Any, net: Any) -> None:
    if strategy is not None:
        check_dataset_strategy(strategy)
    elif net is not None and not hasattr(net, "dataset_strategy"):
        raise ArgumentTypeError(f"loader(net={net!r}): give an AutoParallel, or a strategy=")


def _check(dataset: Any, batch_size: Any, shuffle: Any, seed: Any, workers: Any, order: Any, options: dict[str, Any]) -> None:
    for name, number, least in (("batch_size", batch_size, 1), ("num_workers", workers, 0), ("seed", seed, 0)):
        if not isinstance(number, int) or isinstance(number, bool):
            raise ArgumentTypeError(f"loader({name}={number!r}): give an int")
        if not least <= number < 1 << 63:
            raise ShardwrightError(f"loader({name}={number}): give {least} or more, of 63 bits")
    if order is not None and not callable(order):
        raise ArgumentTypeError(f"loader(order={order!r}): give a function of the epoch that returns indices")
    if order is not None and shuffle:
        raise ShardwrightError("loader(shuffle=True, order=...): the two contradict each other; drop one")
    taken = [name for name in options if name in _TAKEN]
    if taken:
        raise ArgumentTypeError(f"loader({taken[0]}=...): the loader decides the order itself; give order=")
    if _is_stream(dataset):
        if shuffle or order is not None:
            raise ShardwrightError("loader: a stream has no order but its own; let the data set shuffle, by the epoch")
        if workers > 1 or options.get("persistent_workers"):
            raise ShardwrightError(
                f"loader(num_workers={workers}): every worker would read the whole stream, and none may outlive an epoch; "
                "use num_workers=1"
            )
    elif not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise ArgumentTypeError(
            f"loader({type(dataset).__name__}): give a data set with __len__ and __getitem__, or an IterableDataset"
        )
