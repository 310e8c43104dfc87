"""Handwritten digits that come with scikit-learn: 1,797 real images of 8 × 8 pixels, no download.

Shape letters: N samples of a set, C channels (1), H height (8), W width (8).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, TensorDataset

from macrobatch.demo.options import DemoOptions

__all__ = ["Digits", "EpochWindows", "load_digits", "make_loader"]

_TEST_SHARE = 0.2


@dataclass(frozen=True, kw_only=True, slots=True)
class Digits:
    """Images scaled to mean 0 and standard deviation 1 over the training set, and their digits 0 to 9."""

    train_images_NCHW: Tensor
    train_labels_N: Tensor
    test_images_NCHW: Tensor
    test_labels_N: Tensor

    @property
    def num_train(self) -> int:
        """Samples to train with."""
        return len(self.train_labels_N)

    @property
    def num_test(self) -> int:
        """Samples kept for the test."""
        return len(self.test_labels_N)


def load_digits() -> Digits:
    """1,437 images to train with and 360 to test with, every digit in the same share in both.

    The split is the same in every run: `seed` varies the training, not the question.

    Source:
        E. Alpaydin, C. Kaynak (1998), Optical Recognition of Handwritten Digits, UCI Machine Learning Repository,
        https://doi.org/10.24432/C50P49
    """
    from sklearn import datasets, model_selection

    pixels, labels = datasets.load_digits(return_X_y=True)
    images_NCHW = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8)
    labels_N = torch.tensor(labels, dtype=torch.int64)
    train, test = model_selection.train_test_split(
        range(len(labels_N)), test_size=_TEST_SHARE, stratify=labels, random_state=0
    )
    std, mean = torch.std_mean(images_NCHW[train])
    images_NCHW = (images_NCHW - mean) / std
    return Digits(
        train_images_NCHW=images_NCHW[train],
        train_labels_N=labels_N[train],
        test_images_NCHW=images_NCHW[test],
        test_labels_N=labels_N[test],
    )


class EpochWindows(Sampler[list[int]]):
    """Sample numbers of every macro-batch of a training, epoch after epoch, each epoch in a new order.

    The last macro-batch of an epoch takes what is left. Iterating twice gives the same order twice.

    ```pycon
    >>> windows = list(EpochWindows(num_samples=5, options=DemoOptions(epochs=2, macro_batch=3, micro_batch=2)))
    >>> [len(window) for window in windows], sorted(windows[0] + windows[1])
    ([3, 2, 3, 2], [0, 1, 2, 3, 4])

    ```
    """

    def __init__(self, num_samples: int, options: DemoOptions) -> None:
        self.num_samples = num_samples
        self.options = options
        self.windows_per_epoch = -(-num_samples // options.macro_batch)

    def __len__(self) -> int:
        return self.options.epochs * self.windows_per_epoch

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.options.seed)
        for _ in range(self.options.epochs):
            order_N = torch.randperm(self.num_samples, generator=generator)
            yield from (window.tolist() for window in order_N.split(self.options.macro_batch))


def make_loader(digits: Digits, options: DemoOptions) -> DataLoader[tuple[Tensor, ...]]:
    """All macro-batches of a training, `(images_BCHW, labels_B)` each, in an order that depends on the seed alone."""
    dataset = TensorDataset(digits.train_images_NCHW, digits.train_labels_N)
    # batch_size=None: the sampler names whole macro-batches, so one indexing replaces a collation of single samples.
    return DataLoader(dataset, sampler=EpochWindows(digits.num_train, options), batch_size=None)
