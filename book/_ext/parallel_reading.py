"""Pages are read, and with that their cells are run, by a process per core: the build takes about half as long.

It is Sphinx's --jobs, for which `jupyter-book build` has no option. Sphinx asks each extension whether it bears that.
Two of Jupyter Book's do not answer. One only matters for LaTeX; the other numbers the chapters after all are read.
"""

import os

SILENT = ("sphinx_jupyterbook_latex", "sphinx_multitoc_numbering")


def read_in_parallel(app):
    app.parallel = os.cpu_count()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the kernels: a core each
    for name in SILENT:
        if name in app.extensions:
            app.extensions[name].parallel_read_safe = True


def deal_out(app, env, docnames):
    """Each process gets a run of neighbours. So the notebooks, which are long, come first and are dealt out."""
    docnames.sort(key=lambda name: not name.startswith("notebooks/"))
    docnames[:] = [name for first in range(app.parallel) for name in docnames[first :: app.parallel]]


def setup(app):
    app.connect("builder-inited", read_in_parallel)
    app.connect("env-before-read-docs", deal_out)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
