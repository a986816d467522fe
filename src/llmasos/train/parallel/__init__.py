"""One run on several processes: who they are, how they agree, and how weights and gradients are spread over them."""

from llmasos.train.parallel.launch import begins, joined, regrouped
from llmasos.train.parallel.ranks import LostRankError, Ranks, explained
from llmasos.train.parallel.shard import Spreader, whole, whole_shape

__all__ = ["LostRankError", "Ranks", "Spreader", "begins", "explained", "joined", "regrouped", "whole", "whole_shape"]
