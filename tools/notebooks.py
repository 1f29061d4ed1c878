"""Build the notebooks of colab/ from their sources, colab/src/*.py, in which they are edited and linted.

    python -m tools.notebooks            # after a source has changed; a test says so where it was forgotten

A source is a Python file in cells, as editors and Jupytext know them: `# %% [markdown]` begins text, `# %%` code, and
`# %% [parameters]` the code that holds what a reader may change. `# %% [install] EXTRA …` becomes the install cell, the
same in all. Commands for IPython are comments: `# %jaxtune train …`.
"""

import re
from pathlib import Path

import nbformat

ROOT = Path(__file__).parents[1]
REPOSITORY = "OWNER/jaxtune"  # where the notebooks can be opened from, on GitHub
EXTRAS = {"serve": "fastapi", "gguf": "gguf"}  # what is there where an extra is installed
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
INSTALL = """\
import importlib.metadata
import importlib.util
import pathlib
import subprocess
import sys

if any(importlib.util.find_spec(name) is None for name in {NEEDED}):
    folders = [pathlib.Path.cwd(), *pathlib.Path.cwd().parents]
    checkout = next((p for p in folders if (p / "jaxtune" / "__init__.py").exists()), None)
    have = [p for p in ("jax", "jaxlib", "libtpu", "numpy") if importlib.util.find_spec(p)]
    kept = [f"{p}=={importlib.metadata.version(p)}" for p in have]  # the runtime's own, which fit its chip
    wanted = f"{checkout or 'jaxtune'}{EXTRAS}"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", wanted, *kept], check=True)

%load_ext jaxtune"""


def built(source: Path) -> str:
    """The notebook of a source, as the text of its .ipynb: without outputs, and the same each time."""
    cells = []
    for n, (head, body) in enumerate(split(source.read_text())):
        kind, _, rest = head.partition("] ")
        if kind.startswith("[markdown"):
            text = "\n".join(line.removeprefix("#").removeprefix(" ") for line in body.splitlines())
            cell = nbformat.v4.new_markdown_cell(text if n else f"{badge(source)}\n\n{text}")
        elif kind.startswith("[install"):
            extras = f"[{','.join(rest.split())}]" if rest else ""
            needed = repr(["jaxtune", *(EXTRAS[x] for x in rest.split())]).replace("'", '"')
            cell = nbformat.v4.new_code_cell(INSTALL.replace("{EXTRAS}", extras).replace("{NEEDED}", needed))
        else:
            cell = nbformat.v4.new_code_cell(re.sub(r"^# ([%!])", r"\1", body, flags=re.MULTILINE))
            if kind.startswith("[parameters"):
                cell.metadata["tags"] = ["parameters"]
        cells.append({**cell, "id": f"cell-{n}"})
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}, "colab": {"provenance": []}}
    notebook = nbformat.from_dict({"nbformat": 4, "nbformat_minor": 5, "metadata": metadata, "cells": cells})
    nbformat.validate(notebook)
    return nbformat.writes(notebook) + "\n"


def split(text: str) -> list[tuple[str, str]]:
    """The cells of a source: what stands behind their `# %%`, and their text.

    >>> split("# %% [markdown]\\n# # Title\\n\\n# %%\\nx = 1\\n")
    [('[markdown]', '# # Title'), ('', 'x = 1')]
    """
    parts = re.split(r"^# %%(.*)\n", text, flags=re.MULTILINE)[1:]
    return [(head.strip(), body.strip()) for head, body in zip(parts[::2], parts[1::2], strict=True)]


def badge(source: Path) -> str:
    """The link that opens a notebook in Colab."""
    at = f"https://colab.research.google.com/github/{REPOSITORY}/blob/main/colab/{source.stem}.ipynb"
    return f"[![Open in Colab]({BADGE})]({at})"


def main() -> None:
    """Write every notebook."""
    for source in sorted((ROOT / "colab" / "src").glob("*.py")):
        (ROOT / "colab" / f"{source.stem}.ipynb").write_text(built(source))


if __name__ == "__main__":
    main()
