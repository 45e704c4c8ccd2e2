"""An engine in a control group: prints a line of JSON with its KV blocks and the machine's free memory.

python -m tests.engine.programs.limited_memory FOLDER_OF_THE_GROUP
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    (Path(sys.argv[1]) / "cgroup.procs").write_text(str(os.getpid()))  # before anything allocates memory

    import psutil

    from fastgen_jax import Engine

    engine = Engine.from_pretrained("sotu-1m", token_budget=16, budget_ladder=(), max_num_seqs=512)
    print(json.dumps([engine.config.num_blocks, psutil.virtual_memory().available]))
