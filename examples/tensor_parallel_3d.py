"""Two linear layers in three dimensions, configured by name: bytes against the closed form.

python tensor_parallel_3d.py, or torchrun --nproc-per-node 8 tensor_parallel_3d.py
"""

import torch
from torch import nn

import shardwright as sw

X, Y, Z = 2, 2, 2  # devices along each axis
ROWS, H, E = 512, 256, 1024

sw.init(devices=X * Y * Z)
layout = sw.Layout((X, Y, Z), ("x", "y", "z"))

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(H, E, bias=False), nn.ReLU(), nn.Linear(E, H, bias=False))
x = torch.randn(ROWS, H, requires_grad=True)
expected = model(x).detach()

# a linear layer's weight is (out, in), so its layout is the transposed one
net = sw.AutoParallel(model).shard(
    {
        "0": {"in_strategy": (layout(("z", "y"), "x"), layout("y", ("x", "z"))), "attributes": {"enable_nd_tp": True}},
        "1": (layout(("z", "x"), "y"),),
        "2": {"in_strategy": (layout(("z", "x"), "y"), layout("x", ("y", "z"))), "attributes": {"enable_nd_tp": True}},
    }
)
with sw.record_communication() as log:
    y = net(x)
    y.sum().backward()

print("forward")
sent = {phase: 0 for phase in ("forward", "backward")}
for event in log.events:
    if event.cause in ("linear", "linear1"):  # not the input's gradient and the result, which are made whole
        sent[event.phase] += event.bytes
        if event.phase == "forward":
            print(f"  {event.cause}: {event.kind} of {list(event.shape)} over {event.axes[0]}, {event.bytes} bytes")
for i in net.plan.graph.inputs:
    if i.kind == "parameter":
        held = net.plan.input_layouts[i.value]
        print(f"{i.target} {list(i.meta.shape)}: {held.short()}, {list(held.local_shape(i.meta.shape, 0))} a device")
form = 4 * 2 * (ROWS * E * (X - 1) + ROWS * H * (Y - 1) + H * E * (Z - 1)) // (X * Y * Z)
print(f"bytes a device sends: {sent['forward']} forward, {sent['backward']} backward; closed form: {form}")
assert sent == {"forward": form, "backward": form}
torch.testing.assert_close(y.detach(), expected, atol=1e-4, rtol=1e-4)
print("matches single device")
