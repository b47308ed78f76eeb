"""Several processes: those of a host compute with one copy of the routed experts, and LoRA is averaged as DDP does."""

from ktmoe.processes.launched import check_launch, check_sharding, on_this_host
from ktmoe.processes.ranks import Ranks, join
from ktmoe.processes.sharing import Sharing


__all__ = ["Ranks", "Sharing", "check_launch", "check_sharding", "join", "on_this_host"]
