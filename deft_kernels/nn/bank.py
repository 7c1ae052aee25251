"""The bank: every adapted layer of one model prepared together, in one autograd node per forward of the model."""

import torch
from torch import nn


class Bank:
    """Prepares the factors of its `layers` when `root`'s forward begins, so that each layer finds its own ready.

    The factors serve calls within that forward, and a recomputation of it by non-reentrant checkpointing during the
    backward. Whenever else a layer is called, or under reentrant checkpointing (whose segments each walk their own
    graph), it prepares for itself.
    """

    def __init__(self, root: nn.Module):
        self.layers: list = []
        self.inside = False
        self.frozen: list[str] = []  # parameters of the model that required grad before it was adapted
        self._hooks = root.register_forward_pre_hook(self._enter), root.register_forward_hook(self._leave)

    def _enter(self, root, args) -> None:
        from .layers import prepare_layers

        layers = [layer for layer in self.layers if layer.adapts]
        for layer, factors in zip(layers, prepare_layers(layers)):
            layer._factors = factors
            if layer._bank is not self:  # set here, so that a layer copied or pickled by itself takes no bank along
                layer._bank = self
        self.inside = True

    def _leave(self, root, args, output) -> None:
        self.inside = False
        if not torch.is_grad_enabled():  # no backward will come back for them
            for layer in self.layers:
                layer._factors = None

    def remove(self) -> None:
        """Take the hooks off the model; the layers prepare for themselves from then on."""
        for hook in self._hooks:
            hook.remove()
        for layer in self.layers:
            layer._bank = layer._factors = None
