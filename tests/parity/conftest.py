"""Parity tests compare with torch, transformers and peft, which only the test extra brings."""

import pytest

pytest.importorskip("torch", reason="torch is not installed; the test extra brings it on Python 3.11")
pytest.importorskip("peft", reason="peft is not installed; the test extra brings it on Python 3.11")
