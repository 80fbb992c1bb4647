"""What ``torch.compile`` needs; imported only while Dynamo traces: importing ``torch._dynamo`` takes a second."""

import torch._dynamo

from . import dispatch, functional

# Dynamo traces the Functions of a layer wrongly (second derivatives inside a compiled function): it puts the
# call in the graph as it is, and AOTAutograd runs the real ones.
layer = torch._dynamo.allow_in_graph(functional.layer)


@torch._dynamo.assume_constant_result
def select(chosen: str | None, *call) -> str:
    """The backend's name. ``chosen`` is an argument so that Dynamo guards on it."""
    return dispatch._select(dispatch.Call(*call), chosen).backend
