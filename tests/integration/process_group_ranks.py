"""What the processes of `test_process_group` do; a module of its own, so that they can import it."""

from __future__ import annotations

import gc
import os
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bigray.training.answers import Address
from bigray.training.membership import Place
from bigray.training.process_group import open_sockets, process_group


def serve(connection: Connection, folder: str) -> None:
    """Take a seat in one generation after another, as told: a place, and what to do there ("leave": nothing)."""
    torch.set_num_threads(1)
    kept: list[Any] = []  # what failed is not let go of, as a traceback or a wrapper may not be in a worker
    while (order := connection.recv()) is not None:
        place, action = order
        try:
            with process_group(place, "gloo", publisher(place, folder), lambda: look_up(place, folder)):  # noqa: B023
                ddp = DistributedDataParallel(nn.Linear(64, 64))
                kept.append(ddp)
                total = torch.tensor(float(place.rank))
                dist.all_reduce(total)
                environment = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
                connection.send({"sum": total.item(), "environment": environment})
                act(action, ddp)
        except Exception as error:
            kept.append(error)
            connection.send({"error": error})
        else:
            kept.clear()
            gc.collect()  # a wrapper is in cycles with its hooks
            connection.send({"num_sockets": settled_sockets()})


def settled_sockets() -> int:
    """How many sockets are open once gloo's thread, which closes them a moment later, has had time to."""
    fewest, quiet_until = len(open_sockets()), time.monotonic() + 1.0
    while time.monotonic() < quiet_until:
        time.sleep(0.01)
        if (number := len(open_sockets())) < fewest:
            fewest, quiet_until = number, time.monotonic() + 1.0
    return fewest


def act(action: str, ddp: nn.Module) -> None:
    """Go wrong or wait for the one that does."""
    match action:
        case "raise":
            time.sleep(0.5)  # the others are inside the collective by then
            raise ValueError("this rank's own error")
        case "die":
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)
        case "reduce":
            dist.all_reduce(torch.zeros(1000))
        case "train":
            ddp(torch.ones(2, 64)).sum().backward()


def publisher(place: Place, folder: str) -> Any:
    def publish(address: Address) -> None:
        unnamed = Path(folder, f"unnamed-{place.generation}")
        unnamed.write_text(f"{address.host} {address.port}")
        unnamed.rename(Path(folder, str(place.generation)))

    return publish


def look_up(place: Place, folder: str) -> Address:
    while not (path := Path(folder, str(place.generation))).exists():
        time.sleep(0.01)
    host, port = path.read_text().split()
    return Address(host, int(port))
