"""In the shape of trainers of adversarial networks: two models with an optimizer each, one update of both per batch."""

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed, tqdm
from torch import nn
from torch.utils.data import DataLoader

RUNS = [[], ["wrapped"]]


def main(arguments: list[str]) -> dict[str, Any]:
    handlers = [DistributedDataParallelKwargs(broadcast_buffers=False)] if "wrapped" in arguments else []
    accelerator = Accelerator(cpu=True, kwargs_handlers=handlers)
    set_seed(4)
    generator = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    critic = nn.Sequential(nn.Linear(2, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))
    optimizer_g = torch.optim.Adam(generator.parameters(), lr=1e-2)
    optimizer_d = torch.optim.Adam(critic.parameters(), lr=1e-2)
    loader = DataLoader(torch.randn(32, 2), batch_size=4, drop_last=True)
    generator, critic, optimizer_g, optimizer_d, loader = accelerator.prepare(
        generator, critic, optimizer_g, optimizer_d, loader
    )
    criterion = nn.BCEWithLogitsLoss()
    history = []
    for real in tqdm(loader):
        ones, zeros = torch.ones(len(real), 1), torch.zeros(len(real), 1)
        noise = torch.sin(torch.arange(float(4 * len(real)))).view(-1, 4) * real[:, :1]
        with accelerator.accumulate(critic):
            fake = generator(noise)
            loss_d = (criterion(critic(torch.cat([real, fake.detach()])), torch.cat([ones, zeros]))) / 2
            accelerator.backward(loss_d)
            optimizer_d.step()
            optimizer_d.zero_grad()
        with accelerator.accumulate(generator):
            for param in critic.parameters():
                param.requires_grad_(False)
            loss_g = criterion(critic(generator(noise)), ones)
            accelerator.backward(loss_g)
            optimizer_g.step()
            optimizer_g.zero_grad()
            for param in critic.parameters():
                param.requires_grad_(True)
        losses = accelerator.gather(torch.stack([loss_d.detach(), loss_g.detach()]))
        history.append([round(x, 4) for x in losses.tolist()])
    models = [accelerator.unwrap_model(model) for model in (generator, critic)]
    return {"history": history, "weights": [p.detach().clone() for m in models for p in m.parameters()]}
