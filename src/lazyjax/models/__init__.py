"""The paper's networks, maps from model to model, and the tangent model."""

from lazyjax.models.deep import VGG as VGG
from lazyjax.models.deep import ResNet as ResNet
from lazyjax.models.deep import resnet18 as resnet18
from lazyjax.models.deep import vgg11 as vgg11
from lazyjax.models.maps import Centered as Centered
from lazyjax.models.maps import OnData as OnData
from lazyjax.models.maps import Rescaled as Rescaled
from lazyjax.models.maps import Symmetrized as Symmetrized
from lazyjax.models.maps import center as center
from lazyjax.models.maps import on_data as on_data
from lazyjax.models.maps import rescale as rescale
from lazyjax.models.maps import symmetrize as symmetrize
from lazyjax.models.shallow import MLP as MLP
from lazyjax.models.shallow import DiagonalLinear as DiagonalLinear
from lazyjax.models.shallow import TwoLayer as TwoLayer
from lazyjax.models.shallow import diagonal_linear as diagonal_linear
from lazyjax.models.shallow import mlp as mlp
from lazyjax.models.shallow import two_layer as two_layer
from lazyjax.models.tangent import SingularValues as SingularValues
from lazyjax.models.tangent import Tangent as Tangent
from lazyjax.models.tangent import linearize as linearize
from lazyjax.models.tangent import singular_values as singular_values
