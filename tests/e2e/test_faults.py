"""A short campaign of kills, damaged files and a full disk; `tools/faults.py` runs the long one."""

import os
import re
import subprocess
import sys

from tests.conftest import ROOT


def test_runs_survive_and_end_bit_equal(tmp_path):
    command = [sys.executable, "-m", "tools.faults", "--kills", "4", "--corrupt", "3", "--full", "1"]
    done = subprocess.run(
        [*command, "--work", str(tmp_path)], cwd=ROOT, env=os.environ, check=False, timeout=1500, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = dict(re.findall(r"^  (\S.*?)  +(\d+)$", done.stdout, re.M))
    assert int(found["kills"]) == 4
    assert found["silent corruptions"] == "0"
    assert "all as it should be" in done.stdout
