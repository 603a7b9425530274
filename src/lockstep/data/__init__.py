"""DataModules, and the sampling and sharding of any DataLoader."""

from lockstep.data.base import ImageData, InMemoryImages
from lockstep.data.digits import Digits
from lockstep.data.downloaded import CIFAR10, MNIST
from lockstep.data.image_folder import ImageFolder
from lockstep.data.sampling import DataPosition, GlobalBatchSampler
from lockstep.data.seeding import derive_seed
from lockstep.data.sharding import DataSharding, SkipFirstBatches
from lockstep.data.synthetic import Synthetic
