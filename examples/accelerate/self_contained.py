"""One weight, eight samples, one update: accumulated in micro-batches of two, and from the whole batch at once.

    python self_contained.py
    torchrun --nproc_per_node 2 self_contained.py

Both weights are 2.04000, on one rank and on two. The weight is a bare tensor, not a module: on two ranks the original
leaves it unsynchronised and ends at 0.66 and 1.38.
"""

import copy

import torch
from torch.utils.data import DataLoader, TensorDataset

from macrobatch.accelerate import Accelerator
from macrobatch.accelerate.utils import set_seed

set_seed(0)
gradient_accumulation_steps = 4

x = torch.arange(1.0, 9.0)
y = 2 * x
weight = torch.zeros((1, 1), requires_grad=True)
whole_batch_weight = copy.deepcopy(weight)
loss_fn = torch.nn.MSELoss()

accelerator = Accelerator(gradient_accumulation_steps=gradient_accumulation_steps)
loader = DataLoader(TensorDataset(x, y), batch_size=len(x) // gradient_accumulation_steps)
optimizer = torch.optim.SGD([weight], lr=0.02)
weight, optimizer, loader = accelerator.prepare(weight, optimizer, loader)

for inputs, targets in loader:
    with accelerator.accumulate(weight):
        loss = loss_fn(inputs.view(-1, 1) @ weight, targets.view(-1, 1))
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()

optimizer = torch.optim.SGD([whole_batch_weight], lr=0.02)
loss_fn(x.view(-1, 1) @ whole_batch_weight, y.view(-1, 1)).backward()
optimizer.step()

# One call, so that the lines of several ranks do not run into each other.
print(
    f"with accumulation, the weight is {weight.item():.5f}\n"
    f"from the whole batch, the weight is {whole_batch_weight.item():.5f}\n",
    end="",
    flush=True,
)
