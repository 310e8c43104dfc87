"""Ray Train: Ray starts the workers and makes their group; launch.init() only tells each its ranks.

python ray_train.py --num-workers 2
"""

# pyright: reportMissingImports=false
import argparse
from pathlib import Path

import ray
import torch
import train
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer, get_device


def worker(config: dict[str, int]) -> None:
    if torch.cuda.is_available():
        torch.cuda.set_device(get_device())
    train.train(config["epochs"])


def main(num_workers: int, epochs: int) -> None:
    # Workers import train.py from a copy of this folder.
    ray.init(runtime_env={"working_dir": str(Path(__file__).parent)})
    scaling = ScalingConfig(num_workers=num_workers, use_gpu=torch.cuda.is_available())
    TorchTrainer(worker, train_loop_config={"epochs": epochs}, scaling_config=scaling).fit()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-workers", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=2)
    options = parser.parse_args()
    main(options.num_workers, options.epochs)
