"""Trackers by name: TensorBoard, Weights & Biases, or a class of the user. Importing this registers both."""

from trainer.trackers.base import TRACKERS, TrackedRow, TrackedRun, Tracker, build_trackers
from trainer.trackers.tensorboard import TensorBoard
from trainer.trackers.wandb import WeightsAndBiases
