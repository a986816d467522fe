"""Adapters of the served models, loaded and unloaded while the server runs: vLLM's routes.

They read paths of this machine that a client names, so they answer only where the server was started to allow it. An
adapter is served under its name, like a model.
"""

from __future__ import annotations

from fastapi import APIRouter

from llmasos.client.types import DeletedModel, ErrorBody, LoadAdapterRequest, Model, UnloadAdapterRequest
from llmasos.errors import UnsupportedError
from llmasos.serve import inflight
from llmasos.serve.models import Models
from llmasos.serve.openai import describe

_WRONG = {
    400: "The name is taken, the adapter does not fit the model, or several models are served and none is named.",
    403: "The server was started without leave to load adapters.",
    404: "There is no such folder, model or adapter.",
    409: "The adapter is in use.",
}


class LoadingRefusedError(UnsupportedError):
    http_status = 403


def create_router(models: Models, *, enabled: bool) -> APIRouter:
    router = APIRouter(
        prefix="/v1",
        tags=["Adapters"],
        responses={k: {"model": ErrorBody, "description": v} for k, v in _WRONG.items()},
    )

    def check() -> None:
        if not enabled:
            raise LoadingRefusedError(
                "This server loads no adapters on request: it would read any path that a client names.",
                hint="Start it with --enable-lora-loading, or name adapters at the start: --adapter name=path.",
            )

    @router.post("/load_lora_adapter", summary="Load a LoRA adapter and serve it")
    async def load(body: LoadAdapterRequest) -> Model:
        inflight.asks(body.lora_name)
        check()
        await models.load_adapter(body.lora_name, body.lora_path, body.base_model_name)
        return describe(models, body.lora_name)

    @router.post("/unload_lora_adapter", summary="Serve a LoRA adapter no longer")
    async def unload(body: UnloadAdapterRequest) -> DeletedModel:
        inflight.asks(body.lora_name)
        check()
        await models.unload_adapter(body.lora_name)
        return DeletedModel(id=body.lora_name, object="model", deleted=True)

    return router
