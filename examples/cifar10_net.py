"""A small network of one's own: two convolutions and three linear layers, as beginners train it on CIFAR-10.

From the folder of this file, with CIFAR-10's images as Parquet files or as a folder per class:

    nightshift finetune train-*.parquet --val test.tar -o run/ --model cifar10_net:Net \
        --resize 32 --crop 32 --mean 0.5 0.5 0.5 --std 0.5 0.5 0.5 --augment none \
        --optimizer sgd --lr 0.001 --weight-decay 0 --scheduler constant --warmup-epochs 0 --batch-size 4 --epochs 2

    nightshift label photos/ -o labels/ --model cifar10_net:Net --weights run/model
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class Net(nn.Module):
    """Images (B, 3, 32, 32) → logits (B, num_classes)."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        features = self.pool(F.relu(self.conv1(images)))
        features = self.pool(F.relu(self.conv2(features))).flatten(1)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(features)))))
