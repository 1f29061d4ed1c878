"""The oldest client of OpenAI's that still installs, from an environment of its own."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.serve.conftest import jsonl

SCRIPT = Path(__file__).parent.parent / "openai_old.py"


def test_the_oldest_client_does_the_same(url, tmp_path):
    python = os.environ.get("JAXTUNE_OLD_OPENAI", "")
    if not Path(python).is_file():
        pytest.skip("JAXTUNE_OLD_OPENAI names no Python that has openai 1.0.0")
    (tmp_path / "data.jsonl").write_bytes(jsonl())
    command = [python, "-W", "ignore", str(SCRIPT), f"{url}/v1", str(tmp_path / "data.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["version"].startswith("1.")
    assert "does not exist" in told["refused"]
