"""The map is in `areal_like`, because the embedded engine uses it too."""

from areal_like.weights.hf_layout import HfTensor as HfTensor
from areal_like.weights.hf_layout import hf_tensors as hf_tensors
