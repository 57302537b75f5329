"""Many processes that train one model: replicas (DDP or none) and sharded weights (FSDP2)."""
