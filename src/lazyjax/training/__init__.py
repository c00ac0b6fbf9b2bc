"""Minibatch training at any scale alpha, its options, and recipes of the paper."""

from lazyjax.training.arguments import TrainingOptions as TrainingOptions
from lazyjax.training.recipes import inverse_time_decay as inverse_time_decay
from lazyjax.training.recipes import pad_and_crop as pad_and_crop
from lazyjax.training.recipes import random_flip as random_flip
from lazyjax.training.train import Training as Training
from lazyjax.training.train import train as train
from lazyjax.training.train import trained_outputs as trained_outputs
