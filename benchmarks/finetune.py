"""Fine-tuning beside plain PyTorch, on the same images and the same number of processes and threads.

python benchmarks/finetune.py whole DATA --model squeezenet1_0 --weights FILE     all weights, beside plain DDP
python benchmarks/finetune.py frozen DATA --model squeezenet1_0 --weights FILE    the head, beside a loop over the net
python benchmarks/finetune.py tiny DATA...                                        25,000 steps of four small images

DATA is a folder with train/ and val/; for `tiny`, Parquet files of CIFAR-10. Each pair is run in turn, `--pairs` times;
what is compared are seconds after start-up: opening images and training, without validation on either side.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision import models as zoo
from torchvision.transforms import v2

EXAMPLES = Path(__file__).parents[1] / "examples"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# ---------------------------------------------------------------------------------------------------------------
# Plain PyTorch, as the tutorials have it


class Photographs(Dataset[tuple[Tensor, int]]):
    """The images of a folder for each class, decoded whenever they are asked for."""

    def __init__(self, folder: str, *, is_random: bool) -> None:
        self.classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
        self.images = [
            (path, label) for label, name in enumerate(self.classes) for path in sorted(Path(folder, name).iterdir())
        ]
        crop: list[nn.Module] = [v2.Resize(256), v2.CenterCrop(224)]
        if is_random:
            crop = [v2.RandomResizedCrop(224), v2.RandomHorizontalFlip()]
        self.transform = v2.Compose(
            [*crop, v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.images[index]
        with Image.open(path) as image:
            return self.transform(image.convert("RGB")), label


def load_network(model: str, weights: str, num_classes: int) -> tuple[nn.Module, nn.Module]:
    """A classifier and its fresh head, by hand: SqueezeNet's or a last linear layer."""
    network: nn.Module = zoo.get_model(model)
    network.load_state_dict(torch.load(weights, weights_only=True))
    if hasattr(network, "fc"):
        network.fc = nn.Linear(network.fc.in_features, num_classes)
        return network, network.fc
    network.classifier[1] = nn.Conv2d(network.classifier[1].in_channels, num_classes, 1)
    return network, network.classifier


def train_plainly(rank: int, options: argparse.Namespace, meeting: str) -> None:
    """One process of plain DDP."""
    torch.set_num_threads(options.threads)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=options.workers)
    began = time.perf_counter()
    images = Photographs(f"{options.data[0]}/train", is_random=options.case == "whole")
    network, head = load_network(options.model, options.weights, len(images.classes))
    is_frozen = options.case == "frozen"
    if is_frozen:
        network.requires_grad_(False)
        head.requires_grad_(True)
    network = network.to(memory_format=torch.channels_last)
    trained = DistributedDataParallel(network)
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-4)
    sampler: DistributedSampler[tuple[Tensor, int]] = DistributedSampler(images, seed=0)
    loader = DataLoader(images, batch_size=options.batch_size, sampler=sampler)
    for epoch in range(options.epochs):
        sampler.set_epoch(epoch)
        trained.train()
        if is_frozen:
            network.eval()
            head.train()
        for batch, targets in loader:
            loss = F.cross_entropy(trained(batch.contiguous(memory_format=torch.channels_last)), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    if rank == 0:
        Path(f"{meeting}.seconds").write_text(str(time.perf_counter() - began))
    dist.destroy_process_group()


def run_plainly(options: argparse.Namespace) -> float:
    """Seconds of plain DDP."""
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"{folder}/meeting"
        multiprocessing.spawn(train_plainly, (options, meeting), nprocs=options.workers)
        return float(Path(f"{meeting}.seconds").read_text())


def run_tiny_plainly(options: argparse.Namespace) -> float:
    """Seconds of the beginner's loop over CIFAR-10, decoded once."""
    from cifar10_net import Net

    torch.set_num_threads(1)
    began = time.perf_counter()
    images, labels = [], []
    for path in options.data:
        table = pq.read_table(path, columns=["image", "label"])
        labels += table["label"].to_pylist()
        for cell in table["image"].to_pylist():
            with Image.open(io.BytesIO(cell["bytes"])) as image:
                images.append(v2.functional.pil_to_tensor(image.convert("RGB")))
    pixels = (torch.stack(images).float() / 255 - 0.5) / 0.5
    targets = torch.tensor(labels)
    network = Net()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.001, momentum=0.9)
    loader = DataLoader(torch.utils.data.TensorDataset(pixels, targets), batch_size=4, shuffle=True)
    for _ in range(options.epochs):
        for batch, expected in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(network(batch), expected)
            loss.backward()
            optimizer.step()
    return time.perf_counter() - began


# ---------------------------------------------------------------------------------------------------------------
# nightshift


def run_ours(options: argparse.Namespace) -> float:
    """Seconds of `nightshift finetune`, from the first image that is opened to the end of the last epoch."""
    from jobs.finetune import FinetuneConfig, run

    settings: dict[str, Any] = {"model": options.model, "weights": options.weights, "batch_size": options.batch_size}
    match options.case:
        case "whole":
            settings |= {"inputs": (f"{options.data[0]}/train",), "augment": "light"}
        case "frozen":
            settings |= {"inputs": (f"{options.data[0]}/train",), "freeze": "backbone"}
        case "tiny":
            scale = (0.5, 0.5, 0.5)
            settings = {"inputs": tuple(options.data), "model": "cifar10_net:Net", "batch_size": 4, "augment": "none"}
            settings |= {"resize": 32, "crop": 32, "mean": scale, "std": scale, "optimizer": "sgd", "weight_decay": 0}
            settings |= {"scheduler": "constant", "warmup_epochs": 0}
    with tempfile.TemporaryDirectory() as folder:
        config = FinetuneConfig(
            output=f"{folder}/run",
            epochs=options.epochs,
            val_fraction=0,
            precision="fp32",
            num_workers=str(options.workers),
            cpus_per_worker=options.threads,
            quiet=True,
            **settings,
        )
        timings = run(config).account["timings"]
        return float(timings["open_s"] + timings["train_s"])


def main() -> None:
    """Run the pairs, and print each with its ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=["whole", "frozen", "tiny"])
    parser.add_argument("data", nargs="+")
    parser.add_argument("--model", default="squeezenet1_0")
    parser.add_argument("--weights")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=3)
    options = parser.parse_args()
    options.data = [os.path.abspath(path) for path in options.data]
    if options.case == "tiny":
        options.workers = 1
        os.chdir(EXAMPLES)
        sys.path.insert(0, str(EXAMPLES))
    options.epochs = options.epochs or {"whole": 2, "frozen": 10, "tiny": 2}[options.case]
    ratios = []
    for _ in range(options.pairs):
        plain = run_tiny_plainly(options) if options.case == "tiny" else run_plainly(options)
        ours = run_ours(options)
        ratios.append(plain / ours)
        print(f"plain {plain:7.1f} s   nightshift {ours:7.1f} s   {ratios[-1]:.2f} x", flush=True)
    print(f"median {statistics.median(ratios):.2f} x as fast, {options.epochs} epochs")


if __name__ == "__main__":
    main()
