"""Two encoders trained against each other: forwards of both, then backwards of both, in any order.

    python contrastive.py
    torchrun --nproc_per_node 2 contrastive.py

Two forwards before two backwards let the original's replicas drift apart, in silence. Here nothing is armed in a
forward, and the replicas are compared at the end. (The loss contrasts within a micro-batch; for one that contrasts
over the whole macro-batch, see `macrobatch.TwoPass`.)
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader

from macrobatch.accelerate import Accelerator
from macrobatch.accelerate.utils import set_seed

TEMPERATURE = 0.1


def main() -> None:
    set_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=4)
    left, right = (nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16)) for _ in range(2))
    optimizer = torch.optim.AdamW([*left.parameters(), *right.parameters()], lr=1e-2)
    images = torch.tensor(load_digits().data / 16, dtype=torch.float32)
    loader = DataLoader(images, batch_size=64, shuffle=True, drop_last=True)
    left, right, optimizer, loader = accelerator.prepare(left, right, optimizer, loader)

    losses = []
    for _ in range(2):
        for image in loader:
            with accelerator.accumulate(left, right):
                a, b = F.normalize(left(image[:, :32])), F.normalize(right(image[:, 32:]))
                again = F.normalize(left(image[:, :32] + 0.05 * torch.randn_like(image[:, :32])))
                pairs = torch.arange(len(image), device=image.device)
                between = F.cross_entropy(a @ b.T / TEMPERATURE, pairs)
                within = F.cross_entropy(a @ again.T / TEMPERATURE, pairs)
                accelerator.backward(between, retain_graph=True)
                accelerator.backward(within)
                accelerator.clip_grad_norm_([*left.parameters(), *right.parameters()], 1.0)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(between.detach())

    checksum = torch.stack([p.detach().double().abs().sum() for m in (left, right) for p in m.parameters()]).sum()
    checksums = accelerator.gather(checksum.reshape(1)).tolist()
    first, last = torch.stack(losses[:5]).mean().item(), torch.stack(losses[-5:]).mean().item()
    accelerator.print(f"loss {first:.3f} to {last:.3f}; replicas are equal: {len(set(checksums)) == 1}")


if __name__ == "__main__":
    main()
