"""The same work without nightshift: the top five of every image of a folder, to Parquet.

python benchmarks/peers.py torch FOLDER OUT --model resnet50         what the tutorials of PyTorch lead to
python benchmarks/peers.py ray FOLDER OUT --model resnet50           Ray Data as its image benchmarks use it

Prints one line of JSON: how many images it was, and the seconds they took without imports and start-up.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from free_net import FreeNet
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import models as zoo
from torchvision import transforms

TOP_K = 5
PRESET = transforms.Compose(
    [
        transforms.Resize(256),
        transforms.CenterCrop(224),
        transforms.ToTensor(),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
)


def open_network(model: str, weights: str | None) -> nn.Module:
    """`free` costs nothing; any other is torchvision's, with weights from a file, or random ones."""
    if model == "free":
        return FreeNet().eval()
    torch.manual_seed(0)
    network: nn.Module = zoo.get_model(model)
    if weights is not None:
        network.load_state_dict(torch.load(weights, weights_only=True))
    return network.eval()


def find_best(network: nn.Module, batch: Tensor) -> tuple[list[list[float]], list[list[int]]]:
    with torch.inference_mode():
        scores, label_ids = network(batch).softmax(1).topk(TOP_K)
    return scores.tolist(), label_ids.tolist()


class Photographs(Dataset[tuple[Tensor, int]]):
    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with Image.open(self.paths[index]) as image:
            return PRESET(image.convert("RGB")), index


def run_torch(options: argparse.Namespace) -> float:
    """A Dataset, a DataLoader with a process for each core, and a loop."""
    paths = sorted(Path(options.folder).iterdir())
    network = open_network(options.model, options.weights)
    began = time.perf_counter()
    rows: list[dict[str, Any]] = []
    for batch, indices in DataLoader(Photographs(paths), options.batch_size, num_workers=os.cpu_count() or 1):
        scores, label_ids = find_best(network, batch)
        rows += [
            {"path": str(paths[index]), "scores": best, "label_ids": ids}
            for index, best, ids in zip(indices.tolist(), scores, label_ids, strict=True)
        ]
    pq.write_table(pa.Table.from_pylist(rows), options.out)
    return time.perf_counter() - began


def run_ray(options: argparse.Namespace) -> float:
    """`read_images`, a transform for each row, an actor with the model, `write_parquet`."""
    import ray

    def transform(row: dict[str, Any]) -> dict[str, Any]:
        row["pixels"] = PRESET(Image.fromarray(row.pop("image")).convert("RGB")).numpy()
        return row

    class Predictor:
        def __init__(self) -> None:
            self.network = open_network(options.model, options.weights)

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            scores, label_ids = find_best(self.network, torch.from_numpy(batch["pixels"].copy()))
            return {"path": batch["path"], "scores": scores, "label_ids": label_ids}

    here = os.path.dirname(os.path.abspath(__file__))
    ray.init("local", include_dashboard=False, logging_level="ERROR", runtime_env={"env_vars": {"PYTHONPATH": here}})
    began = time.perf_counter()
    (
        ray.data.read_images(options.folder, include_paths=True, mode="RGB")
        .map(transform)
        .map_batches(Predictor, batch_size=options.batch_size, compute=ray.data.ActorPoolStrategy(size=1), num_cpus=1)
        .write_parquet(options.out)
    )
    return time.perf_counter() - began


PEERS: dict[str, Callable[[argparse.Namespace], float]] = {"torch": run_torch, "ray": run_ray}


def main() -> None:
    """Do the work, and say what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("folder")
    parser.add_argument("out")
    parser.add_argument("--model", required=True)
    parser.add_argument("--weights")
    parser.add_argument("--batch-size", type=int, default=64)
    options = parser.parse_args()
    seconds = PEERS[options.peer](options)
    print(json.dumps({"images": len(os.listdir(options.folder)), "seconds": seconds}))


if __name__ == "__main__":
    main()
