"""DataModules, and the sampling and sharding of any DataLoader."""

from lockstep.data.base import ImageData, InMemoryImages
from lockstep.data.digits import Digits
from lockstep.data.downloaded import CIFAR10, MNIST
from lockstep.data.image_folder import ImageFolder
from lockstep.data.sampling import DataPosition
from lockstep.data.seeding import SampleKey, derive_seed
from lockstep.data.sharding import DataSharding, ShardedLoader
from lockstep.data.synthetic import Synthetic
from lockstep.data.training import TrainingLoader, current_batch
