"""Losses R on the outputs: value, gradient, Hessian, and the metric of the output space F."""

from lazyjax.losses.losses import LogisticLoss as LogisticLoss
from lazyjax.losses.losses import Loss as Loss
from lazyjax.losses.losses import SoftmaxCrossEntropy as SoftmaxCrossEntropy
from lazyjax.losses.losses import SquareLoss as SquareLoss
from lazyjax.losses.losses import logistic_loss as logistic_loss
from lazyjax.losses.losses import softmax_cross_entropy as softmax_cross_entropy
from lazyjax.losses.losses import square_loss as square_loss
