"""CIFAR-10 from its standard python batches under $DATA or, where they are not, scikit-learn's digits in colour."""

import io
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


class Images(Dataset):
    """Images (3, 32, 32) and classes; augmented by a shifted crop and a flip, if they are for training."""

    def __init__(self, images: Tensor, labels: Tensor, *, augment: bool) -> None:
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        self.images, self.labels, self.augment = (images.float() / 255 - mean) / std, labels, augment

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self.images[index]
        if self.augment:
            top, left = torch.randint(0, 9, (2,)).tolist()
            image = torch.nn.functional.pad(image, (4, 4, 4, 4))[:, top : top + 32, left : left + 32]
            image = image.flip(2) if torch.rand(()) < 0.5 else image
        return image, self.labels[index]


def load() -> tuple[Dataset, Dataset, str]:
    """Training data, test data, and what they are."""
    folder = Path(os.environ.get("DATA", "data")) / "cifar-10-batches-py"
    if folder.is_dir():
        train = [_batch(folder / f"data_batch_{number}") for number in range(1, 6)]
        images, labels = (torch.cat(parts) for parts in zip(*train, strict=True))
        test = _batch(folder / "test_batch")
        return Images(images, labels, augment=True), Images(*test, augment=False), f"CIFAR-10 from {folder}"
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images * (255 / 16)).round().to(torch.uint8).unsqueeze(1).expand(-1, 3, 8, 8)
    images = torch.nn.functional.interpolate(images.float(), size=(32, 32)).to(torch.uint8)
    labels = torch.tensor(digits.target)
    what = f"scikit-learn's digits as 32 x 32 colour images, since there is no {folder}"
    return Images(images[:1536], labels[:1536], augment=True), Images(images[1536:], labels[1536:], augment=False), what


def _batch(path: Path) -> tuple[Tensor, Tensor]:
    content = _Arrays(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    images = torch.from_numpy(np.ascontiguousarray(content["data"])).view(-1, 3, 32, 32)
    return images, torch.tensor(content["labels"])


class _Arrays(pickle.Unpickler):
    """Reads plain values and NumPy arrays, and refuses everything else: a pickle may run any code."""

    def find_class(self, module: str, name: str) -> Any:
        kinds = {"_reconstruct": np.zeros(0).__reduce__()[0], "ndarray": np.ndarray, "dtype": np.dtype}
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes in an old protocol
            return lambda text, _: text.encode("latin1")
        if name not in kinds or module not in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray"):
            raise pickle.UnpicklingError(f"{module}.{name} is not part of a CIFAR-10 batch")
        return kinds[name]
