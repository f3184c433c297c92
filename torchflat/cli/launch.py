"""Processes started by torchrun: they find each other, and the first one speaks for all."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator

__all__ = ["joined"]

# torchrun ends all processes as soon as one has failed: the others give rank 0 this long to have its say.
LAST_WORDS = datetime.timedelta(seconds=60)


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Inside the block, be a member of the process group that torchrun's environment variables describe, if any.

    CUDA devices are dealt out, so that ``cuda`` is another one in each process, and reduced over by NCCL; the CPU, and
    devices that several processes share, by gloo. All ranks but 0 print nothing.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or "MASTER_ADDR" not in os.environ:
        yield
        return
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    store, rank, size = next(rendezvous("env://"))
    devices = torch.cuda.device_count()
    if devices:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)) % devices)
    shared = int(os.environ.get("LOCAL_WORLD_SIZE", size)) > devices
    dist.init_process_group("gloo" if shared else "cpu:gloo,cuda:nccl", store=store, rank=rank, world_size=size)
    try:
        with contextlib.ExitStack() as stack:
            if rank > 0:
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
                stack.enter_context(contextlib.redirect_stderr(nowhere))
            yield
    finally:
        if rank == 0:
            store.set("torchflat/said", "")
        else:
            with contextlib.suppress(dist.DistStoreError):
                store.wait(["torchflat/said"], LAST_WORDS)
        dist.destroy_process_group()
