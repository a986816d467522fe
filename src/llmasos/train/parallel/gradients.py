"""Gradients that every rank has whole are added up over the ranks while the backward pass still goes on."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET = 25 * 2**20
"""Bytes that are sent at once."""


class Reducer:
    """Buckets of parameters, in the order in which gradients come (the reverse of the model's). They are sent in that
    order on all ranks, each as soon as it is complete; a parameter without a gradient counts as zeros."""

    def __init__(self, parameters: Sequence[Tensor], group: Any) -> None:
        self.group = group
        self.buckets: list[list[Tensor]] = []
        size = BUCKET
        for parameter in reversed(parameters):
            if size >= BUCKET or self.buckets[-1][0].dtype != parameter.dtype:
                self.buckets.append([])
                size = 0
            self.buckets[-1].append(parameter)
            size += parameter.nbytes
        self._is_last = False
        self._begin()
        for number, bucket in enumerate(self.buckets):
            for parameter in bucket:
                parameter.register_post_accumulate_grad_hook(partial(self._ready, number))

    def _begin(self) -> None:
        self._missing = [len(bucket) for bucket in self.buckets]
        self._sent: list[tuple[Tensor, Any]] = []

    def last(self) -> None:
        """The next backward pass is the step's last."""
        self._is_last = True

    def _ready(self, number: int, parameter: Tensor) -> None:
        if self._is_last:
            self._missing[number] -= 1
            while len(self._sent) < len(self.buckets) and self._missing[len(self._sent)] == 0:
                self._send()

    def _send(self) -> None:
        bucket = self.buckets[len(self._sent)]
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        flat = torch.cat([part.reshape(-1) for part in parts])
        self._sent.append((flat, dist.all_reduce(flat, group=self.group, async_op=True)))

    def finish(self) -> None:
        """Send what is left, wait, and put the sums where optimizers look for them."""
        while len(self._sent) < len(self.buckets):
            self._send()
        for bucket, (flat, work) in zip(self.buckets, self._sent, strict=True):
            work.wait()
            for parameter, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                parameter.grad = part.view_as(parameter)
        self._is_last = False
        self._begin()
