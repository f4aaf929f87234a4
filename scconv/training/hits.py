"""Which test images a network had right whose run did not keep it: recomputed from its weights.

Result files have this since format 3. For older ones `scconv results --recompute-hits RUN.json` writes
`hits/RUN.json` beside the folder of the result files, so that their networks can be compared in pairs, too.
"""

from datetime import UTC, datetime
from pathlib import Path

import torch

from scconv.data import load_data, test_image_ids
from scconv.files import beside, expand, read_sealed, write_sealed
from scconv.training.metrics import evaluate_each
from scconv.training.paired import pack_hits
from scconv.training.provenance import device_name, find_commit, find_tree
from scconv.training.results import load_trained, read_run

FORMAT = 1
# The share of test images by which a recomputed accuracy may differ from the run's: a run may have been compiled, and
# then rounds otherwise.
TOLERANCE = 0.001


def recompute_hits(path: str | Path, data_root: str | Path | None = None) -> Path:
    """Evaluate the network of a result file and write which images it has right; returns the file's path.

    Raises:
        ValueError: the file, its weights or the set cannot be read, the hits are there already, or the accuracy is not
            the run's.
    """
    path = expand(path)
    run, target = read_run(path), beside(path, "hits")
    if "hits" in run or target.exists():
        raise ValueError(f"{path}: has its hits already, in {path if 'hits' in run else target}")
    data = load_data(run["data"]["name"], root=data_root, image_size=run["data"]["image_size"])
    found, right = evaluate_each(load_trained(path), data)
    if abs(found["top1"] - run["test"]["top1"]) > TOLERANCE:
        raise ValueError(f"{path}: top-1 is {found['top1']:.4f} here, and {run['test']['top1']:.4f} in its run")
    content = {
        "format": FORMAT,
        "run": run["name"],
        "run_sha256": run["sha256"],
        "hits": pack_hits(right, test_image_ids(data)),
        "test": found,
        "versions": {"torch": torch.__version__},
        "device": device_name(torch.device("cpu")),
        "commit": find_commit(),
        "tree": find_tree(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_sealed(target, content)
    return target


def read_run_with_hits(path: str | Path) -> dict:
    """As `read_run`, with the recomputed hits where the run kept none and they are there.

    Raises:
        ValueError: the file of the hits is not whole, or of another run.
    """
    path = expand(path)
    run, hits = read_run(path), beside(path, "hits")
    if "hits" in run or not hits.exists():
        return run
    content = read_sealed(hits)
    if (content.get("format"), content.get("run_sha256")) != (FORMAT, run["sha256"]):
        raise ValueError(f"{hits}: not what --recompute-hits wrote for {path.name}")
    return {**run, "hits": content["hits"]}
