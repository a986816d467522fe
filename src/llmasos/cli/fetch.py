"""Getting a model: plan first, then bytes. `plan` and `pull` are commands; `load` is how the others come to a model."""

from __future__ import annotations

import dataclasses
import json as jsonlib
from typing import TYPE_CHECKING, Any

from llmasos.cli.messages import t
from llmasos.cli.render import Reporter, Told, emit, pairs, say, size, working
from llmasos.errors import DiskFullError, InsufficientMemoryError, InvalidInputError

if TYPE_CHECKING:
    from llmasos.inference.llm import LLM
    from llmasos.inference.remote import RemoteLLM
    from llmasos.store import Card, Plan


def plan(
    model: str,
    /,
    *,
    context: int | None = None,
    concurrency: int = 1,
    device: str = "auto",
    dtype: str = "auto",
    json: bool = False,
) -> int:
    """`llmasos plan`: exit code 0 if the model fits, 5 if the disk and 7 if the memory is too small."""
    from llmasos.store import plan as make_plan

    found = make_plan(model, context=context, concurrency=concurrency, device=device, dtype=dtype)
    if json:
        extra = {"memory_bytes": found.memory_bytes, "fits": found.fits, "verdict": found.verdict}
        emit(dataclasses.asdict(found) | extra)
    else:
        print(plan_text(found))
    if found.fits:
        return 0
    return InsufficientMemoryError.exit_code if found.fits_disk else DiskFullError.exit_code


def plan_text(plan: Plan) -> str:
    """What a model costs, in a few lines."""
    facts = [
        (t("plan.model"), ", ".join(filter(None, (plan.name, plan.architecture, plan.format, plan.licence)))),
        (t("plan.source"), plan.source),
    ]
    if not plan.installed:
        download = t("plan.download_value", download=size(plan.download_bytes), free=size(plan.disk_free))
        facts.append((t("plan.download"), download))
    memory = t(
        "plan.memory_value",
        weights=size(plan.weights_bytes),
        cache=size(plan.kv_cache_bytes),
        context=plan.context,
        concurrency=plan.concurrency,
        rest=size(plan.activation_bytes),
        device=plan.device,
        dtype=plan.dtype,
    )
    facts.append((t("plan.memory"), memory))
    facts.append((t("plan.verdict"), verdict(plan)))
    return pairs(facts)


def verdict(plan: Plan) -> str:
    """What the plan comes to, in the user's language."""
    need, free = size(plan.memory_bytes), size(plan.memory_free)
    if not plan.fits_disk:
        return t("verdict.disk", need=size(plan.disk_bytes), free=size(plan.disk_free))
    if plan.fits_memory:
        return t("verdict.fits", need=need, free=free, device=plan.device, context=plan.max_context)
    if plan.max_context:
        return t("verdict.less", need=need, free=free, device=plan.device, context=plan.max_context)
    return t("verdict.memory", need=need, free=free, device=plan.device)


def pull(model: str, /, *, name: str | None = None, force: bool = False, json: bool = False) -> None:
    """`llmasos pull`."""
    card = fetch(model, name=name, force=force)
    if json:
        print(jsonlib.dumps(jsonlib.loads(card.model_dump_json(exclude={"error"})), ensure_ascii=False, indent=2))


def fetch(ref: str, *, name: str | None = None, force: bool = False) -> Card:
    """Install `ref`, its plan shown first. Refuses what cannot run here, unless forced."""
    from llmasos import store

    library = store.Library()
    installed = name or library.resolve(ref).name
    if library.has(installed):
        card = store.pull(ref, name=name, on_progress=Reporter())  # says notices, and whose the name is
        say(t("pull.installed", name=card.name))
        return card
    _show_plan(ref, force=force)
    try:
        with Reporter() as report:
            return store.pull(ref, name=name, on_progress=report)
    except KeyboardInterrupt:
        say()
        say(t("pull.stopped", ref=ref))
        raise Told from None


def _show_plan(ref: str, *, force: bool) -> None:
    from llmasos import store
    from llmasos.store.transfer import UnsupportedRange

    try:
        with working(t("plan.working", ref=ref)):
            plan = store.plan(ref)
    except UnsupportedRange as e:
        say(f"{e.message}")
        return
    say(plan_text(plan))
    if force or plan.installed:
        return
    hint = t("pull.force", ref=ref)
    if not plan.fits_disk:
        raise DiskFullError(verdict(plan), hint=hint)
    if not plan.max_context:  # a plan for less context than the usual one is still a plan
        raise InsufficientMemoryError(verdict(plan), hint=hint)


def load(
    ref: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    quantization: str = "auto",
    adapter: str | None = None,
    **engine: Any,
) -> LLM | RemoteLLM:
    """The model `ref` ready to run, fetched if need be, with an adapter loaded under the name that it was given by.
    Wrong options are said before anything is fetched."""
    llm = _load(ref, device, dtype, quantization, engine)
    if adapter is not None:
        try:
            llm.load_adapter(adapter)
        except BaseException:
            llm.close()
            raise
    return llm


def _load(ref: str, device: str, dtype: str, quantization: str, engine: dict[str, Any]) -> LLM | RemoteLLM:
    from llmasos.client.providers import is_remote
    from llmasos.inference.llm import LLM

    if is_remote(ref):
        return LLM.from_pretrained(ref, device=device, dtype=dtype, quantization=quantization, **engine)
    with working(t("load.working", ref=ref)):
        _check_placement(device, dtype, quantization)
    fetched = needs_fetching(ref)
    if fetched:
        fetch(ref)
    with working(t("load.working", ref=ref)):
        return LLM.from_pretrained(
            ref,
            device=device,
            dtype=dtype,
            quantization=quantization,
            on_progress=(lambda _: None) if fetched else Reporter(),
            **engine,
        )


def _check_placement(device: str, dtype: str, quantization: str) -> None:
    from llmasos.devices import place
    from llmasos.models.load import QUANTIZATIONS

    place(device, dtype)
    if quantization not in QUANTIZATIONS:
        raise InvalidInputError(
            f"quantization={quantization!r} is not known.",
            hint=f"Use {', '.join(QUANTIZATIONS)}.",
            param="quantization",
        )


def needs_fetching(ref: str) -> bool:
    """Whether `ref` is neither installed nor on this machine. Raises NotFoundError for an unknown name."""
    from llmasos.store import Library
    from llmasos.store.adapters import find_adapter
    from llmasos.store.catalog import local_path, looks_like_model

    library = Library()
    if library.has(ref) or looks_like_model(local_path(ref)):
        return False
    if (adapter := find_adapter(ref)) is not None:
        ref = adapter.base
        if library.has(ref) or looks_like_model(local_path(ref)):
            return False
    return library.resolve(ref).sources[0].kind != "file"
