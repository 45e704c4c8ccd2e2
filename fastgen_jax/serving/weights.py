"""Endpoints for trainers: new weights, adapters, pauses between steps. They are off unless the operator names a folder."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI
from pydantic import Field

from fastgen_jax.engine.adapters import unknown_adapter
from fastgen_jax.engine.updating import PauseMode
from fastgen_jax.serving.errors import ApiError
from fastgen_jax.serving.protocol import Body
from fastgen_jax.serving.state import ServerState


class WeightsRequest(Body):
    """POST /v1/weights: a checkpoint of the served model whose weights replace those in use."""

    path: Annotated[str, Field(min_length=1, description="Of a checkpoint, in the server's --weights-folder.")]
    version: Annotated[int, Field(ge=0, lt=2**63)] | None = Field(
        None, description="Reported with each token that these weights compute. None: the next one."
    )
    recompute: bool = Field(False, description="Compute the keys and values of unfinished requests again.")


class AdapterRequest(Body):
    """POST /v1/load_lora_adapter, with the names of vLLM."""

    lora_name: Annotated[str, Field(min_length=1, description="Requests choose the adapter by model:name.")]
    lora_path: Annotated[str, Field(min_length=1, description="A folder of PEFT in the server's --weights-folder.")]
    load_inplace: bool = Field(False, description="Replace the adapter that is loaded under this name.")


class UnloadRequest(Body):
    """POST /v1/unload_lora_adapter, with the names of vLLM."""

    lora_name: Annotated[str, Field(min_length=1)]
    lora_int_id: int | None = Field(None, description="Means nothing here.")


class PauseRequest(Body):
    """POST /v1/pause; see `Engine.pause`."""

    mode: PauseMode = "keep"


def add_weights(app: FastAPI, server: ServerState, errors: dict[int | str, dict[str, Any]]) -> None:
    """Adds the endpoints to the application; `errors` describes their error responses."""
    updating = asyncio.Lock()  # two sets of new weights at a time would need three times the memory

    @app.get("/v1/weights", responses=errors)
    async def weights() -> dict[str, object]:
        """The version of the weights of each replica, and whether it is paused."""
        snapshots = await server.ready().snapshots()
        return {"replicas": [{"version": s["weight_version"], "paused": s["paused"]} for s in snapshots]}

    @app.post("/v1/weights", responses=errors)
    async def update(body: WeightsRequest) -> dict[str, object]:
        """Reads weights while requests go on, and exchanges them between two steps."""
        path = _path_in(_folder(server), body.path)
        backend = server.ready()
        async with updating:
            start = time.monotonic()
            version = await backend.update_params(str(path), version=body.version, recompute=body.recompute)
        return {"version": version, "seconds": round(time.monotonic() - start, 3)}

    @app.post("/v1/load_lora_adapter", responses=errors)
    async def load_adapter(body: AdapterRequest) -> dict[str, object]:
        """Reads an adapter while requests go on, and adds it between two steps."""
        path = str(_path_in(_folder(server), body.lora_path, param="lora_path"))
        backend, version = server.ready(), 0
        async with updating:
            if body.load_inplace and body.lora_name in backend.adapters:
                version = await backend.update_adapter(body.lora_name, path)
            else:
                await backend.load_adapter(body.lora_name, path)
        return {"model": f"{server.model.name}:{body.lora_name}", "version": version}

    @app.post("/v1/unload_lora_adapter", responses=errors)
    async def unload_adapter(body: UnloadRequest) -> dict[str, object]:
        """Refuses new requests of an adapter; those that are running go on."""
        _folder(server)
        backend = server.ready()
        async with updating:
            if body.lora_name not in backend.adapters:
                raise ApiError(
                    unknown_adapter(body.lora_name, backend.adapters), status=404, param="lora_name", code="not_found"
                )
            await backend.unload_adapter(body.lora_name)
        return {"model": f"{server.model.name}:{body.lora_name}", "loaded": False}

    @app.post("/v1/pause", responses=errors)
    async def pause(body: PauseRequest) -> dict[str, object]:
        """Returns when no step runs and none will until /v1/resume."""
        _folder(server)
        await server.ready().pause(body.mode)
        return {"paused": True}

    @app.post("/v1/resume", responses=errors)
    async def resume() -> dict[str, object]:
        """Ends a pause."""
        _folder(server)
        await server.ready().resume()
        return {"paused": False}


def _folder(server: ServerState) -> Path:
    """The folder of new weights; ApiError 403 without one."""
    folder = server.model.config.weights_folder
    if folder is None:
        raise ApiError(
            "this server does not accept new weights, adapters or pauses; start it with --weights-folder FOLDER, in "
            "which the checkpoints or adapters are",
            status=403,
            code="weights_disabled",
        )
    return Path(folder).resolve()


def _path_in(folder: Path, name: str, *, param: str = "path") -> Path:
    """The checkpoint `name` of the folder; ApiError for one that is missing or elsewhere."""
    try:
        path = (folder / name).resolve()
        exists = path.is_relative_to(folder) and path.exists()
    except (OSError, ValueError):  # too long, or with a null byte
        exists, path = False, folder
    if not path.is_relative_to(folder):
        raise ApiError(
            f"{param} is {name!r}, which is not in the folder of --weights-folder; pass a path relative to it",
            status=403,
            param=param,
            code="path_outside",
        )
    if not exists:
        raise ApiError(
            f"{param} is {name[:200]!r}, but the folder of --weights-folder has no such checkpoint or adapter; write it",
            status=404,
            param=param,
            code="not_found",
        )
    return path
