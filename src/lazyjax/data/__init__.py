"""Data sets: teachers and students, digits, images on disk, and the exact population risk."""

from lazyjax.data.datasets import DataSet as DataSet
from lazyjax.data.datasets import digits as digits
from lazyjax.data.datasets import draw_teacher as draw_teacher
from lazyjax.data.datasets import load_arrays as load_arrays
from lazyjax.data.datasets import sphere as sphere
from lazyjax.data.images import load_images as load_images
from lazyjax.data.images import noise_images as noise_images
from lazyjax.data.population_risk import population_inner as population_inner
from lazyjax.data.population_risk import population_risk as population_risk
from lazyjax.data.population_risk import tangent_population_risk as tangent_population_risk
