"""What bench.py runs: cases, contenders and their times, attention, the manager's chores, reports on kernels, output.

Modules import one way: cases; timing and kernels of it; attention, chores and watch of those; output last.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))  # for oracle.py
