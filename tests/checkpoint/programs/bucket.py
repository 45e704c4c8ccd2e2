"""Writes the checkpoint argv[1] as a snapshot to a bucket of an emulator, inspects and loads it there.

Further arguments are those of `fastgen generate`, which then runs with the snapshot.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import jax
import numpy as np
from gcp_storage_emulator.handlers import objects
from gcp_storage_emulator.server import create_server

download = objects.download


def with_generation(request: Any, response: Any, storage: Any, *arguments: Any, **options: Any) -> None:
    # The service states the generation of what it sends; the emulator does not, and TensorStore requires it.
    download(request, response, storage, *arguments, **options)
    if response.status < 400:
        stored = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
        response["x-goog-generation"] = str(stored["generation"])


objects.download = with_generation
server = create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
server.start()
address = f"http://127.0.0.1:{server._api._httpd.socket.getsockname()[1]}"
os.environ |= {
    "STORAGE_EMULATOR_HOST": address,
    "TENSORSTORE_GCS_HTTP_URL": address,
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
}
try:
    from fastgen_jax.checkpoint import load_params, open_checkpoint, resolve_model
    from fastgen_jax.cli import main
    from fastgen_jax.text import load_tokenizer

    source, url = sys.argv[1], "gs://bucket/models/tiny"
    assert main(["convert", source, url]) == 0
    assert main(["convert", source, url]) == 2, "the bucket has a snapshot there already"
    assert main(["inspect", url]) == 0
    remote, local = open_checkpoint(resolve_model(url)), open_checkpoint(source)
    jax.tree.map(np.testing.assert_array_equal, load_params(remote, dtype="float32"), load_params(local, dtype="float32"))
    text = "gold and silver"
    assert load_tokenizer(remote.tokenizer_source).encode(text) == load_tokenizer(local.tokenizer_source).encode(text)
    assert main(["inspect", "gs://bucket/absent"]) == 2
    if len(sys.argv) > 2:
        assert main(["generate", "--model", url, *sys.argv[2:]]) == 0
finally:
    server.stop()
