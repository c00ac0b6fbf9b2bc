"""How lazily does a model train?

A model is any JAX function `h(w) -> outputs` of a pytree of parameters. lazyjax follows its gradient flow
and that of its tangent model at any output scale, from feature learning to the lazy limit, computes its
tangent kernel, and tells how far apart the two can be.

    import lazyjax as lj

Start with `lj.diagnose` for one answer, with `lj.compare` for the two flows, with `lj.gram` for the kernel.
"""

from importlib.metadata import version as _version

# Models, and maps between models.
from lazyjax.model import diagonal_linear as diagonal_linear
from lazyjax.model import init_diagonal_linear as init_diagonal_linear
from lazyjax.model import init_mlp as init_mlp
from lazyjax.model import init_two_layer as init_two_layer
from lazyjax.model import mlp as mlp
from lazyjax.model import two_layer as two_layer
from lazyjax.networks import init_resnet18 as init_resnet18
from lazyjax.networks import init_vgg11 as init_vgg11
from lazyjax.networks import resnet18 as resnet18
from lazyjax.networks import vgg11 as vgg11
from lazyjax.maps import center as center
from lazyjax.maps import rescale as rescale
from lazyjax.maps import symmetrize as symmetrize

# Losses on outputs.
from lazyjax.loss import logistic_loss as logistic_loss
from lazyjax.loss import softmax_cross_entropy as softmax_cross_entropy
from lazyjax.loss import square_loss as square_loss

# Finite differences without cancellation, and the tangent model.
from lazyjax.difference import finite_jvp as finite_jvp
from lazyjax.tangent import Tangent as Tangent
from lazyjax.tangent import linearize as linearize
from lazyjax.tangent import singular_values as singular_values

# The tangent kernel.
from lazyjax.kernel import gram as gram
from lazyjax.kernel import gram_diagonal as gram_diagonal
from lazyjax.kernel import gram_plan as gram_plan
from lazyjax.kernel import kernel_matvec as kernel_matvec
from lazyjax.kernel import spectrum as spectrum

# What follows from it: conditioning, and predictions at any training time.
from lazyjax._spectrum import condition_number as condition_number
from lazyjax._spectrum import effective_rank as effective_rank
from lazyjax._spectrum import normalized_spectrum as normalized_spectrum
from lazyjax.regression import KernelRegression as KernelRegression
from lazyjax.regression import kernel_regression as kernel_regression

# Limits of wide nets.
from lazyjax.arccos import DeepKernel as DeepKernel
from lazyjax.arccos import arccos_kernel as arccos_kernel
from lazyjax.arccos import deep_kernel as deep_kernel

# Training: the flow and the descent, and the two flows side by side.
from lazyjax.flow import Flow as Flow
from lazyjax.flow import gradient_flow as gradient_flow
from lazyjax.exponential import TangentExponential as TangentExponential
from lazyjax.result import RESULTS as RESULTS
from lazyjax.result import SOLVERS as SOLVERS
from lazyjax.descent import Descent as Descent
from lazyjax.descent import gradient_descent as gradient_descent
from lazyjax.training import Training as Training
from lazyjax.training import train as train
from lazyjax.training import trained_outputs as trained_outputs
from lazyjax.schedule import inverse_time_decay as inverse_time_decay
from lazyjax.augment import pad_and_crop as pad_and_crop
from lazyjax.augment import random_flip as random_flip
from lazyjax.criterion import Comparison as Comparison
from lazyjax.criterion import compare as compare

# How lazy: along a flow, to first order in 1/alpha, in one step, and at the start.
from lazyjax.criterion import activation_stability as activation_stability
from lazyjax.criterion import measure_kernel_drift as measure_kernel_drift
from lazyjax.track import Laziness as Laziness
from lazyjax.track import Tracker as Tracker
from lazyjax.track import track as track
from lazyjax.correction import Correction as Correction
from lazyjax.correction import lazy_correction as lazy_correction
from lazyjax.step import lazy_ratio as lazy_ratio
from lazyjax.step import step_criterion as step_criterion
from lazyjax.curvature import Kappa as Kappa
from lazyjax.curvature import kappa as kappa
from lazyjax._neurons import two_layer_curvature as two_layer_curvature

# Lipschitz constants, which the theorems take.
from lazyjax.lipschitz import PathLipschitz as PathLipschitz
from lazyjax.lipschitz import lipschitz_along as lipschitz_along
from lazyjax._ball_constants import two_layer_lipschitz as two_layer_lipschitz
from lazyjax.lipschitz import local_lipschitz as local_lipschitz
from lazyjax.lipschitz import sampled_lipschitz_lower as sampled_lipschitz_lower

# Every theorem: numbers in, numbers out.
from lazyjax import bounds as bounds

# A flow that certifies its own bounds (`lazyjax.verify` tries the whole theory on random ones).
from lazyjax.certificate import Certificate as Certificate
from lazyjax.certificate import certify as certify

# Many runs, and one answer.
from lazyjax.sweep import sweep as sweep
from lazyjax.report import LazinessReport as LazinessReport
from lazyjax.report import diagnose as diagnose

__version__ = _version("lazyjax")
