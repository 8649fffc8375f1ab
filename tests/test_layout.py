"""The repository's shape: doors point home, rooms are namespace packages, imports follow the table."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "veneer"
MAY_IMPORT = {
    "kernels": {"kernels"},
    "adapters": {"adapters", "kernels"},
    "engine": {"engine", "adapters", "kernels"},
    "training": {"training", "engine", "adapters", "kernels"},
    "server": {"server", "training", "engine", "adapters", "kernels"},
}
# The engine's messages are plain values that residency reports in.
EXCEPTIONS = {("adapters", "veneer.engine.messages")}
TORCH_FREE = [
    "veneer.adapters.archive",
    "veneer.adapters.names",
    "veneer.adapters.recipes",
    "veneer.adapters.saved_blends",
    "veneer.adapters.sources",
    "veneer.adapters.store",
    "veneer.engine.client",
    "veneer.engine.scheduler",
    "veneer.engine.source",
    "veneer.server.app",
    "veneer.training.evaluation.report",
    "veneer.training.evaluation.gate",
    "veneer.training.jobs.hyperparameters",
    "veneer.training.jobs.job_store",
    "veneer.training.recipe",
    "veneer.server.cli",
    "veneer.training.planning.advice",
    "veneer.training.data.rows",
    "veneer.training.data.report",
    "veneer.server.eval_cli",
]


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_door_points_home(room: str) -> None:
    door = ROOT / room
    if not door.exists():
        pytest.skip("this checkout has no links; nothing depends on them")
    assert door.resolve() == SOURCE / room


def test_rooms_have_no_init() -> None:
    assert [str(p) for room in MAY_IMPORT for p in (SOURCE / room).rglob("__init__.py")] == []
    assert list((ROOT / "tests").rglob("__init__.py")) == []
    assert not (ROOT / "conftest.py").exists()


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
    return found


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_follow_the_table(room: str) -> None:
    wrong = []
    for path in (SOURCE / room).rglob("*.py"):
        for name in _imports(path):
            parts = name.split(".")
            if parts[0] != "veneer" or len(parts) < 2 or parts[1] not in MAY_IMPORT:
                continue
            if parts[1] not in MAY_IMPORT[room] and (room, name) not in EXCEPTIONS:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert wrong == []


def test_every_module_says_what_it_is() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for folder in (SOURCE, ROOT / "benchmarks", ROOT / "tests")
        for path in folder.rglob("*.py")
        if not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert silent == []


@pytest.mark.parametrize("module", TORCH_FREE)
def test_imports_no_torch(module: str) -> None:
    code = f"import {module}, sys; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
