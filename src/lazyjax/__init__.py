"""How lazily does a model train?

A model is any JAX function `h(w) -> outputs` of a pytree of parameters. lazyjax follows its gradient flow
and that of its tangent model at any output scale, from feature learning to the lazy limit, computes its
tangent kernel, and tells how far apart the two can be.

    import lazyjax as lj

Start with `lj.diagnose` for one answer, with `lj.compare` for the two flows, with `lj.gram` for the kernel.
"""

from importlib.metadata import version as _version

# Models, and maps between models.
from lazyjax.models.shallow import diagonal_linear as diagonal_linear
from lazyjax.models.shallow import init_diagonal_linear as init_diagonal_linear
from lazyjax.models.shallow import init_mlp as init_mlp
from lazyjax.models.shallow import init_two_layer as init_two_layer
from lazyjax.models.shallow import mlp as mlp
from lazyjax.models.shallow import two_layer as two_layer
from lazyjax.models.deep import init_resnet18 as init_resnet18
from lazyjax.models.deep import init_vgg11 as init_vgg11
from lazyjax.models.deep import resnet18 as resnet18
from lazyjax.models.deep import vgg11 as vgg11
from lazyjax.models.maps import center as center
from lazyjax.models.maps import rescale as rescale
from lazyjax.models.maps import symmetrize as symmetrize

# Losses on outputs.
from lazyjax.losses.losses import logistic_loss as logistic_loss
from lazyjax.losses.losses import softmax_cross_entropy as softmax_cross_entropy
from lazyjax.losses.losses import square_loss as square_loss

# Finite differences without cancellation, and the tangent model.
from lazyjax.difference.finite_jvp import finite_jvp as finite_jvp
from lazyjax.models.tangent import Tangent as Tangent
from lazyjax.models.tangent import linearize as linearize
from lazyjax.models.tangent import singular_values as singular_values

# The tangent kernel.
from lazyjax.kernels.gram import gram as gram
from lazyjax.kernels.gram import gram_diagonal as gram_diagonal
from lazyjax.kernels.gram import gram_plan as gram_plan
from lazyjax.kernels.gram import kernel_matvec as kernel_matvec
from lazyjax.kernels.gram import spectrum as spectrum

# What follows from it: conditioning, and predictions at any training time.
from lazyjax.kernels.spectrum import condition_number as condition_number
from lazyjax.kernels.spectrum import effective_rank as effective_rank
from lazyjax.kernels.spectrum import normalized_spectrum as normalized_spectrum
from lazyjax.flow.kernel_regression import KernelRegression as KernelRegression
from lazyjax.flow.kernel_regression import kernel_regression as kernel_regression

# Limits of wide nets.
from lazyjax.kernels.infinite_width import DeepKernel as DeepKernel
from lazyjax.kernels.infinite_width import arccos_kernel as arccos_kernel
from lazyjax.kernels.infinite_width import deep_kernel as deep_kernel

# Training: the flow and the descent, and the two flows side by side.
from lazyjax.flow.gradient_flow import Flow as Flow
from lazyjax.flow.gradient_flow import gradient_flow as gradient_flow
from lazyjax.flow.exponential import TangentExponential as TangentExponential
from lazyjax.flow.result import RESULTS as RESULTS
from lazyjax.flow.result import SOLVERS as SOLVERS
from lazyjax.flow.gradient_descent import Descent as Descent
from lazyjax.flow.gradient_descent import gradient_descent as gradient_descent
from lazyjax.training.train import Training as Training
from lazyjax.training.train import train as train
from lazyjax.training.train import trained_outputs as trained_outputs
from lazyjax.training.schedule import inverse_time_decay as inverse_time_decay
from lazyjax.training.augmentation import pad_and_crop as pad_and_crop
from lazyjax.training.augmentation import random_flip as random_flip
from lazyjax.laziness.compare import Comparison as Comparison
from lazyjax.laziness.compare import compare as compare

# How lazy: along a flow, to first order in 1/alpha, in one step, and at the start.
from lazyjax.laziness.compare import activation_stability as activation_stability
from lazyjax.laziness.compare import measure_kernel_drift as measure_kernel_drift
from lazyjax.laziness.track import Laziness as Laziness
from lazyjax.laziness.track import Tracker as Tracker
from lazyjax.laziness.track import track as track
from lazyjax.flow.lazy_correction import Correction as Correction
from lazyjax.flow.lazy_correction import lazy_correction as lazy_correction
from lazyjax.laziness.one_step import lazy_ratio as lazy_ratio
from lazyjax.laziness.one_step import step_criterion as step_criterion
from lazyjax.laziness.kappa import Kappa as Kappa
from lazyjax.laziness.kappa import kappa as kappa
from lazyjax.laziness.two_layer import two_layer_curvature as two_layer_curvature

# Lipschitz constants, which the theorems take.
from lazyjax.laziness.lipschitz import PathLipschitz as PathLipschitz
from lazyjax.laziness.lipschitz import lipschitz_along as lipschitz_along
from lazyjax.laziness.ball_constants import two_layer_lipschitz as two_layer_lipschitz
from lazyjax.laziness.lipschitz import local_lipschitz as local_lipschitz
from lazyjax.laziness.lipschitz import sampled_lipschitz_lower as sampled_lipschitz_lower

# Every theorem: numbers in, numbers out.
from lazyjax.theory import bounds as bounds

# A flow that certifies its own bounds (`lazyjax.verify` tries the whole theory on random ones).
from lazyjax.theory.certify import Certificate as Certificate
from lazyjax.theory.certify import certify as certify

# Many runs, and one answer.
from lazyjax.report.sweep import sweep as sweep
from lazyjax.report.diagnose import LazinessReport as LazinessReport
from lazyjax.report.diagnose import diagnose as diagnose

__version__ = _version("lazyjax")
