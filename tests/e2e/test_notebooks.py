"""The notebooks of colab/: in step with their sources, without outputs, and each runs to its end at small size."""

import contextlib
import json
import os

import nbclient
import nbformat
import pytest
from jupyter_client.manager import KernelManager

from jaxtune.job import DEMO_FOLDER
from tests.conftest import ROOT
from tests.tiny import write_jsonl, write_tiny
from tools import notebooks

SOURCES = sorted((ROOT / "colab" / "src").glob("*.py"))
LITTLE = "DATA, TRAIN['batch_size'], STEPS = 'small.jsonl', 4, 4"
TINY = "MODEL = 'tiny'"
SMALL = {  # what the cell of parameters is followed by
    "01_lora_on_your_csv": "CSV, TRAIN['batch_size'], EPOCHS = 'small.csv', 4, 1",
    "02_classification": f"{TINY}\nROWS, TRAIN['batch_size'], EPOCHS = 60, 8, 1",
    "03_ways_to_tune": f"{TINY}\n{LITTLE}\nWAYS = {{k: WAYS[k] for k in ('AdaLoRA',)}}",
    "04_qlora_and_plan": f"{LITTLE}\nHOW, CHIPS = 'rule', ['v5e-1']",
    "05_translate_and_summarise": f"{TINY}\nTASK, ROWS, TRAIN['batch_size'], EPOCHS = 'summarisation', 40, 8, 1",
    "06_hugging_face_and_back": f"{TINY}\n{LITTLE}",
    "07_distil_quantise_gguf": f"{TINY}\n{LITTLE}",
    "08_mesh": "DATA, STEPS, ROWS = 'small.jsonl', 2, 8\nSTRATEGIES.pop('replicated')",
    "09_openai_client": "EXAMPLES, EPOCHS = 16, 1",
}
OWN_KERNEL = {"08_mesh"}  # sees eight devices


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_a_notebook_is_what_its_source_says_without_outputs(source):
    text = (ROOT / "colab" / f"{source.stem}.ipynb").read_text()
    assert text == notebooks.built(source), f"run python -m tools.notebooks: {source.stem} is not as its source"
    cells = nbformat.reads(text, as_version=4).cells
    code = [i for i, c in enumerate(cells) if c.cell_type == "code"]
    assert all(cells[i].outputs == [] and cells[i].execution_count is None for i in code)
    assert all(cells[i - 1].cell_type == "markdown" for i in code), "each code cell is explained before it"
    assert cells[0].source.startswith(f"[![Open in Colab]({notebooks.BADGE})](https://colab.research.google.com/")
    assert sum("parameters" in c.metadata.get("tags", []) for c in cells) == 1


def test_every_notebook_is_in_the_test_of_running():
    assert [p.stem for p in SOURCES] == sorted(SMALL)
    assert sorted(p.stem for p in (ROOT / "colab").glob("*.ipynb")) == sorted(SMALL)


@contextlib.contextmanager
def kernel(folder, **environment):
    manager = KernelManager(kernel_name="python3")
    paths = {"PYTHONPATH": str(ROOT), "IPYTHONDIR": str(folder / ".ipython")}
    manager.start_kernel(cwd=str(folder), env={**os.environ, **paths, **environment})
    try:
        yield manager
    finally:
        manager.shutdown_kernel(now=True)
        manager.context.term()


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One process for most notebooks, so that JAX is imported once."""
    with kernel(tmp_path_factory.mktemp("kernel")) as manager:
        yield manager


def run(source, manager, folder):
    """Run a notebook in a folder of its own, its parameters small."""
    notebook = nbformat.read(ROOT / "colab" / f"{source.stem}.ipynb", as_version=4)
    at = next(i for i, c in enumerate(notebook.cells) if "parameters" in c.metadata.get("tags", []))
    notebook.cells.insert(at + 1, nbformat.v4.new_code_cell(SMALL[source.stem]))
    rows = [json.loads(line)["messages"] for line in (DEMO_FOLDER / "train.jsonl").read_text().splitlines()[:24]]
    write_jsonl(folder / "small.jsonl", [{"messages": row} for row in rows])
    table = ["question,answer", *(f'"{q["content"]}","{a["content"]}"' for q, a in rows)]
    (folder / "small.csv").write_text("\n".join(table) + "\n")
    write_tiny(folder / "tiny", template=True, mlp=64, kv_heads=4)
    start = f"%reset -f\nimport os\nos.chdir({str(folder)!r})"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(start))
    client = nbclient.NotebookClient(notebook, km=manager, timeout=300)
    try:
        client.execute()
    finally:
        if client.kc is not None:
            client.kc.stop_channels()
    return notebook


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_a_notebook_runs_to_its_end(source, shared, tmp_path):
    if source.stem in OWN_KERNEL:
        with kernel(tmp_path) as manager:
            done = run(source, manager, tmp_path)
    else:
        done = run(source, shared, tmp_path)
    shown = [o for c in done.cells if c.cell_type == "code" for o in c.outputs if "data" in o]
    assert any("image/png" in o.data for o in shown), "a notebook shows at least one figure"
    if source.stem != "09_openai_client":  # which trains elsewhere
        assert any("<progress" in o.data.get("text/html", "") for o in shown), "training is seen while it goes on"
