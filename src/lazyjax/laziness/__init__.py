"""How lazily a model trains: gaps between the two flows, displacement, kappa, and Lipschitz constants."""

from lazyjax.laziness import lipschitz as lipschitz
from lazyjax.laziness.compare import Comparison as Comparison
from lazyjax.laziness.compare import activation_stability as activation_stability
from lazyjax.laziness.compare import compare as compare
from lazyjax.laziness.compare import measure_kernel_drift as measure_kernel_drift
from lazyjax.laziness.kappa import Kappa as Kappa
from lazyjax.laziness.kappa import kappa as kappa
from lazyjax.laziness.one_step import StepCriterion as StepCriterion
from lazyjax.laziness.one_step import lazy_ratio as lazy_ratio
from lazyjax.laziness.one_step import step_criterion as step_criterion
from lazyjax.laziness.track import Laziness as Laziness
from lazyjax.laziness.track import Tracker as Tracker
from lazyjax.laziness.track import track as track
from lazyjax.laziness.two_layer import NeuronCurvature as NeuronCurvature
from lazyjax.laziness.two_layer import two_layer_curvature as two_layer_curvature
