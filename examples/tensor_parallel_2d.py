"""Two products in two dimensions: bytes against the closed form, and what each of the x * y devices holds.

python tensor_parallel_2d.py, or torchrun --nproc-per-node 8 tensor_parallel_2d.py
"""

import torch
from torch import nn

import shardwright as sw

X, Y = 2, 4  # devices along each axis
ROWS, H, E = 1024, 256, 512

sw.init(devices=X * Y)
layout = sw.Layout((X, Y), ("x", "y"))


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.randn(H, E) / H**0.5), nn.Parameter(torch.randn(E, H) / E**0.5)
        self.matmul1 = sw.ops.MatMul().add_prim_attr("enable_nd_tp", True)
        self.matmul1.shard((layout("None", ("x", "y")), layout("x", "y")))
        self.relu = sw.ops.ReLU().shard((layout("None", ("y", "x")),))
        self.matmul2 = sw.ops.MatMul().add_prim_attr("enable_nd_tp", True)
        self.matmul2.shard((layout("None", ("y", "x")), layout("y", "x")))

    def forward(self, x):
        return self.matmul2(self.relu(self.matmul1(x, self.w1)), self.w2)


torch.manual_seed(0)
x, network = torch.randn(ROWS, H, requires_grad=True), Network()
expected = network(x).detach()
net = sw.AutoParallel(network)
with sw.record_communication() as log:
    y = net(x)
    y.sum().backward()

sent = {phase: 0 for phase in ("forward", "backward")}
for event in log.events:
    if event.cause in ("matmul", "matmul1"):  # not the input's gradient and the result, which are made whole
        sent[event.phase] += event.bytes
form = 4 * 2 * ROWS * (E * (X - 1) + H * (Y - 1)) // (X * Y)
for value, name in (("matmul_at_rest_0", "input"), ("relu", "middle"), ("matmul1", "output")):
    shape, held = net.plan.graph.metas[value].shape, net.plan.choices[value].outputs[0]
    print(f"{name} {list(shape)}: {held.short()}, {list(held.local_shape(shape, 0))} a device")
for i in net.plan.graph.inputs:
    if i.kind == "parameter":
        held = net.plan.input_layouts[i.value]
        print(f"{i.target} {list(i.meta.shape)}: {held.short()}, {list(held.local_shape(i.meta.shape, 0))} a device")
print(f"bytes a device sends: {sent['forward']} forward, {sent['backward']} backward; closed form: {form}")
assert sent == {"forward": form, "backward": form}
torch.testing.assert_close(y.detach(), expected, atol=1e-4, rtol=1e-4)
print("matches single device")
