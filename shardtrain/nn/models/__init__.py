"""Models for signals, images and volumes, ready for any mesh."""

from shardtrain.nn.models.classic import VGG, AlexNet, LeNet
from shardtrain.nn.models.locally_connected import LocalNet
from shardtrain.nn.models.resnet import ResNet
from shardtrain.nn.models.unet import UNet

__all__ = ["VGG", "AlexNet", "LeNet", "LocalNet", "ResNet", "UNet"]
