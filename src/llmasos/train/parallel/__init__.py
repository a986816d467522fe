"""One run on several processes: who they are, how they agree, and how weights and gradients are spread over them."""

from llmasos.train.parallel.launch import begins, joined, regrouped
from llmasos.train.parallel.ranks import LostRankError, Ranks, explained
from llmasos.train.parallel.shard import spread, whole

__all__ = ["LostRankError", "Ranks", "begins", "explained", "joined", "regrouped", "spread", "whole"]
