"""LLMasOS's own API, `/llmasos/v1`: models, plans, jobs, pulls, uploads, requests, logs, the machine, tasks,
knowledge bases, agents.

Keys, usage and the audit log are in `llmasos.serve.access`.
"""

from __future__ import annotations

from fastapi import APIRouter

from llmasos.serve.health import Readiness
from llmasos.serve.index import routes as index_routes
from llmasos.serve.index.room import HostedIndex
from llmasos.serve.inflight import Requests
from llmasos.serve.jobs import routes as job_routes
from llmasos.serve.jobs.room import Jobs
from llmasos.serve.jobs.tasks import Pipelines, TaskBatches
from llmasos.serve.log import Journal
from llmasos.serve.models import Models
from llmasos.serve.native import agents, knowledge, library, logs, pulls, requests, residents, system, tasks, uploads
from llmasos.serve.native.agents import Agents
from llmasos.serve.native.pulls import Pulls
from llmasos.serve.native.residents import InHost, InProcess, Residents
from llmasos.serve.native.system import Machine
from llmasos.serve.native.uploads import Uploads

__all__ = ["Agents", "InHost", "InProcess", "Machine", "Pulls", "Residents", "Uploads", "create_router"]


def create_router(
    models: Models,
    *,
    residents_: Residents,
    jobs: Jobs,
    batches: TaskBatches,
    pipelines: Pipelines,
    pulls_: Pulls,
    uploads_: Uploads,
    requests_: Requests,
    agents_: Agents,
    journal: Journal,
    machine: Machine,
    readiness: Readiness,
) -> APIRouter:
    router = APIRouter(prefix="/llmasos/v1", tags=["LLMasOS"])
    router.include_router(library.create_router(residents_))
    router.include_router(residents.create_router(residents_))
    router.include_router(job_routes.create_router(jobs, readiness.stopping))
    router.include_router(pulls.create_router(pulls_, readiness.stopping))
    router.include_router(uploads.create_router(uploads_))
    router.include_router(requests.create_router(requests_))
    router.include_router(logs.create_router(journal, readiness.stopping))
    router.include_router(system.create_router(machine))
    router.include_router(tasks.create_router(models, batches, pipelines))
    router.include_router(knowledge.create_router(agents_.bases))
    router.include_router(agents.create_router(agents_))
    router.include_router(index_routes.create_router(HostedIndex(jobs)))
    return router
