"""Lets the tests here import `synthetic`: pytest's importlib mode adds no path of its own."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
