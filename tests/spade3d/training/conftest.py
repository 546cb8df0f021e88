"""The tests of this folder share a task, and so do the processes they start in it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
