"""The bank: every adapted layer of one model prepared together, in one autograd node per forward of the model."""

import weakref

import torch
from torch import nn

SAMPLES = ("sample", "hidden_states", "input_ids")  # what diffusers and transformers call the input that has the batch


class _Pending:
    """Lives as long as a forward's graph waits for its backward: prepare's node holds it, and drops it when it has run."""


class Bank:
    """Prepares the factors of its `layers` when `root`'s forward begins, so that each layer finds its own ready. (Without
    a root, whoever owns the bank calls `enter` and `leave` around a forward.)

    The factors serve calls within that forward, and its recomputation by non-reentrant checkpointing during the backward.
    Whenever else a layer is called, or under reentrant checkpointing (whose segments each walk their own graph), it
    prepares for itself.

    A layer's form is chosen from the rows it saw last, but never changed while a backward is outstanding: what
    checkpointing recomputes must keep what the forward kept. As with any checkpointed module, the adapters and strengths
    that were active in the forward must still be so when it is recomputed.
    """

    def __init__(self, root: nn.Module | None = None):
        self.layers: list = []
        self.inside = False
        self.passing = False  # whether the forward under way is one without grad
        self.blocks: dict[str, nn.Module] = {}  # attention blocks with adapted projections
        self.batch: int | None = None  # samples in the forward that is under way, where layers are routed by sample
        self.frozen: list[nn.Parameter] = []  # the model's parameters that required grad before it was adapted
        self._pending: weakref.WeakSet[_Pending] = weakref.WeakSet()
        self._hooks = ()
        if root is not None:
            self._hooks = (
                root.register_forward_pre_hook(self.enter, with_kwargs=True),
                root.register_forward_hook(self.leave, always_call=True),
            )

    def enter(self, root=None, args=(), kwargs=None) -> None:
        """A forward with these inputs begins: prepare."""
        from .layers import prepare_layers, refuse_fused

        eager = not torch.compiler.is_compiling()
        inputs = [t for t in (*args, *(kwargs or {}).values()) if isinstance(t, torch.Tensor)]
        devices = {t.device for t in inputs}
        # A layer elsewhere than the input, offloaded or of another device, prepares for itself when its turn comes.
        adapting = [layer for layer in self.layers if layer.adapts]
        layers = [layer for layer in adapting if not devices or layer.weight.device in devices]
        if any(layer.routes is not None for layer in adapting):
            told = [t for t in map((kwargs or {}).get, SAMPLES) if isinstance(t, torch.Tensor)]
            self.batch = next((t.shape[0] for t in (*told, *inputs) if t.dim()), None)
        if adapting:
            for name, block in self.blocks.items():
                refuse_fused(name, block)
        if eager and not self._pending:
            for layer in layers:
                layer.choose_form()
        pending = _Pending() if eager else None
        for layer, factors in zip(layers, prepare_layers(layers, pending=pending)):
            layer._keep(self, factors)
        if eager:
            self._pending.add(pending)  # gone when this returns, unless a backward is to come
        self.inside, self.passing = True, not torch.is_grad_enabled()

    def leave(self, *call) -> None:
        """The forward is over."""
        self.inside = False
        for layer in self.layers if self.passing else ():
            layer._note(_passing=None)

    def remove(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()

    def __getstate__(self):
        return {**self.__dict__, "inside": False, "_pending": None}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._pending = weakref.WeakSet()
