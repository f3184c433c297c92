"""Several processes as one: which rows are whose, one reduction per pass, and faults that reach everyone.

All ranks run the same program on the same numbers and meet in reductions, after each of which they hold the same bits.
A rank that left the program alone, by an error or another decision, would leave the rest waiting for ever. So whatever
may end differently on one rank (evaluating its rows, reading a file, the clock, Ctrl-C) happens inside a block of
:class:`Team`, at the end of which all of them learn of it.
"""

from __future__ import annotations

import contextlib
import pickle
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from torchflat.errors import UsageError

__all__ = ["Bucket", "Team"]

Result = TypeVar("Result")

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Bucket:
    """What is added over the ranks at once: ``sums`` (length,) in float64, and a few ``numbers``.

    ``checksum`` (see :meth:`Team.checksum`) must come out the same on all ranks; ``same`` describes what it is of.
    """

    def __init__(
        self, team: Team, length: int = 0, numbers: int = 0, device: torch.device | None = None, same: str = ""
    ) -> None:
        # Behind the sums travel the numbers and, for each rank, a checksum and whether it failed.
        extra = 0 if team.size == 1 else numbers + 2 * team.size
        self.whole = torch.zeros(length + extra, dtype=torch.float64, device=device or team.device)
        self.sums = self.whole[:length]
        self.numbers = [0.0] * numbers
        self.checksum, self.same = 0.0, same


class Team:
    """The processes that share the rows of the data; one process without others is a team too, whose methods are free.

    ``rank`` of ``size``; ``first`` on rank 0. Every method but :meth:`share` and :meth:`checksum` must be called by all
    ranks in the same order.

    >>> team = Team.alone()
    >>> bucket = Bucket(team, length=2)
    >>> with team.summed(bucket):
    ...     bucket.sums += torch.tensor([1.0, 2.0])
    >>> bucket.sums.tolist(), team.share(10), team.on_first(lambda: "read once")
    ([1.0, 2.0], range(0, 10), 'read once')
    """

    def __init__(self, group: dist.ProcessGroup | None, rank: int, size: int, device: torch.device) -> None:
        self.group, self.rank, self.size, self.device = group, rank, size, device

    # Signals come to the process, whichever team it is at work in.
    _working: ClassVar[bool] = False
    _interrupted: ClassVar[bool] = False

    @classmethod
    def alone(cls) -> Team:
        """Make the team of this process only."""
        return cls(None, 0, 1, torch.device("cpu"))

    @classmethod
    def of(cls, group: dist.ProcessGroup | str | None, device: torch.device | None = None) -> Team:
        """Make the team of a process group whose ranks compute on ``device``.

        ``None`` is the default group if torch.distributed is initialised, and this process alone otherwise; ``"alone"``
        is this process alone in any case.

        Raises:
            UsageError: this process is not in the group, or its backend cannot reduce tensors on the device.
        """
        if isinstance(group, str) and group != "alone":
            raise UsageError(f"group={group!r}: it must be a process group, None or 'alone'")
        if group == "alone" or not (dist.is_available() and dist.is_initialized()):
            return cls.alone()
        assert not isinstance(group, str)
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        if rank < 0:
            raise UsageError("this process is not a member of the process group: call with it on its members only")
        if size == 1:
            return cls.alone()
        backends = dist.BackendConfig(dist.Backend(dist.get_backend_config(group))).get_device_backend_map()
        if device is not None and device.type not in backends:
            raise UsageError(
                f"the process group has no backend for tensors on {device.type}: "
                "call torch.distributed.init_process_group('cpu:gloo,cuda:nccl')"
            )
        return cls(group, rank, size, torch.device("cpu" if "cpu" in backends else "cuda"))

    @property
    def first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Which of ``count`` things in a row are this rank's: a contiguous range, even to one thing, maybe empty.

        >>> [Team(None, rank, 3, torch.device("cpu")).share(7) for rank in range(3)]
        [range(0, 2), range(2, 4), range(4, 7)]
        """
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    @contextlib.contextmanager
    def summed(self, bucket: Bucket) -> Iterator[None]:
        """Let each rank fill its bucket inside the block; behind it, all buckets hold the sum. One reduction.

        An error on any rank is raised on all: that of the lowest rank that had one. The block must not wait for other
        ranks in any other way.

        Raises:
            UsageError: the checksums differ.
        """
        if self.size == 1:
            yield
            return
        error: BaseException | None = None
        try:
            Team._working = True
            if Team._interrupted:
                raise KeyboardInterrupt
            yield
            Team._working = False
        except BaseException as caught:
            error, Team._working = caught, False
        self._reduce(bucket, error)
        checksums, failed = self._tail(bucket)
        if any(failed):
            self._raise(error)
        if len(set(checksums)) > 1:
            raise UsageError(
                f"{bucket.same} must be the same on all {self.size} processes, and differs: give all of them the same "
                "arguments, data and seeds, the same kind of device, and the same number of threads"
            )

    def together(self) -> contextlib.AbstractContextManager[None]:
        """Let each rank do something of its own inside the block; an error on any rank is raised on all."""
        return self.summed(Bucket(self))

    def anywhere(self, condition: Callable[[], object]) -> bool:
        """Whether ``condition()`` is true on any rank."""
        bucket = Bucket(self, numbers=1)
        with self.summed(bucket):
            bucket.numbers[0] = float(bool(condition()))
        return bucket.numbers[0] > 0

    def on_first(self, work: Callable[[], Result]) -> Result:
        """Do ``work`` on rank 0 only, and return its result, which can be pickled, on all ranks."""
        result: list[Any] = [None]
        with self.together():
            if self.first:
                result = [work()]
        if self.size > 1:
            dist.broadcast_object_list(result, group=self.group, group_src=0)
        answer: Result = result[0]
        return answer

    def checksum(self, tensors: Sequence[Tensor]) -> float:
        """Return a number that differs, but for rare chance, where a bit of the tensors does; 0 in a team of one."""
        if self.size == 1:
            return 0.0
        # Sums of integers do not depend on their order, hence neither on the device nor on the number of threads.
        bits = (tensor.detach().view(_INTEGERS[tensor.element_size()]) for tensor in tensors)
        return float(sum(int(pattern.sum(dtype=torch.int64)) for pattern in bits) % 2**52)

    @contextlib.contextmanager
    def interrupted_together(self) -> Iterator[None]:
        """Make Ctrl-C, inside the block, take effect on all ranks at the same place: the end of the pass at hand."""
        if self.size == 1 or threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, self._interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    @staticmethod
    def _interrupt(*signal_and_frame: object) -> None:
        if Team._working:
            raise KeyboardInterrupt
        Team._interrupted = True

    def _reduce(self, bucket: Bucket, error: BaseException | None) -> None:
        own = torch.zeros(2, self.size, dtype=torch.float64)
        own[:, self.rank] = torch.tensor([bucket.checksum, float(error is not None)], dtype=torch.float64)
        tail = torch.cat([torch.tensor(bucket.numbers, dtype=torch.float64), own.reshape(-1)])
        bucket.whole[len(bucket.sums) :] = tail.to(bucket.whole.device)
        dist.all_reduce(bucket.whole, group=self.group)

    def _tail(self, bucket: Bucket) -> tuple[list[float], list[float]]:
        """Read the numbers back, and return the checksum and the failure of each rank."""
        values = bucket.whole[len(bucket.sums) :].tolist()
        count = len(bucket.numbers)
        bucket.numbers = values[:count]
        return values[count : count + self.size], values[count + self.size :]

    def _raise(self, error: BaseException | None) -> None:
        """Raise the error of the lowest rank that has one, on all ranks."""
        told: list[BaseException | None] = [None] * self.size
        dist.all_gather_object(told, _portable(error), group=self.group)
        rank, found = next((rank, found) for rank, found in enumerate(told) if found is not None)
        found = error if rank == self.rank and error is not None else found
        if isinstance(found, KeyboardInterrupt):
            Team._interrupted = False
        elif None in told and len(found.args) == 1:
            found.args = (f"{found} (on process {rank} of {self.size})",)
        raise found


def _portable(error: BaseException | None) -> BaseException | None:
    """Return the error itself if it survives being sent, else one that says the same."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
