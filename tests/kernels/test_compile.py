"""Kernels with adapters' changes of the base's input and output, or what they share, compile without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_compiles(capability: int, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, str(Path(__file__).with_name("compile_all.py")), str(capability)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = [line.split() for line in done.stdout.splitlines()]
    assert [name for name, _ in found] == [
        "add_update",
        "gated",
        "rope",
        "transform_input",
        "transform_input",
        "transform_output",
        "shrink",
        "scale_ranks",
        "add_update",
        "gated",
        "gated",
        "rope",
        "rope",
    ]
    assert all(int(size) > 1000 for _, size in found)
