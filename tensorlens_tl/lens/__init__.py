from .tensor_lens import TensorLens as TensorLens
from .tensor_lens import load as load
