"""OpenAI's fine-tuning jobs on the wire.

Source: OpenAI API reference. Beside its fields a request may have `llmasos`: any option of a run of ours.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from llmasos.client.types.base import KeptRequest, WireRequest, WireResponse
from llmasos.client.types.response_items import Id
from llmasos.client.types.responses import Metadata

FineTuningStatus = Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
MethodType = Literal["supervised", "dpo", "reinforcement"]


class HyperparametersRequest(WireRequest):
    n_epochs: Literal["auto"] | int = Field(
        default="auto", description="auto: 3, more of few samples and fewer of many."
    )
    batch_size: Literal["auto"] | int = Field(
        default="auto", description="Samples of a step, about: steps are counted in tokens."
    )
    learning_rate_multiplier: Literal["auto"] | float = Field(
        default="auto", description="Of the rate that is usual for the method."
    )


class SupervisedRequest(WireRequest):
    hyperparameters: HyperparametersRequest | None = None


class MethodRequest(WireRequest):
    type: MethodType
    supervised: SupervisedRequest | None = None
    dpo: dict[str, Any] | None = None
    reinforcement: dict[str, Any] | None = None


class FineTuningRequest(KeptRequest):
    """Body of POST /v1/fine_tuning/jobs."""

    UNSUPPORTED: ClassVar = {"integrations": ([],)}

    model: str = Field(min_length=1, max_length=512, description="A model that is installed at the server.")
    training_file: Id = Field(description="A file with purpose fine-tune.")
    validation_file: Id | None = Field(None, description="Another one, on which the loss is measured.")
    suffix: str | None = Field(None, min_length=1, max_length=64, description="A part of the new model's name.")
    seed: int | None = Field(None, ge=0, lt=2**31)
    hyperparameters: HyperparametersRequest | None = Field(None, description="As in method.supervised.")
    method: MethodRequest | None = None
    metadata: Metadata | None = None
    llmasos: dict[str, Any] | None = Field(
        None,
        description='Options of a run, e.g. {"tuning": "full", "lora": {"r": 8}}; data and names are not among them.',
    )


class Hyperparameters(WireResponse):
    """ "auto" until the files were read."""

    n_epochs: Literal["auto"] | int | float = "auto"
    batch_size: Literal["auto"] | int = "auto"
    learning_rate_multiplier: Literal["auto"] | float = "auto"


class Supervised(WireResponse):
    hyperparameters: Hyperparameters


class FineTuningMethod(WireResponse):
    type: MethodType = "supervised"
    supervised: Supervised | None = None


class FineTuningError(WireResponse):
    code: str
    message: str
    param: str | None = None


class FineTuningJob(WireResponse):
    """`llmasos`: the options of the run that were given, and how far it is (`step`, `steps`)."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    error: FineTuningError | None = None
    fine_tuned_model: str | None = None
    finished_at: int | None = None
    hyperparameters: Hyperparameters
    model: str
    organization_id: str = "llmasos"
    result_files: list[str] = Field(default_factory=list)
    seed: int
    status: FineTuningStatus
    trained_tokens: int | None = None
    training_file: str
    validation_file: str | None = None
    estimated_finish: int | None = None
    integrations: list[Any] = Field(default_factory=list)
    metadata: dict[str, str] | None = None
    method: FineTuningMethod
    suffix: str | None = None
    llmasos: dict[str, Any] = Field(default_factory=dict)


class FineTuningJobList(WireResponse):
    object: Literal["list"] = "list"
    data: list[FineTuningJob]
    has_more: bool = False


class FineTuningEvent(WireResponse):
    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"] = "info"
    message: str
    type: Literal["message", "metrics"] = "message"
    data: dict[str, Any] | None = None


class FineTuningEventList(WireResponse):
    object: Literal["list"] = "list"
    data: list[FineTuningEvent]
    has_more: bool = False


class CheckpointMetrics(WireResponse):
    step: int
    train_loss: float | None = None
    valid_loss: float | None = None
    full_valid_loss: float | None = None


class FineTuningCheckpoint(WireResponse):
    """`served`: whether `fine_tuned_model_checkpoint` can be asked."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    metrics: CheckpointMetrics
    step_number: int
    served: bool = True


class FineTuningCheckpointList(WireResponse):
    object: Literal["list"] = "list"
    data: list[FineTuningCheckpoint]
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool = False
