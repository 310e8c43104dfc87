"""ResNet-34 with the trainer and its hooks.

    python -m torch.distributed.launch --nproc_per_node 1 --master_addr localhost --master_port 29500 \
        run_resnet_cifar10_with_trainer.py [--epochs 200] [--max_steps 8] [--checkpoint_dir folder]
"""

from pathlib import Path

import torch
from data import load
from resnet import resnet34

import macrobatch.colossalai as colossalai
from macrobatch.colossalai.core import global_context as gpc
from macrobatch.colossalai.logging import get_dist_logger
from macrobatch.colossalai.nn.lr_scheduler import CosineAnnealingLR
from macrobatch.colossalai.nn.metric import Accuracy
from macrobatch.colossalai.trainer import Trainer, hooks
from macrobatch.colossalai.utils import MultiTimer, get_dataloader


def main() -> None:
    parser = colossalai.get_default_parser()
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--max_steps", type=int)
    parser.add_argument("--checkpoint_dir")
    options = parser.parse_args()
    colossalai.launch_from_torch(config=options.config or Path(__file__).with_name("config.py"), verbose=False)
    logger = get_dist_logger()

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

    timer = MultiTimer()
    trainer = Trainer(engine=engine, timer=timer, logger=logger)
    hook_list = [
        hooks.LossHook(),
        hooks.AccuracyHook(accuracy_func=Accuracy()),
        hooks.LRSchedulerHook(lr_scheduler=lr_scheduler, by_epoch=True),
        hooks.ThroughputHook(),
        hooks.LogMetricByEpochHook(logger),
        hooks.LogMetricByStepHook(),
        hooks.LogTimingByEpochHook(timer, logger),
    ]
    if options.checkpoint_dir:
        hook_list.append(hooks.SaveCheckpointHook(checkpoint_dir=options.checkpoint_dir))
    trainer.fit(
        train_dataloader=train_dataloader,
        epochs=options.epochs or gpc.config.NUM_EPOCHS,
        max_steps=options.max_steps,
        test_dataloader=test_dataloader,
        test_interval=1,
        hooks=hook_list,
        display_progress=True,
    )
    logger.info(f"{engine.num_iterations} micro-iterations, {engine.num_updates} updates", ranks=[0])


if __name__ == "__main__":
    main()
