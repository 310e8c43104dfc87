"""A generator and a discriminator, each with a window of its own: two blocks per micro-batch.

    python gan.py [--epochs 2]

In the original, both blocks count into one window: with 2 steps, the discriminator updates on every micro-batch with
half a gradient, and the generator hardly ever. The generator's backward goes through the discriminator, and does not
touch what that has accumulated.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader

from macrobatch.accelerate import Accelerator
from macrobatch.accelerate.utils import set_seed

LATENT = 8


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=2)
    options = parser.parse_args()
    set_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=2)
    generator = nn.Sequential(nn.Linear(LATENT, 64), nn.ReLU(), nn.Linear(64, 64), nn.Sigmoid())
    discriminator = nn.Sequential(nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1))
    optimizer_g = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.999))
    optimizer_d = torch.optim.Adam(discriminator.parameters(), lr=1e-3, betas=(0.5, 0.999))
    images = torch.tensor(load_digits().data / 16, dtype=torch.float32)
    loader = DataLoader(images, batch_size=64, shuffle=True)
    generator, discriminator, optimizer_g, optimizer_d, loader = accelerator.prepare(
        generator, discriminator, optimizer_g, optimizer_d, loader
    )
    criterion = nn.BCEWithLogitsLoss()

    num_updates = {"generator": 0, "discriminator": 0}
    for _ in range(options.epochs):
        for real in loader:
            fake = generator(torch.randn(len(real), LATENT, device=real.device))
            ones, zeros = torch.ones(len(real), 1, device=real.device), torch.zeros(len(real), 1, device=real.device)

            with accelerator.accumulate(discriminator):
                accelerator.backward(criterion(discriminator(real), ones))
                accelerator.backward(criterion(discriminator(fake.detach()), zeros))
                optimizer_d.step()
                optimizer_d.zero_grad()
                num_updates["discriminator"] += accelerator.sync_gradients

            with accelerator.accumulate(generator):
                accelerator.backward(criterion(discriminator(fake), ones))
                optimizer_g.step()
                optimizer_g.zero_grad()
                num_updates["generator"] += accelerator.sync_gradients

    per_epoch = -(-len(loader) // 2)
    accelerator.print(f"{len(loader)} micro-batches an epoch, {per_epoch} updates expected; made in all: {num_updates}")


if __name__ == "__main__":
    main()
