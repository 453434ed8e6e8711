"""What three ranks do in the test of a rank that is late, and of a rank that is killed in the middle of a step."""

import datetime
import os
import pickle
import signal
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

import noetherflow as nf
from ranks import build, loss, parts_of

# Seconds: timeouts of the group of all ranks, and of the ranks 0 and 2, of which the latter comes after more than that.
PATIENCE, SHORT, LATE = 5.0, 2.0, 3.5
KILLED = 1


class Ended(NamedTuple):
    """The error that a rank met at the end of a step, and after how many seconds."""

    error: str
    seconds: float


def step(meter: Any, *, late: float = 0.0, killed: bool = False) -> Ended:
    (batch,) = parts_of([[4]])[0]
    model = meter._model
    start = time.monotonic()
    try:
        with meter.step(*([batch] if isinstance(meter, nf.NoiseMeter) else [])) as done:
            loss(model, batch).mean().backward()
            if done is not None:
                done(size=4)
            time.sleep(late)
            if killed:
                os.kill(os.getpid(), signal.SIGKILL)
    except nf.RankError as error:
        return Ended(str(error), time.monotonic() - start)
    return Ended("", time.monotonic() - start)


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    patience, short, start = (datetime.timedelta(seconds=seconds) for seconds in (PATIENCE, SHORT, 120.0))
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=3, timeout=start)
    pair, everyone = dist.new_group([0, 2], timeout=short), dist.new_group(timeout=patience)
    seen = {}
    dist.barrier()
    if rank != KILLED:
        seen["late"] = step(nf.MicrobatchMeter(build(), {}, group=pair), late=LATE if rank == 2 else 0.0)
    dist.barrier()
    meter = nf.NoiseMeter(build(), {}, group=everyone)
    seen["all there"] = step(meter)
    seen["killed"] = step(meter, killed=rank == KILLED)
    with open(folder / f"{rank}.pickle", "wb") as file:
        pickle.dump(seen, file)
    os._exit(0)  # a group that lost a rank is not worth waiting for
