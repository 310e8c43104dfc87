"""Train on handwritten digits: the same script on one process, on many GPUs and on many machines.

    python train.py
    macrobatch launch --nproc 2 train.py
    srun --ntasks 4 python train.py

Each update sees the same 256 samples, whoever computes them, so the last line is the same for every number of ranks.
The model is in double precision, so that you can compare many digits of it.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn

import macrobatch as mb
from macrobatch import launch

MACRO_BATCH = 256  # samples per update, over all ranks
MICRO_BATCH = 48  # samples per forward and backward, on one rank


def loss_fn(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> mb.Loss:
    images, labels = batch
    return mb.cross_entropy(model(images), labels)


def train(epochs: int = 2) -> float:
    ranks = launch.init()  # from torchrun, Slurm, mpirun, ... or alone
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")

    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float64, device=device) / 16
    labels = torch.tensor(labels, device=device)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 10)).to(device, torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    step = mb.TrainStep(model, optimizer, loss_fn, micro_batch=MICRO_BATCH)

    loss = float("nan")
    for epoch in range(epochs):
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(epoch)).to(device)
        for macro_batch in order.split(MACRO_BATCH):
            mine = macro_batch[ranks.rank :: ranks.world_size]  # any share will do, of any size
            result = step((images[mine], labels[mine]) if len(mine) else None)
            loss = result.loss
        if ranks.is_main:
            print(f"epoch {epoch + 1}: loss {loss:.4f}", flush=True)
    if ranks.is_main:
        print(f"final loss {loss:.10f}", flush=True)
    return loss


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--local-rank", type=int, help="passed by torch.distributed.launch; not needed")
    train(parser.parse_args().epochs)
