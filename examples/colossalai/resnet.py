"""ResNet-34 (He et al. 2015, https://arxiv.org/abs/1512.03385), built and initialised in the usual order, so that one
seed gives one set of weights, whoever builds it."""

import torch
from torch import Tensor, nn


def conv3x3(num_in: int, num_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(num_in, num_out, 3, stride, padding=1, bias=False)


class BasicBlock(nn.Module):
    """Two convolutions, and the input added to what they make of it."""

    def __init__(self, num_in: int, num_out: int, stride: int, shortcut: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = conv3x3(num_in, num_out, stride)
        self.bn1 = nn.BatchNorm2d(num_out)
        self.conv2 = conv3x3(num_out, num_out)
        self.bn2 = nn.BatchNorm2d(num_out)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (residual + (x if self.shortcut is None else self.shortcut(x))).relu()


def stage(num_in: int, num_out: int, num_blocks: int, stride: int) -> nn.Sequential:
    shortcut = None
    if stride != 1 or num_in != num_out:
        shortcut = nn.Sequential(nn.Conv2d(num_in, num_out, 1, stride, bias=False), nn.BatchNorm2d(num_out))
    blocks = [BasicBlock(num_in, num_out, stride, shortcut)]
    blocks += [BasicBlock(num_out, num_out, 1, None) for _ in range(num_blocks - 1)]
    return nn.Sequential(*blocks)


class ResNet(nn.Module):
    """Images (B, 3, H, W) to logits (B, num_classes)."""

    def __init__(self, num_blocks: tuple[int, int, int, int], num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.pool = nn.MaxPool2d(3, 2, padding=1)
        self.layer1 = stage(64, 64, num_blocks[0], 1)
        self.layer2 = stage(64, 128, num_blocks[1], 2)
        self.layer3 = stage(128, 256, num_blocks[2], 2)
        self.layer4 = stage(256, 512, num_blocks[3], 2)
        self.fc = nn.Linear(512, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images_BCHW: Tensor) -> Tensor:
        x = self.pool(self.bn1(self.conv1(images_BCHW)).relu())
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(x.mean((2, 3)), 1))


def resnet34(num_classes: int) -> ResNet:
    return ResNet((3, 4, 6, 3), num_classes)
