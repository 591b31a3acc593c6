"""The folders of the checkout, the chart, the virtual environment's programs, and the cache."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHART = ROOT / "charts" / "hcm-db-migrations"
BIN = Path(sys.executable).parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hcm-db-migrations"
