"""Any ``torch.nn.Module`` → a :class:`~conelens.graph.Graph` of known operators.

The model runs once under a ``TorchFunctionMode`` that sees every call on a tensor, spelled as a module, a
function, a method or an operator, in place or not; module hooks give the names. Nothing is guessed: an
unknown call is refused by name, and the finished graph has to reproduce the model on a second input (see
``network.py``).
"""

from conelens.tracing.recorder import record, tensors_in

__all__ = ["record", "tensors_in"]
