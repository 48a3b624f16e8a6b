"""Two copies of a batch under tensor parallelism: while one waits for its sums, the other computes.

python examples/multi_copy.py
torchrun --nproc-per-node 2 examples/multi_copy.py
"""

import copy
import os

import torch
from torch import Tensor, nn

import shardwright as sw


class Network(nn.Module):
    def __init__(self, blocks: int = 2, dim: int = 16):
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(dim, 4 * dim) for _ in range(blocks))
        self.down = nn.ModuleList(nn.Linear(4 * dim, dim) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for up, down in zip(self.up, self.down):
            x = x + down(torch.relu(up(x)))
        return x.square().mean()


def main() -> None:
    started = {"RANK", "SHARDWRIGHT_DEVICES"} & set(os.environ)
    world = sw.init() if started else sw.init(devices=8)
    torch.manual_seed(0)
    net = sw.MicroBatchInterleaved(Network().double(), interleave_num=2)
    single = copy.deepcopy(net.network)  # the whole batch at once
    layout = sw.Layout((world.size,), ("tp",))
    weights = {f"up.{i}.weight": layout("tp", "None") for i in range(2)} | {f"up.{i}.bias": layout("tp") for i in range(2)}
    weights |= {f"down.{i}.weight": layout("None", "tp") for i in range(2)}
    sw.shard(net.network, (layout("None", "None"),), parameter_plan=weights)
    parallel = sw.AutoParallel(net)
    x = torch.randn(8, 16, dtype=torch.float64)
    parallel.compile(x)
    with sw.record_communication() as log:
        loss = parallel(x)
        loss.backward()
    expected = single(x)
    expected.backward()
    gradients = zip(single.parameters(), net.network.parameters(), strict=True)
    worst = max(float((a.grad - sw.full_value(b.grad)).abs().max()) for a, b in gradients)
    if world.rank == 0:
        travelling = [e for e in log.events if any(m.kind == "call" for m in log.meanwhile(e))]
        for event in travelling:
            calls = {m.what for m in log.meanwhile(event) if m.kind == "call"}
            print(f"{event.phase:8} {event.kind} of {event.edge}: meanwhile {len(calls)} operators ran")
        print(f"{len(travelling)} of {log.count()} collectives travelled while the other copy computed")
        print(f"matches single device: loss {abs(float((loss - expected).detach())):.2e}, gradients {worst:.2e}")


if __name__ == "__main__":
    main()
