"""ResNet-34 with the engine; the weights change in every fourth iteration.

    python -m torch.distributed.launch --nproc_per_node 1 --master_addr localhost --master_port 29500 \
        run_resnet_cifar10_with_engine.py

Shows the first parameter for the first four iterations. With the default seed the first three lines are
[-0.0208,  0.0189,  0.0234,  0.0047,  0.0116, -0.0283,  0.0071, -0.0359, -0.0267, -0.0006], and the fourth differs.
"""

from pathlib import Path

import torch
from data import load
from resnet import resnet34

import macrobatch.colossalai as colossalai
from macrobatch.colossalai.core import global_context as gpc
from macrobatch.colossalai.logging import get_dist_logger
from macrobatch.colossalai.nn.lr_scheduler import CosineAnnealingLR
from macrobatch.colossalai.utils import get_current_device, get_dataloader


def main() -> None:
    colossalai.launch_from_torch(config=Path(__file__).with_name("config.py"), verbose=False)
    logger = get_dist_logger()
    torch.set_printoptions(linewidth=200)

    model = resnet34(num_classes=10)
    train_dataset, test_dataset, what = load()
    logger.info(f"data: {what}", ranks=[0])
    train_dataloader = get_dataloader(dataset=train_dataset, shuffle=True, batch_size=gpc.config.BATCH_SIZE)
    test_dataloader = get_dataloader(dataset=test_dataset, add_sampler=False, batch_size=gpc.config.BATCH_SIZE)
    criterion = torch.nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    lr_scheduler = CosineAnnealingLR(optimizer, total_steps=gpc.config.NUM_EPOCHS)

    engine, train_dataloader, test_dataloader, lr_scheduler = colossalai.initialize(
        model, optimizer, criterion, train_dataloader, test_dataloader, lr_scheduler, verbose=False
    )

    engine.train()
    for iteration, (images, labels) in enumerate(train_dataloader):
        images, labels = images.to(get_current_device()), labels.to(get_current_device())
        engine.zero_grad()
        loss = engine.criterion(engine(images), labels)
        engine.backward(loss)
        engine.step()
        lr_scheduler.step()

        first = next(model.parameters()).detach().flatten()[:10]
        logger.info(f"iteration {iteration}, first 10 elements of param: {first}", ranks=[0])
        if iteration == 3:
            break


if __name__ == "__main__":
    main()
