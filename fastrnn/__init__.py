"""Drop-in ``RNN``, ``GRU`` and ``LSTM`` for torch models: the whole time loop and its gradient as fused kernels."""

from . import init
from .convert import convert, load_keras_weights
from .dispatch import BackendInfo, backends, use_backend
from .explain import Explanation, LayerExplanation, explain
from .flow import GradientFlow, gradient_flow
from .modules import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from .per_sample import per_sample_gradients
from .stream import Stream

__version__ = "0.1.0"

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "BackendInfo",
    "Explanation",
    "GRUCell",
    "GradientFlow",
    "LSTMCell",
    "LayerExplanation",
    "RNNCell",
    "Stream",
    "backends",
    "convert",
    "explain",
    "gradient_flow",
    "init",
    "load_keras_weights",
    "per_sample_gradients",
    "use_backend",
]
