"""Notebooks' kernels talk to whoever runs them over sockets in the file system, not over the network.

By default nbclient opens TCP ports on this machine, and each kernel of ipykernel 7.4 then prints a warning that others
may listen. Neither myst-nb (the book) nor nbmake (the tests) passes an option for it on. Where the system has no such
sockets (Windows), or the path of the temporary folder is too long for one, nothing is changed.
"""

import functools
import os
import shutil
import tempfile
import weakref
from pathlib import Path

import zmq
from nbclient import NotebookClient


def use_local_sockets() -> None:
    """From now on, in this process. Once is enough, twice does no harm."""
    create = NotebookClient.create_kernel_manager
    room = zmq.IPC_PATH_MAX_LEN - len(tempfile.gettempdir()) if os.name == "posix" and zmq.has("ipc") else 0
    if room < len("/kernel-12345678/kernel-ipc-5") or hasattr(create, "__wrapped__"):
        return

    @functools.wraps(create)
    def create_kernel_manager(self):
        manager = create(self)
        folder = tempfile.mkdtemp(prefix="kernel-")
        manager.connection_file = str(Path(folder, "kernel.json"))  # the sockets lie beside it
        manager.transport = "ipc"
        weakref.finalize(manager, shutil.rmtree, folder, ignore_errors=True)
        return manager

    NotebookClient.create_kernel_manager = create_kernel_manager


def setup(app):
    use_local_sockets()
    return {"parallel_read_safe": True, "parallel_write_safe": True}
