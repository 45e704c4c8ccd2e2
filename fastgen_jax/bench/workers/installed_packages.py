"""Prints which of the packages named as arguments this Python has, as a JSON list. Run by its path, under any Python."""

import importlib.util
import json
import sys

print(json.dumps([name for name in sys.argv[1:] if importlib.util.find_spec(name)]))
