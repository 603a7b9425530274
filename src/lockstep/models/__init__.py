"""The shared classifier, its networks, optimizers and learning-rate schedules."""

from lockstep.models.classifier import Classifier
from lockstep.models.networks import MLP, ConvNet
