"""The order, the seeds and the shards of any DataLoader, from any position in an epoch."""

from lockstep.data.loading.feeding import choose_fetcher
from lockstep.data.loading.sampling import DataPosition
from lockstep.data.loading.seeding import SampleKey, derive_seed, preserve_rng_state, seed_cpu
from lockstep.data.loading.sharding import DataSharding, ShardedLoader
from lockstep.data.loading.training import TrainingLoader, current_batch, preparation_times, stream_records

__all__ = [
    "DataPosition",
    "DataSharding",
    "SampleKey",
    "ShardedLoader",
    "TrainingLoader",
    "choose_fetcher",
    "current_batch",
    "derive_seed",
    "preparation_times",
    "preserve_rng_state",
    "seed_cpu",
    "stream_records",
]
