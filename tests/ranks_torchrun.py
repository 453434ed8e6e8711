"""Training under torchrun: `python -m torch.distributed.run --standalone --nproc-per-node 2 ranks_torchrun.py`.

With the argument `killed`, rank 1 is killed in the middle of the third step.
"""

import datetime
import os
import signal
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import noetherflow as nf
from ranks import build, loss, parts_of


def main(*, killed: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    model = build()
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    watch = nf.NoiseScale(model, optimizer=optimizer, every=1, group=dist.group.WORLD)
    (batch,) = parts_of([[6], [6]])[dist.get_rank()]
    for step in range(3):
        optimizer.zero_grad()
        with watch.step(batch):
            loss(ddp, batch).mean().backward()
            if killed and step == 2 and dist.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)
        optimizer.step()
    # In a single write, or the lines of two ranks are mixed.
    sys.stdout.write(f"rank {dist.get_rank()} trace {watch.metrics()['noise/trace'].hex()}\n")
    sys.stdout.flush()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(killed="killed" in sys.argv)
