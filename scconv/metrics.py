"""Loss and accuracy, summed up where the network is: no step waits for them."""

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from scconv.data import ImageData, eval_batches


def new_totals(device: torch.device) -> Tensor:
    """Sums of loss, top-1 hits, top-5 hits, and the number of images, on the device."""
    return torch.zeros(4, device=device, dtype=torch.float32 if device.type == "mps" else torch.float64)


def add_to_totals(totals: Tensor, loss_sum: Tensor, logits: Tensor, labels: Tensor) -> None:
    hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]  # (N, 5)
    totals[:3] += torch.stack([loss_sum, hits[:, 0].sum(), hits.sum()]).to(totals.dtype)
    totals[3] += len(labels)


def means(totals: Tensor, accelerator: Accelerator | None = None) -> dict[str, float]:
    """Per image, of all of the accelerator's processes."""
    if accelerator is not None:
        totals = accelerator.reduce(totals, "sum")
    loss, top1, top5, count = totals.tolist()
    return {"loss": loss / count, "top1": top1 / count, "top5": top5 / count}


@torch.no_grad()
def evaluate(
    model: nn.Module, data: ImageData, *, batch_size: int | None = None, accelerator: Accelerator | None = None
) -> dict[str, float]:
    """Mean cross-entropy, top-1 and top-5 (fractions) on all test images, in eval mode; the model's mode is kept.

    With `accelerator` its processes share the images. With five classes or fewer top-5 is 1.
    """
    # 500 and 125 divide CIFAR's and Food-101's test sets: one shape for the compiler
    batch_size = batch_size or (500 if data.image_size <= 64 else 125)
    device = next(model.parameters()).device
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    totals, was_training = new_totals(device), model.training
    model.eval()
    for images, labels in eval_batches(data.to(device), batch_size, rank=rank, world=world, device=device):
        logits = model(images)
        add_to_totals(totals, F.cross_entropy(logits, labels, reduction="sum"), logits, labels)
    model.train(was_training)
    return means(totals, accelerator)
