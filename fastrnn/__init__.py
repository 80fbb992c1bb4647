"""Drop-in ``RNN``, ``GRU`` and ``LSTM`` for torch models: the whole time loop and its gradient as fused kernels."""

from .convert import convert, load_keras_weights
from .dispatch import BackendInfo, backends, use_backend
from .explain import Explanation, LayerExplanation, explain
from .modules import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from .stream import Stream

__version__ = "0.1.0"

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "BackendInfo",
    "Explanation",
    "GRUCell",
    "LSTMCell",
    "LayerExplanation",
    "RNNCell",
    "Stream",
    "backends",
    "convert",
    "explain",
    "load_keras_weights",
    "use_backend",
]
