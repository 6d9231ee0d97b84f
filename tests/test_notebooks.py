"""The notebooks run from top to bottom, in a fresh kernel, with fewer epochs than a reader's."""

from __future__ import annotations

import re
import sys

import nbclient
import nbformat
import pytest

from . import markdown

NOTEBOOKS = sorted((markdown.ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_runs(path, tmp_path, monkeypatch):
    # The kernel is this Python, whatever kernels the machine has under the same name.
    kernel = tmp_path / "kernels" / "python3"
    kernel.mkdir(parents=True)
    command = f'["{sys.executable}", "-m", "ipykernel_launcher", "-f", "{{connection_file}}"]'
    (kernel / "kernel.json").write_text(f'{{"argv": {command}, "display_name": "tests", "language": "python"}}')
    for name in ("JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "MPLCONFIGDIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("LORA_JAX_NOTEBOOK_EPOCHS", "1")
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=None, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_stored_outputs_name_no_folder_of_a_machine(path):
    assert not re.search(r"/(home|root|work|Users|tmp|usr|content)/", path.read_text(encoding="utf-8"))
