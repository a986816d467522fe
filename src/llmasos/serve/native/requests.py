"""The requests that the server works on, and ending one."""

from __future__ import annotations

from fastapi import APIRouter

from llmasos.client.types.native import CancelledRequest, RequestInfo, RequestInfoList
from llmasos.errors import NotFoundError
from llmasos.serve import inflight
from llmasos.serve.inflight import Requests
from llmasos.serve.native.common import responses


class RequestNotFoundError(NotFoundError):
    param = "id"


def create_router(requests: Requests) -> APIRouter:
    router = APIRouter(prefix="/requests")

    @router.get("", summary="The requests in flight, the oldest first")
    async def list_requests() -> RequestInfoList:
        own = inflight.current_id()
        return RequestInfoList(
            data=[
                RequestInfo(
                    id=one.id,
                    route=one.route,
                    model=one.model,
                    key=one.caller.name if one.caller.key_id is not None else None,
                    state=one.state,
                    age_seconds=round(one.age, 3),
                    num_prompt_tokens=one.num_prompt_tokens,
                    num_output_tokens=one.num_output_tokens,
                )
                for one in requests
                if one.id != own
            ]
        )

    @router.post("/{id}/cancel", summary="End a request", responses=responses(404))
    async def cancel(id: str) -> CancelledRequest:
        if requests.cancel(id) is None:
            raise RequestNotFoundError(f"No request {id!r} is in flight.", hint="It may have ended already.")
        return CancelledRequest(id=id)

    return router
