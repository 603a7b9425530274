"""A Slurm cluster on one machine, for laptops, CI and development: its configuration, daemons and processes."""

from lockstep.slurm.cluster.cgroups import binds_cpus
from lockstep.slurm.cluster.conf import ClusterError, ClusterSpec, ClusterUsageError, scrubbed_environment
from lockstep.slurm.cluster.daemons import HEALTHY, Cluster
from lockstep.slurm.cluster.processes import DAEMONS
