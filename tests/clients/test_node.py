"""Clients of JavaScript: OpenAI's and Vercel's AI SDK. Skipped without node, or without the packages.

They are found in the folder VENEER_NODE_MODULES names: one in which `npm install openai ai @ai-sdk/openai
@ai-sdk/openai-compatible` was run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

NODE = shutil.which("node")
FOLDER = os.environ.get("VENEER_NODE_MODULES")
SCRIPTS = Path(__file__).parent / "node"

pytestmark = pytest.mark.skipif(NODE is None or FOLDER is None, reason="no node, or no packages for it")


@pytest.mark.parametrize("script", ["openai.mjs", "ai_sdk.mjs"])
def test_scripts(url: str, script: str, tmp_path: Path) -> None:
    assert NODE is not None
    assert FOLDER is not None
    (tmp_path / "node_modules").symlink_to(Path(FOLDER) / "node_modules")
    shutil.copy(SCRIPTS / script, tmp_path)
    run = subprocess.run(
        [NODE, str(tmp_path / script), url], capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.splitlines()[-1] == "done"
