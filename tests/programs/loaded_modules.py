"""Imports the modules named on the command line and prints every module that is then loaded, one a line."""

import importlib
import sys

for name in sys.argv[1:]:
    importlib.import_module(name)
print(*sorted(sys.modules), sep="\n")
