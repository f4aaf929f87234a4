"""What is not torch comes with an extra of the package; whoever lacks a module is told which, in one line."""

EXTRAS = {
    "torchvision": "models",
    "safetensors": "models",
    "accelerate": "train",
    "numpy": "train",
    "sklearn": "train",
    "pandas": "train",
    "scipy": "train",
    "tqdm": "train",
    "filelock": "train",
    "captum": "book",
    "matplotlib": "book",
    "seaborn": "book",
    "skimage": "book",
    "torchinfo": "book",
}


def name_extra(error: ModuleNotFoundError, extra: str | None = None) -> str | None:
    """`needs accelerate; pip install "scconv[train]"`, or None where the module is of no extra.

    `extra` is the one to name; by default the smallest that has the module.
    """
    module = (error.name or "").partition(".")[0]
    if module not in EXTRAS:
        return None
    return f'needs {module}; pip install "scconv[{extra or EXTRAS[module]}]"'
