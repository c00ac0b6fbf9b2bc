"""The gradient flow of F_alpha, its solvers, gradient descent, and the flow of the tangent model in closed form."""

from lazyjax.flow.closed_form import TangentSolution as TangentSolution
from lazyjax.flow.exponential import TangentExponential as TangentExponential
from lazyjax.flow.gradient_descent import Descent as Descent
from lazyjax.flow.gradient_descent import gradient_descent as gradient_descent
from lazyjax.flow.gradient_flow import Flow as Flow
from lazyjax.flow.gradient_flow import gradient_flow as gradient_flow
from lazyjax.flow.kernel_regression import KernelRegression as KernelRegression
from lazyjax.flow.kernel_regression import kernel_regression as kernel_regression
from lazyjax.flow.lazy_correction import Correction as Correction
from lazyjax.flow.lazy_correction import lazy_correction as lazy_correction
from lazyjax.flow.result import RESULTS as RESULTS
from lazyjax.flow.result import SOLVERS as SOLVERS
from lazyjax.flow.result import Result as Result
from lazyjax.flow.through_kinks import ThroughKinks as ThroughKinks
