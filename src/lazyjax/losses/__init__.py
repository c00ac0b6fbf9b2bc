"""Losses R on the outputs: value, gradient, Hessian, constants, and the metric of the output space F."""

from lazyjax.losses.cross_entropy import SoftmaxCrossEntropy as SoftmaxCrossEntropy
from lazyjax.losses.cross_entropy import softmax_cross_entropy as softmax_cross_entropy
from lazyjax.losses.hessian_root import DenseRoot as DenseRoot
from lazyjax.losses.hessian_root import DiagonalRoot as DiagonalRoot
from lazyjax.losses.hessian_root import HessianRoot as HessianRoot
from lazyjax.losses.logistic import LogisticLoss as LogisticLoss
from lazyjax.losses.logistic import logistic_loss as logistic_loss
from lazyjax.losses.loss import FunctionLoss as FunctionLoss
from lazyjax.losses.loss import Loss as Loss
from lazyjax.losses.loss import as_loss as as_loss
from lazyjax.losses.loss import function_loss as function_loss
from lazyjax.losses.square import SquareLoss as SquareLoss
from lazyjax.losses.square import square_loss as square_loss
