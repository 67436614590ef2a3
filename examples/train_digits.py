"""Train the model that `nightshift demo` starts from, from nothing, in about a minute on one core.

python examples/train_digits.py                    over the one in jobs/digits
python examples/train_digits.py /tmp/digits        or elsewhere

It knows the digits from zero to four: the demo teaches it the others. It is trained on the half of scikit-learn's
digits that the demo does not label, and judged by the other half. All
randomness is seeded: the same PyTorch on the same kind of processor gives the same weights, bit for bit.
"""

from __future__ import annotations

import math
import sys
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models as zoo

from jobs.demo import MODEL_DIR
from jobs.specimens import KNOWN, Digit, read_digits
from pipeline.decode import decode
from pipeline.model_dir import compose_model_dir, write_model_dir
from pipeline.models import open_model
from pipeline.predict import Precision, Predictor
from pipeline.presets import Normalise, Preset

# The smallest model in torchvision, slimmed further: 89 thousand parameters.
ARCHITECTURE: Final = "mobilenet_v3_small"
ARGUMENTS: Final = {"width_mult": 0.2}
# The network halves its input five times, so 8 x 8 pixels have to grow first.
PRESET: Final = Preset(resize=64, crop=64, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))

SEED: Final = 0
EPOCHS: Final = 80
BATCH_SIZE: Final = 32
LEARNING_RATE: Final = 4e-3
WEIGHT_DECAY: Final = 0.05
LABEL_SMOOTHING: Final = 0.05
# How differently people write: turned, slanted, larger or smaller, and not in the middle.
MAX_DEGREES: Final = 15
MAX_SHEAR: Final = 0.2
MAX_ZOOM: Final = 0.15
MAX_SHIFT: Final = 0.2

README: Final = """\
# Handwritten digits

A classifier for single handwritten digits, `zero` to `four`: `nightshift demo` fine-tunes it on all ten.

- **Architecture**: torchvision's `{architecture}` with `width_mult={width}`, {parameters:,} parameters,
  on {crop} x {crop} pixels.
- **Data**: {num_training} of the first 915 handwritten digits that come with scikit-learn, 8 x 8 greys, bright ink on
  black. They are the test set of *Optical Recognition of Handwritten Digits* by E. Alpaydin and C. Kaynak (1998),
  UCI Machine Learning Repository, https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits
- **Training**: {epochs} epochs from random weights, on a CPU, by `examples/train_digits.py`, which made this directory.
- **Accuracy** on the {num_held_out} held-out digits of these classes, which are by other writers:
  {fp32:.1%} in fp32, {bf16:.1%} in bf16.
  The settings of the training were chosen with a view to such figures.
- **Use**: `nightshift finetune IMAGES -o OUT --model DIR`, where DIR is this directory.
- **Licence**: Apache-2.0.
"""


def train(digits: list[Digit]) -> nn.Module:
    """A network that reads digits, without what is before (the preset) and after it (the softmax)."""
    torch.manual_seed(SEED)
    images, targets = to_tensors(digits)
    network: nn.Module = zoo.get_model(ARCHITECTURE, num_classes=len(KNOWN), **ARGUMENTS)
    model = nn.Sequential(Normalise(PRESET), network).train()
    steps_per_epoch = len(images) // BATCH_SIZE  # the rest would be a batch too small for batch normalisation
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=EPOCHS * steps_per_epoch)
    for epoch in range(1, EPOCHS + 1):
        total = 0.0
        shuffled = torch.randperm(len(images))[: steps_per_epoch * BATCH_SIZE]
        for batch in shuffled.view(steps_per_epoch, BATCH_SIZE):
            logits = model(deform(images[batch]))
            loss = F.cross_entropy(logits, targets[batch], label_smoothing=LABEL_SMOOTHING)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            scheduler.step()
            total += loss.item()
        if epoch % 10 == 0:
            print(f"epoch {epoch:>3}  loss {total / steps_per_epoch:.3f}")
    return network.eval()


def to_tensors(digits: list[Digit]) -> tuple[Tensor, Tensor]:
    """(N, 3, H, W) uint8, by the very steps that a labelling job takes, and (N,) the ids of the categories."""
    images = torch.stack([PRESET.exact(decode(digit.png)) for digit in digits])
    return images, torch.tensor([KNOWN.index(digit.name) for digit in digits])


def deform(images: Tensor) -> Tensor:
    """(B, 3, H, W), each image as if another hand had written it."""

    def draw(bound: float) -> Tensor:
        return (torch.rand(len(images)) * 2 - 1) * bound

    angle, zoom, shear = draw(math.radians(MAX_DEGREES)), 1 + draw(MAX_ZOOM), draw(MAX_SHEAR)
    rows = [
        torch.stack([zoom * angle.cos(), shear - zoom * angle.sin(), draw(MAX_SHIFT)], dim=1),
        torch.stack([zoom * angle.sin(), zoom * angle.cos(), draw(MAX_SHIFT)], dim=1),
    ]
    where = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    return F.grid_sample(images.float(), where, align_corners=False)


def measure_accuracy(model_dir: str, digits: list[Digit], precision: Precision) -> float:
    """The share of `digits` that the exported model reads right, as a worker would run it."""
    predict = Predictor(open_model(model_dir), precision=precision, top_k=1)
    images, targets = to_tensors(digits)
    found = torch.from_numpy(predict(images).label_ids[:, 0])
    return (found == targets).float().mean().item()


def export(network: nn.Module, model_dir: str, *, readme: str) -> None:
    """Write the model directory."""
    write_model_dir(
        model_dir,
        compose_model_dir(
            architecture=ARCHITECTURE,
            arguments=ARGUMENTS,
            state=network.state_dict(),
            categories=KNOWN,
            preset=PRESET,
            readme=readme,
        ),
    )


def main(model_dir: str) -> None:
    """Train, export, and judge what was exported."""
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)  # the order of additions, and so the last bits of the weights, follow from the threads
    training, held_out = ([d for d in read_digits(half) if d.name in KNOWN] for half in ("training", "held-out"))
    network = train(training)
    export(network, model_dir, readme="")
    fp32, bf16 = (measure_accuracy(model_dir, held_out, precision) for precision in ("fp32", "bf16"))
    readme = README.format(
        architecture=ARCHITECTURE,
        width=ARGUMENTS["width_mult"],
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        crop=PRESET.crop,
        epochs=EPOCHS,
        num_training=len(training),
        num_held_out=len(held_out),
        fp32=fp32,
        bf16=bf16,
    )
    export(network, model_dir, readme=readme)
    print(f"{model_dir}: {fp32:.2%} of the held-out digits are right in fp32, {bf16:.2%} in bf16")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else MODEL_DIR)
