"""The tangent kernel Dh Dh^T by layers, its spectrum, and the kernels of infinitely wide networks."""

from lazyjax.kernels.gram import gram as gram
from lazyjax.kernels.gram import gram_diagonal as gram_diagonal
from lazyjax.kernels.gram import gram_plan as gram_plan
from lazyjax.kernels.infinite_width import DeepKernel as DeepKernel
from lazyjax.kernels.infinite_width import arccos_kernel as arccos_kernel
from lazyjax.kernels.infinite_width import deep_kernel as deep_kernel
from lazyjax.kernels.plan import GramPlan as GramPlan
from lazyjax.kernels.spectrum import condition_number as condition_number
from lazyjax.kernels.spectrum import effective_rank as effective_rank
from lazyjax.kernels.spectrum import kernel_matvec as kernel_matvec
from lazyjax.kernels.spectrum import normalized_spectrum as normalized_spectrum
from lazyjax.kernels.spectrum import spectrum as spectrum
