"""One run on several processes: who they are, how they agree, and how weights and gradients are spread over them."""

from llmasos.train.parallel.launch import joined
from llmasos.train.parallel.ranks import LostRankError, Ranks
from llmasos.train.parallel.shard import spread, whole

__all__ = ["LostRankError", "Ranks", "joined", "spread", "whole"]
