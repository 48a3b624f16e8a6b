"""Several kinds of parallelism at once: two stages of four devices, a searched strategy within each, optimizer parallelism,
recomputation, four micro-batches, and parameters that get their values at the first step.

python examples/multiple_mixed.py
"""

import torch
from torch import nn

import shardwright as sw


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.flatten = nn.Flatten()
        self.layer1, self.relu1 = nn.Linear(28 * 28, 512), nn.ReLU()
        self.layer2, self.relu2 = nn.Linear(512, 512), nn.ReLU()
        self.layer3 = nn.Linear(512, 1)

    def forward(self, x, label):
        x = self.relu1(self.layer1(self.flatten(x)))
        x = self.relu2(self.layer2(x))
        return nn.functional.mse_loss(self.layer3(x), label)


def train(target, parameters, batches):
    optimizer = torch.optim.SGD(parameters, 1e-2)
    losses = []
    for image, label in batches:
        loss = target(image, label)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main():
    sw.init(devices=8)
    batches = [(torch.randn(32, 1, 28, 28), torch.randn(32, 1)) for _ in range(4)]
    torch.manual_seed(0)
    with sw.no_init_parameters():
        model = Network()
    cell = sw.PipelineCell(model, 4, stage_config={"layer1": 0, "relu1": 0, "layer2": 1, "relu2": 1, "layer3": 1})
    net = sw.AutoParallel(cell, "recursive_programming").hsdp().pipeline(stages=2, scheduler="1f1b")
    net.recompute(["network.relu1", "network.relu2"])
    losses = train(net, model.parameters(), batches)

    torch.manual_seed(0)
    single = Network()
    expected = train(single, single.parameters(), batches)
    for step, (ours, theirs) in enumerate(zip(losses, expected)):
        print(f"step {step}  loss {ours:.5f}  single device {theirs:.5f}")
        assert abs(ours - theirs) < 1e-4
    print("\n".join(str(net.plan).splitlines()[:9]))


if __name__ == "__main__":
    main()
