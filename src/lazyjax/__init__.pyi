# The public names: the main ones flat, the rest in the namespaces of their packages.

# The namespaces.
from . import data as data
from . import difference as difference
from . import experiments as experiments
from . import flow as flow
from . import kernels as kernels
from . import laziness as laziness
from . import losses as losses
from . import models as models
from . import plot as plot
from . import report as report
from . import theory as theory
from . import training as training

# Finite differences without cancellation.
from .difference import finite_jvp as finite_jvp

# The flow, the descent, and what is known of the tangent flow in closed form.
from .flow import RESULTS as RESULTS
from .flow import Descent as Descent
from .flow import Flow as Flow
from .flow import TangentExponential as TangentExponential
from .flow import gradient_descent as gradient_descent
from .flow import gradient_flow as gradient_flow
from .flow import kernel_regression as kernel_regression
from .flow import lazy_correction as lazy_correction

# The tangent kernel, and its limits for wide networks.
from .kernels import arccos_kernel as arccos_kernel
from .kernels import deep_kernel as deep_kernel
from .kernels import gram as gram
from .kernels import gram_diagonal as gram_diagonal
from .kernels import gram_plan as gram_plan
from .kernels import kernel_matvec as kernel_matvec
from .kernels import spectrum as spectrum

# How lazily a model trains: along both flows, along any training, and at the start.
from .laziness import Comparison as Comparison
from .laziness import Kappa as Kappa
from .laziness import Laziness as Laziness
from .laziness import compare as compare
from .laziness import kappa as kappa
from .laziness import lipschitz as lipschitz
from .laziness import track as track

# Losses on outputs.
from .losses import Loss as Loss
from .losses import logistic_loss as logistic_loss
from .losses import softmax_cross_entropy as softmax_cross_entropy
from .losses import square_loss as square_loss

# Maps between models, and the tangent model.
from .models import Tangent as Tangent
from .models import center as center
from .models import linearize as linearize
from .models import on_data as on_data
from .models import rescale as rescale
from .models import singular_values as singular_values
from .models import symmetrize as symmetrize

# Many runs, and one answer.
from .report import LazinessReport as LazinessReport
from .report import diagnose as diagnose
from .report import sweep as sweep

# Every theorem, numbers in and numbers out; and a flow that certifies its own bounds.
from .theory import Certificate as Certificate
from .theory import bounds as bounds
from .theory import certify as certify

# Minibatch training.
from .training import Training as Training
from .training import train as train

__version__: str
