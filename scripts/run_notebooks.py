"""Run notebooks, top to bottom in a fresh kernel, so that they cannot drift from what the code does.

    python scripts/run_notebooks.py                    # every one of notebooks/; changes none
    python scripts/run_notebooks.py --write N.ipynb    # run this one and store its outputs in it

A notebook is its own source: edit it anywhere, `ruff format`, --write. It finds no file of the repository, as in Colab.
"""

import argparse
import os
import re
import tempfile
import time
from pathlib import Path

import nbformat
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError


def is_executed(nb: nbformat.NotebookNode) -> bool:
    """Return whether a notebook holds the outputs of one run from top to bottom without an error."""
    code = [cell for cell in nb.cells if cell.cell_type == "code" and cell.source.strip()]
    kinds = {output.output_type for cell in code for output in cell.outputs}
    in_order = [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    return in_order and bool(kinds) and "error" not in kinds


def execute(nb: nbformat.NotebookNode, timeout: int) -> None:
    """Run a notebook in place by the kernel of this interpreter, in an empty directory."""
    # Without directories to look in, python3 is this interpreter, whatever kernels are registered.
    kernel = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
    options = {"timeout": timeout, "record_timing": False, "coalesce_streams": True, "shutdown_kernel": "immediate"}
    client = NotebookClient(nb, km=kernel, extra_arguments=["--log-level=ERROR"], **options)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as ipython:
        # Figures inline whatever MPLBACKEND is outside, no start-up files of the user's IPython, no installs by pip.
        env = {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "IPYTHONDIR": ipython, "PIP_NO_INDEX": "1"}
        client.execute(env=os.environ | env, cwd=folder, cleanup_kc=True)


def clean(nb: nbformat.NotebookNode) -> None:
    """Drop what changes from run to run or tells the machine: metadata but tags, random ids of cells."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    nb.metadata = nbformat.from_dict({"kernelspec": kernel, "language_info": {"name": "python"}})
    nb.nbformat_minor = 5  # the first with ids
    for index, cell in enumerate(nb.cells):
        cell.update(id=f"cell-{index:02d}", metadata={k: v for k, v in cell.metadata.items() if k == "tags"})


def run(path: Path, *, timeout: int = 300, write: bool = False) -> None:
    """Execute one notebook; SystemExit tells the cell that failed, or that outputs are to be stored."""
    nb = nbformat.reads(path.read_text(encoding="utf-8"), as_version=4)
    if not (write or is_executed(nb)):
        msg = f"{path} must hold the outputs of a run without errors; store them: run_notebooks.py --write {path}"
        raise SystemExit(msg)
    try:
        execute(nb, timeout)
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        raise SystemExit(f"{path}: " + re.sub(r"\x1b\[[\d;]*m", "", str(error))) from None  # without its colors
    if write:
        clean(nb)
        nbformat.write(nb, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="store the outputs of the run in the notebook")
    parser.add_argument("--timeout", type=int, default=300, help="seconds a cell may take (default: %(default)s)")
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all of notebooks/")
    args = parser.parse_args()
    for path in args.notebooks or sorted(Path(__file__).parents[1].glob("notebooks/*.ipynb")):
        start = time.perf_counter()
        run(path, timeout=args.timeout, write=args.write)
        print(f"{path}: {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
