"""Makes the benchmarks importable: they are scripts of the repository, not part of the package."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(
    str(Path(__file__).parents[2])
)  # last: the doors at the root must not hide installed packages
