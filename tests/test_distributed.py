"""Batch normalisation over two processes on a processor, against `nn.BatchNorm2d` of the whole batch in one."""

import json
import os
import subprocess
import sys

import pytest

TWO = [
    sys.executable,
    "-W",
    "error::FutureWarning",
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc_per_node=2",
]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
SHARED = """
import copy
import torch
import torch.distributed as dist
from torch import nn
from torch.testing import assert_close
from scconv.training.distributed import share_batch_norm

dist.init_process_group("gloo")
mine = slice(dist.get_rank(), None, 2)
for dtype, near in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.02), (torch.float16, 0.003)):
    torch.manual_seed(0)
    alone = nn.BatchNorm2d(3, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    with torch.no_grad():
        alone.weight.copy_(torch.rand(3) + 0.5)
        alone.bias.copy_(torch.randn(3))
    shared = share_batch_norm(copy.deepcopy(alone), torch.device("cpu"))
    for _ in range(2):
        whole = (3 + 2 * torch.randn(6, 3, 4, 5)).to(dtype).requires_grad_()
        part, slope = whole.detach()[mine].clone().requires_grad_(), torch.randn(6, 3, 4, 5).to(dtype)
        y, found = alone(whole), shared(part)
        (y * slope).sum().backward()
        (found * slope[mine]).sum().backward()
        assert found.dtype == y.dtype == dtype
        assert_close(found, y[mine], rtol=near, atol=near)
        assert_close(part.grad, whole.grad[mine], rtol=near, atol=near)
    for of_shared, of_alone in zip(shared.parameters(), alone.parameters(), strict=True):
        dist.all_reduce(of_shared.grad)
        assert_close(of_shared.grad, of_alone.grad, rtol=near, atol=20 * near)
    for name, tensor in alone.state_dict().items():
        assert_close(shared.state_dict()[name], tensor, rtol=1e-5, atol=1e-6, msg=f"{name} in {dtype}")
    assert_close(shared.eval()(whole[mine]), alone.eval()(whole)[mine], rtol=near, atol=near)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_normalise_as_one_in_every_precision(tmp_path):
    (tmp_path / "shared.py").write_text(SHARED)
    done = subprocess.run([*TWO, tmp_path / "shared.py"], env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_two_processes_train_in_bfloat16(tmp_path):
    words = "--model scconv_resnet20 --data digits --recipe quick --image-size 8 --epochs 1 --limit-train-batches 2"
    command = [*TWO, "-m", "scconv.train", *words.split(), "--precision", "bf16", "--out", tmp_path]
    command += ["--tracker", "tensorboard"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    (result,) = (json.loads(path.read_text()) for path in tmp_path.glob("*.json"))
    assert (result["precision"], result["scconv_layers"]) == ("bf16", 18)
    assert len(list(tmp_path.glob("logs/*/*"))) == 1  # the main process alone logs
