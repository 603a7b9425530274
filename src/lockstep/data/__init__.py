"""DataModules: datasets by name, and what they share."""

from lockstep.data.base import STAGE_SPLITS, ImageData, InMemoryImages
from lockstep.data.digits import Digits
from lockstep.data.downloaded import CIFAR10, MNIST
from lockstep.data.file_index import FoundImages, list_images, printable
from lockstep.data.image_folder import ImageFolder
from lockstep.data.packed import ShardDataset
from lockstep.data.shards import Shards
from lockstep.data.synthetic import Synthetic
