"""Loss and accuracy, summed up where the network is: no step waits for them."""

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from scconv.analysis.capture import evaluating
from scconv.data import ImageData, eval_batches, eval_shares


def new_totals(device: torch.device) -> Tensor:
    """Sums of loss, top-1 hits, top-5 hits, and the number of images, on the device."""
    return torch.zeros(4, device=device, dtype=torch.float32 if device.type == "mps" else torch.float64)


def add_to_totals(totals: Tensor, loss_sum: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Returns which of the images were classified right, bool (N,)."""
    hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]  # (N, 5)
    totals[:3] += torch.stack([loss_sum, hits[:, 0].sum(), hits.sum()]).to(totals.dtype)
    totals[3] += len(labels)
    return hits[:, 0]


def means(totals: Tensor, accelerator: Accelerator | None = None) -> dict[str, float]:
    """Per image, of all of the accelerator's processes."""
    if accelerator is not None:
        totals = accelerator.reduce(totals, "sum")
    loss, top1, top5, count = totals.tolist()
    return {"loss": loss / count, "top1": top1 / count, "top5": top5 / count}


def evaluate(
    model: nn.Module, data: ImageData, *, batch_size: int | None = None, accelerator: Accelerator | None = None
) -> dict[str, float]:
    """Mean cross-entropy, top-1 and top-5 (fractions) on all test images, in eval mode, which each module then leaves.

    With `accelerator` its processes share the images. With five classes or fewer top-5 is 1.
    """
    return evaluate_each(model, data, batch_size=batch_size, accelerator=accelerator)[0]


def evaluate_each(
    model: nn.Module, data: ImageData, *, batch_size: int | None = None, accelerator: Accelerator | None = None
) -> tuple[dict[str, float], Tensor]:
    """What `evaluate` returns, and which test images were classified right: bool (num_test,), on the processor."""
    # 500 and 125 divide CIFAR's and Food-101's test sets: one shape for the compiler
    batch_size = batch_size or (500 if data.image_size <= 64 else 125)
    device = next(model.parameters()).device
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    totals = new_totals(device)
    right = torch.zeros(data.num_test, dtype=torch.int64, device=device)
    shares = [share for share in eval_shares(data, batch_size, rank, world) if len(share)]
    batches = eval_batches(data.to(device), batch_size, rank=rank, world=world, device=device)
    with evaluating(model):
        for share, (images, labels) in zip(shares, batches, strict=True):
            logits = model(images)
            loss = F.cross_entropy(logits, labels, reduction="sum")
            right[share.to(device)] += add_to_totals(totals, loss, logits, labels)
    if accelerator is not None:
        right = accelerator.reduce(right, "sum")  # every image is one process's
    return means(totals, accelerator), right.bool().cpu()
