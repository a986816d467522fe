"""GET /v1/models: what is served, how long its context is and what it can do."""

from __future__ import annotations

from llmasos.client.types import Model, ModelCapabilities
from llmasos.inference.calling import takes_tools
from llmasos.serve.models import Models
from llmasos.serve.served import ServedModel
from llmasos.text.reply import reply_form


def describe(models: Models, name: str) -> Model:
    served = models[name]
    return Model(
        id=name,
        object="model",
        created=models.created,
        owned_by="llmasos",
        context_length=served.model.context_length,
        max_model_len=served.model.context_length,
        capabilities=capabilities(served.model),
        parent=served.base if served.adapter is not None else None,
    )


def capabilities(model: ServedModel) -> ModelCapabilities:
    """Read from the model's files: its kind and its chat template."""
    template = model.chat_template
    form = reply_form(template)
    return ModelCapabilities(
        completion=not model.is_encoder,
        chat=not model.is_encoder and template is not None,
        tools=template is not None and takes_tools(template),
        reasoning=template is not None and (form.channels or form.reasoning is not None),
        embeddings=True,
    )
