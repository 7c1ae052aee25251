"""Drop-in modules: a frozen layer with named adapters on it. DEFT, PaRa and LoRA are the same layer, since all are (B, A).

The path of one tensor: `forward` takes the factors (the bank's, or its own by `prepare_layers`), `_adapted` applies them
through `LowRankLinear` (factor form), `ActivationLinear` (activation form) or `LowRankConv2d`.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import DeftConfig, LoraConfig
from ..ops.lowrank_linear import LowRankLinear, activation_is_cheaper, weight_is_cheaper
from .functional import ActivationLinear, LowRankConv2d
from .prepare import Factors, Spec, beside, combined, decompose, prepare, stacked
from .quantised import hold, is_hooked, quantised

INIT_STD = 0.02  # of P and of a random R: the reference code's, and PEFT's
PROBED = 16  # rows through a layer whose weight is not dense, to see whether it acts as that weight
NOT_ITS_WEIGHT = 0.1  # relative distance at which it does not: 8-bit activations are 0.01 apart


class Routes(NamedTuple):
    """Which adapter, at which strength, each sample of a batch goes through on one layer."""

    layer: str  # its name in the model, for errors
    samples: list[tuple[str | None, float]]  # None: the base layer alone


class MasterDict(nn.ParameterDict):
    """Parameters that stay at least float32 through `.to(dtype)`, `.half()` and `.bfloat16()` of their model."""

    def forward(self, name: str) -> Tensor:
        """A parameter, by a call: where the model is offloaded, its hooks bring the values for as long as a call lasts."""
        return self[name].view_as(self[name])  # not the parameter itself, which the hooks empty again

    __call__ = nn.Module.__call__  # which ParameterDict refuses

    def _apply(self, fn, recurse=True):
        for name, param in list(self.items()):
            moved = fn(param.data)
            if moved.dtype in (torch.float16, torch.bfloat16):
                moved = param.data.to(moved.device)
            if param.is_meta != moved.is_meta:  # between meta and real memory a parameter cannot stay itself
                self[name] = nn.Parameter(moved, param.requires_grad)
                continue
            param.data = moved
            if param.grad is not None:
                param.grad = param.grad.to(moved)
        return self


class DeftLayer(nn.Module):
    """A frozen layer with named adapters. Base class of `DeftLinear` and `DeftConv2d`.

    Parameters carry PEFT's names: `deft_P.<adapter>` (m, r), `deft_R.<adapter>` (r, n; absent for PaRa) and
    `deft_gate.<adapter>` (scalar), float32. A LoRA adapter's B is its P and its A its R.
    """

    def __init__(self, base_layer: nn.Module, config: DeftConfig | None = None, adapter_name: str = "default"):
        super().__init__()
        self.base_layer = base_layer
        self.shape = self._shape()  # (m, n) of W
        self.deft_P, self.deft_R, self.deft_gate = MasterDict(), MasterDict(), MasterDict()
        self.configs: dict[str, DeftConfig] = {}
        self.active: list[str] = []  # adapters in the order in which factors are concatenated
        self.strengths: dict[str, float] = {}  # of the active ones; forward reads them from `_scales` only
        self.combination = "sum"  # how the active ones act together, see `prepare.combined`
        self.routes: Routes | None = None  # instead of all active ones on every sample
        self.is_merged = False  # the model is: forwards go to the base layer, whatever is active here
        self.merged: dict[str, float] = {}  # adapters that this base weight holds now; empty where it has none of them
        # the base weight as it was before the merge; of a quantised one, all its tensors
        self._pristine: Tensor | list[Tensor] | None = None
        self.sketch = None  # of the base weight, where that will be out of reach; see `sketch_bases` in adapters/files.py
        self.start_deviation = 0.0  # how far the base layer is from acting as the weight that the start was taken from
        self._merged_version: int | None = None
        self.tokens: int | None = None  # rows of the last input: what the bank chooses the form from
        self._by_activation = self._by_weight = False  # the form that the bank prepares for
        self._bank = None
        self._factors: list[Factors] | None = None  # the bank's, of the last forward with grad
        self._passing: list[Factors] | None = None  # the bank's, of a forward without grad that is under way
        self._inner_no_grad = False  # ran without grad inside a forward with grad: reentrant checkpointing
        self._resting: dict[str, set[str]] = {}  # inactive adapter -> those of its tensors that train when it is active
        # No buffers: offloading would put an old strength back.
        self._scales = torch.empty(2, 0)
        self._unit = True  # whether all of `_scales` is 1
        self._route_index: Tensor | None = None  # (samples,), index among the active ones
        self._route_weight: Tensor | None = None  # (samples,)
        if config is not None:
            self.add_adapter(adapter_name, config)
            self.set_adapters({adapter_name: 1.0})
            base_layer.requires_grad_(False)

    # The base layer --------------------------------------------------------------------------------------------------

    @property
    def base_layer(self) -> nn.Module:
        """The frozen layer."""
        return self._modules["base_layer"]  # past nn.Module's `__getattr__`, as in many small layers it shows

    @property
    def weight(self) -> Tensor:
        """The base layer's weight as it is stored (merged, where an adapter is merged)."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return self.base_layer.bias

    @property
    def device(self) -> torch.device:
        """Where adapters are kept: beside the weight; of an offloaded one, where accelerate brings it."""
        weight, hook = self.base_layer.weight, getattr(self.base_layer, "_hf_hook", None)
        home = getattr(hook, "execution_device", None) if weight.is_meta else None
        return weight.device if home is None else torch.device(home)

    def matrix(self, stored: Tensor) -> Tensor:
        """A tensor laid out as the base weight is stored, as W (m, n), out x in; a view wherever strides allow."""
        raise NotImplementedError

    def _shape(self) -> tuple[int, int]:
        raise NotImplementedError

    @property
    def master_dtype(self) -> torch.dtype:
        """Of P, R and all that is made of them before the factors are cast: float32, or float64 for a float64 weight."""
        return torch.float64 if self.base_layer.weight.dtype == torch.float64 else torch.float32

    def dense_weight(self) -> Tensor | None:
        """W (m, n) where the base layer is a plain, local one; None where only its output can be relied on (quantised,
        sharded, hooked)."""
        base = self.base_layer
        weight = base._parameters.get("weight")
        plain = (
            type(weight) is nn.Parameter
            and weight.is_floating_point()
            and not weight.is_meta
            and self.forward_is_plain(base)
            and not is_hooked(base)
        )
        return self.matrix(weight.detach()) if plain else None

    @staticmethod
    def forward_is_plain(base: nn.Module) -> bool:
        """Whether the class computes just its weight's product."""
        raise NotImplementedError

    def frozen_weight(self) -> Tensor | None:
        """`dense_weight` for the factor form, which gives the weight no gradient: None while the base layer trains."""
        weight = self.base_layer._parameters.get("weight")
        return None if weight is None or weight.requires_grad else self.dense_weight()

    def pristine_weight(self) -> Tensor | None:
        """W (m, n) without any merged adapter; None where `dense_weight` is."""
        return self.matrix(self._pristine) if isinstance(self._pristine, Tensor) else self.dense_weight()

    def read_weight(self) -> Tensor | None:
        """`pristine_weight`, or the W (m, n) that a quantised base layer stands for, float32, dequantised at each call; None
        where neither can be had. ValueError for a quantised weight that lacks a part."""
        W = self.pristine_weight()
        if W is None and not is_hooked(self.base_layer):
            held = quantised(self.base_layer)
            W = None if held is None else held.dequantise(self._pristine)
        return W

    # Adapters --------------------------------------------------------------------------------------------------------

    @torch.inference_mode(False)  # whatever the caller is in, parameters and scales must be able to train later
    def add_adapter(
        self, name: str, config: DeftConfig, tensors: dict[str, Tensor] | None = None, trainable: bool = True
    ) -> None:
        """Add an adapter, inactive: at its start (`config.init_weights`), or with the given P, R and gate. `trainable`
        says whether its parameters require grad once it is active."""
        if name in self.configs:
            raise ValueError(f"adapter {name!r} exists already on this layer")
        hold(self.base_layer)
        m, n = self.shape
        r = config.r if isinstance(config, LoraConfig) else min(config.r, m)  # a projector's rank is at most m
        device = self.device
        if tensors is None:
            tensors = self._start(r, config, device)
        for key, store in (("P", self.deft_P), ("R", self.deft_R), ("gate", self.deft_gate)):
            if key in tensors:
                value = tensors[key].detach().to(device, self.master_dtype, copy=True)
                store[name] = nn.Parameter(value, requires_grad=False)
        self.configs[name] = config
        self._resting[name] = set(self.adapter_tensors(name)) if trainable else set()

    @torch.no_grad()
    def _start(self, r: int, config: DeftConfig, device) -> dict[str, Tensor]:
        """The first values of an adapter's parameters."""
        m, n = self.shape
        empty = {"device": device, "dtype": self.master_dtype}
        if isinstance(config, LoraConfig):  # B = 0, A as a linear layer's weight: PEFT's start; False: B random too
            B = torch.zeros(m, r, **empty) if config.init_weights else torch.randn(m, r, **empty) * INIT_STD
            return {"P": B, "R": nn.init.kaiming_uniform_(torch.empty(r, n, **empty), a=5**0.5)}
        tensors = {"P": torch.randn(m, r, **empty) * INIT_STD}
        scale = config.scale(r)
        if config.gate:
            tensors["gate"] = torch.full((), 0.5, **empty)  # the reference code's start
            scale = scale * torch.sigmoid(tensors["gate"])
        if config.para:
            return tensors
        if config.init_weights:  # the identity: A = s R - K^T W = 0
            _, (K,), _ = decompose([tensors["P"]], [config.decomposition_method])
            tensors["R"] = self._removed(K) / scale
        else:
            tensors["R"] = torch.randn(r, n, **empty) * (INIT_STD * config.init_scale)
        return tensors

    def _removed(self, K: Tensor) -> Tensor:
        """K^T W (r, n)."""
        W = self.read_weight()
        if W is None:
            return self._removed_by_output(K)
        one = torch.ones(1, device=K.device)
        return -torch.ops.deft_kernels.project([K], [W], [None], one, one)[0]

    def _removed_by_output(self, K: Tensor) -> Tensor:
        """K^T W where W cannot be read."""
        raise ValueError("the identity start needs the base weight, which this layer does not hold as a dense one")

    def adapter_tensors(self, name: str) -> dict[str, nn.Parameter]:
        """An adapter's parameters here: "P", "R" and "gate", those that it has; empty for an adapter not on this layer."""
        stores = {"P": self.deft_P, "R": self.deft_R, "gate": self.deft_gate}
        return {role: store[name] for role, store in stores.items() if name in store}

    def masters(self, name: str) -> dict[str, Tensor]:
        """`adapter_tensors` in `master_dtype`, whatever dtype a state dict may have assigned to them, and wherever
        offloading keeps them."""
        found, dtype, modules = {}, self.master_dtype, self._modules  # past __getattr__, as in many small layers it shows
        for role, store in (("P", modules["deft_P"]), ("R", modules["deft_R"]), ("gate", modules["deft_gate"])):
            p = store._parameters.get(name)
            if p is not None:
                p = store(name) if hooked(store) and isinstance(store, MasterDict) else p
                found[role] = p if p.dtype == dtype else p.to(dtype)
        return found

    def delete_adapter(self, name: str) -> None:
        """Forget an adapter."""
        for store in (self.deft_P, self.deft_R, self.deft_gate):
            if name in store:
                del store[name]
        self.configs.pop(name)
        self._resting.pop(name, None)
        self.set_adapters({k: w for k, w in self.strengths.items() if k != name}, self.combination, self.routes)

    def set_adapters(self, weights: dict[str, float], combination: str = "sum", routes: Routes | None = None) -> None:
        """Make exactly these adapters active, each at its strength (any real number), together or routed by sample. The
        parameters of the others rest: they require no grad until their adapter is active again."""
        before = self.active
        self.combination = combination
        if routes is not None:
            here = [(name if name in weights and name in self.configs else None, w) for name, w in routes.samples]
            routes = routes._replace(samples=here)
        self.routes = routes
        self.strengths = {name: float(w) for name, w in weights.items() if name in self.configs}
        self.active = list(self.strengths)
        for name in before:
            if name in self.configs and name not in self.strengths:
                tensors = self.adapter_tensors(name)
                self._resting[name] = {role for role, p in tensors.items() if p.requires_grad}
                for p in tensors.values():
                    p.requires_grad_(False)
        for name in self.active:
            for role in self._resting.pop(name, ()):
                self.adapter_tensors(name)[role].requires_grad_(True)
        self._factors = self._passing = None
        self._by_activation = self._by_weight = False  # while a backward is outstanding, the bank will not choose anew
        self._write_scales()

    @torch.inference_mode(False)
    def _write_scales(self) -> None:
        """Strength times alpha/r of the injection, and the strength of the removal, of every active adapter. Tensors,
        written in place where they can be, so that a compiled graph or a CUDA graph follows a new strength."""
        strengths = self.strengths.items()
        rows = [[w * self.configs[k].scale(self.rank(k)) for k, w in strengths], [w for _, w in strengths]]
        self._unit = all(scale == 1 for row in rows for scale in row)
        self._overwrite("_scales", torch.tensor(rows, dtype=self.master_dtype).reshape(2, -1))
        self._write_routes()

    def _write_routes(self) -> None:
        index = weight = None
        if self.routes is not None:
            slots = {name: i for i, name in enumerate(self.active)} | {None: len(self.active)}
            index = torch.tensor([slots[name] for name, _ in self.routes.samples])
            weight = torch.tensor([w for _, w in self.routes.samples], dtype=self.master_dtype)
        self._overwrite("_route_index", index)
        self._overwrite("_route_weight", weight)

    def _overwrite(self, name: str, values: Tensor | None) -> None:
        values = None if values is None else values.to(self.device)
        old = getattr(self, name)
        kinds = [None if t is None else (t.shape, t.dtype, t.device) for t in (old, values)]
        if values is not None and kinds[0] == kinds[1]:
            old.copy_(values)
        else:
            setattr(self, name, values)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._write_scales()  # float32 whatever the model was cast to
        return self

    def rank(self, name: str) -> int:
        """Rank of an adapter here: `config.r`, which DEFT and PaRa cap at m."""
        return self.deft_P[name].shape[1]

    @property
    def adapts(self) -> bool:
        """Whether a forward has factors to apply: some adapter is active and the model is not merged."""
        return not self.is_merged and bool(self.active)

    @property
    def combines(self) -> bool:
        """Whether several adapters act here other than by their sum."""
        return self.combination != "sum" and len(self.active) > 1

    def trains(self) -> bool:
        """Whether a forward now would train an active adapter."""
        return torch.is_grad_enabled() and any(
            p.requires_grad for name in self.active for p in self.adapter_tensors(name).values()
        )

    # Forward ---------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        if not self.adapts:
            if self.is_merged and self.training and self.trains():
                raise RuntimeError(
                    f"adapter {', '.join(self.active)} cannot be trained while adapters are merged into the weights: call "
                    "deft_kernels.unmerge(model) first"
                )
            return self.base_layer(x, *args, **kwargs)
        factors = self._shared_factors()
        if factors is not None and factors[0].W is not None and factors[0].W.device == x.device:
            return self._whole(x, factors[0].W)
        rows = self._rows(x)
        if not torch.compiler.is_compiling():
            self._note(tokens=rows)
        usable = factors is not None and factors[0].W is None and factors[0].B.device == x.device
        if not usable or (any(f.A is not None for f in factors) and self.frozen_weight() is None):
            (factors,) = prepare_layers([self], rows)
            if factors[0].B.device != x.device:
                raise RuntimeError(
                    f"the adapter is on {factors[0].B.device}, its layer's input on {x.device}: move the model there; where "
                    "it is offloaded, put the adapter in before offloading is enabled"
                )
        if self.routes is not None:
            return self._routed(x, factors, args, kwargs)
        return self._adapted(x, factors, args, kwargs)

    def choose_form(self) -> None:
        """The form that the bank prepares for, from here on."""
        by_weight = self.prefers_weight()
        self._note(_by_weight=by_weight, _by_activation=not by_weight and self.prefers_activation(self.tokens))

    def prefers_activation(self, rows: int | None) -> bool:
        """Whether the activation form is the cheaper one for so many rows; False where they are not known yet."""
        if rows is None or not isinstance(self, DeftLinear):
            return False
        removing = sum(self.rank(name) for name in self.active if not isinstance(self.configs[name], LoraConfig))
        return activation_is_cheaper(rows, *self.shape, removing)

    def prefers_weight(self) -> bool:
        """Whether W' itself is to be prepared: on the CPU only, as it was not measured elsewhere; never in half precision,
        where rounding it would lose small updates."""
        if len(self.active) != 1 or self.routes is not None or not isinstance(self, DeftLinear):
            return False
        weight = self.base_layer.weight
        return weight.is_cpu and weight.dtype in (torch.float32, torch.float64) and weight_is_cheaper(*self.shape)

    def _keep(self, bank, factors: list[Factors]) -> None:
        """Take the bank's factors. Those made without grad do not replace those that a backward may still recompute with.
        The bank is set here, so that a layer copied or pickled by itself takes none along."""
        if torch.is_grad_enabled():
            self._note(_bank=bank, _factors=factors, _passing=None)
        else:
            self._note(_bank=bank, _passing=factors)

    def _note(self, **state) -> None:
        """Set what belongs to one forward: past nn.Module's slow `__setattr__`, but for dynamo, which cannot follow that."""
        if torch.compiler.is_compiling():
            for name, value in state.items():
                setattr(self, name, value)
        else:
            self.__dict__.update(state)

    def _shared_factors(self) -> list[Factors] | None:
        """The bank's factors where they are valid now; see `Bank`."""
        if self._bank is None:
            return None
        if self._bank.inside:
            if self._passing is not None:
                return self._passing
            if not torch.compiler.is_compiling():
                self._note(_inner_no_grad=not torch.is_grad_enabled())
            return self._factors
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1 or self._inner_no_grad:
            return None
        return self._factors

    def _rows(self, x: Tensor) -> int:
        """T: how many rows the low-rank products have."""
        raise NotImplementedError

    def _adapted(self, x: Tensor, factors: list[Factors], args, kwargs) -> Tensor:
        raise NotImplementedError

    def _routed(self, x: Tensor, factors: list[Factors], args, kwargs) -> Tensor:
        """Every sample of x through its own adapter: one pass of low-rank products for the whole batch."""
        raise NotImplementedError

    def _route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Index of the adapter (the last: none), and strength, of each sample of x (N, ...): the routes, tiled, since
        guidance asks a model for several predictions of each sample at once."""
        given, (name, samples) = x.shape[0], self.routes
        batch = self._bank.batch if self._bank is not None and self._bank.inside else None
        if given % len(samples) or (batch is not None and given != batch):
            raise ValueError(
                f"{name}: input of shape {tuple(x.shape)} cannot be routed by sample: adapters are routed for a batch of "
                f"{len(samples)}" + ("" if batch is None else f", and the model was called with a batch of {batch}")
            )
        times = given // len(samples)
        return self._route_index.repeat(times), self._route_weight.repeat(times)

    def _per_sample(self, factors: list[Factors], index: Tensor, dtype: torch.dtype) -> list[Tensor | None]:
        """B, A, K and R of each sample's adapter, (N, ...); None where no adapter has one."""
        parts = [stacked(factors, role, self.shape[1]) for role in "BAKR"]
        return [None if t is None else t.to(dtype)[index] for t in parts]

    def _dropped(self, x: Tensor, index: Tensor) -> Tensor:
        """x (N, ...) under the dropout of each sample's adapter."""
        rates = [self.dropout(name) for name in self.active]
        if not any(rates):
            return x
        keep = 1 - torch.tensor([*rates, 0.0], device=x.device)[index].view(-1, *[1] * (x.dim() - 1))
        return x * (torch.bernoulli(keep.expand(x.shape)) / keep).to(x.dtype)

    def _base_output(self, x: Tensor, args=(), kwargs=None) -> tuple[Tensor, Tensor | None]:
        """The base layer's output for x (N, ...), and its bias (m,), which a hooked layer shows by its answer to a sample of
        zeros (with the others, since each call may load the weight)."""
        whole = self.bias is None or not hooked(self.base_layer)
        y = self.base_layer(x if whole else torch.cat([x, x.new_zeros(1, *x.shape[1:])]), *args, **(kwargs or {}))
        if whole:
            return y, self.bias
        return y[:-1], y[-1].reshape(self.shape[0], -1)[:, 0]

    def _check_dtype(self, x: Tensor) -> None:
        """What the base layer itself would refuse: an input that is not of its weight's dtype, outside autocast."""
        if x.dtype != self.weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(f"input is {x.dtype}, but the layer's weight is {self.weight.dtype}")

    def dropout(self, name: str) -> float:
        """Dropout probability on an adapter's injection now."""
        return self.configs[name].dropout if self.training else 0.0

    # Pickling, copying: what belongs to one forward stays behind ------------------------------------------------------

    def __getstate__(self):
        return {**self.__dict__, "_factors": None, "_passing": None, "_bank": None}

    def __setstate__(self, state):
        super().__setstate__(state)
        self._merged_version = writes(self.base_layer.weight) if self.merged else None

    def extra_repr(self) -> str:
        return ", ".join(f"{k}: r={self.rank(k)}" + (f" x {self.strengths[k]:g}" if k in self.active else " (inactive)")
                         for k in self.configs)  # fmt: skip


def hooked(module: nn.Module) -> bool:
    """Whether accelerate or diffusers has put a hook around the module's forward, which brings its tensors and takes them
    away again: between calls they may be elsewhere, or nowhere."""
    return "forward" in vars(module)


def fused(module: nn.Module) -> bool:
    """Whether this is an attention block of diffusers for which `fuse_qkv_projections` is on: it then calls a copy of its
    projections' weights instead of its projections."""
    on = getattr(module, "fused_projections", False)  # stays on in blocks that are unfused by their processor alone
    return on and (hasattr(module, "unfuse_projections") or "Fused" in type(module.processor).__name__)


def refuse_fused(name: str, module: nn.Module) -> None:
    """RuntimeError where adapters on an attention block's projections would not act."""
    if fused(module):
        raise RuntimeError(
            f"{name}: its projections are fused, and adapters on them would not act: call the model's "
            "unfuse_qkv_projections() first; once adapters are merged, they can be fused again"
        )


def writes(tensor: Tensor) -> int | None:
    """The count of in-place writes to a tensor; None for one made under inference_mode, which keeps no count."""
    return None if tensor.is_inference() else tensor._version


def prepare_layers(layers: list[DeftLayer], rows: int | None = None, pending=None) -> list[list[Factors]]:
    """The factors of all active adapters of these layers, in one autograd node; `rows` is T where it is known. The node
    holds `pending` until its backward has run."""
    specs, P, R, W, scales, gates, counts = [], [], [], [], [], [], []
    # In eager mode on the CPU alone: elsewhere a recorded graph shall follow a new strength.
    unit = not torch.compiler.is_compiling()
    for layer in layers:
        weight = layer.frozen_weight()
        by_weight = rows is None and layer._by_weight
        if not by_weight and (layer._by_activation if rows is None else layer.prefers_activation(rows)):
            weight = None
        fold = not (layer.training and any(layer.dropout(name) for name in layer.active))
        stored = layer.base_layer.weight
        for name in layer.active:
            tensors = layer.masters(name)
            dtype = layer.master_dtype if layer.combines else compute_dtype(stored, tensors["P"].device.type)
            whole = by_weight and weight is not None and fold and dtype == weight.dtype
            specs.append(Spec(layer.configs[name].method, weight is not None, fold, dtype, whole))
            P.append(tensors["P"])
            R.append(tensors.get("R"))
            W.append(weight if weight is None else weight.detach())  # dynamo refuses one tensor twice
            gates.append(tensors.get("gate"))
        device = tensors["P"].device
        scales.append(layer._scales if layer._scales.device == device else layer._scales.to(device))
        counts.append(len(layer.active))
        unit = unit and layer._unit
    if not specs:
        return []
    injection, removal = torch.cat(scales, 1) if len(scales) > 1 else scales[0]
    unit = unit and injection.is_cpu
    if any(gate is not None for gate in gates):
        unit = False
        one = torch.ones((), device=injection.device, dtype=injection.dtype)
        injection = injection * torch.stack([one if g is None else torch.sigmoid(g) for g in gates])
    flat = iter(prepare(specs, injection, removal, P, R, W, pending, unit))
    prepared = [[next(flat) for _ in range(count)] for count in counts]
    return [_together(layer, factors) if layer.combines else factors for layer, factors in zip(layers, prepared)]


def _together(layer: DeftLayer, factors: list[Factors]) -> list[Factors]:
    """Factors in the compute dtype from those in the masters', as the layer's combination has them."""
    K = []
    for f, name, strength in zip(factors, layer.active, layer._scales[1]):
        method = layer.configs[name].method
        K.append(None if method == "lora" else (torch.relu(f.B) if method == "relu" else f.B) * strength)
    dtype = compute_dtype(layer.base_layer.weight, factors[0].B.device.type)
    return [Factors(*(t if t is None else t.to(dtype) for t in f)) for f in combined(factors, K, layer.combination)]


def compute_dtype(weight: Tensor, device: str) -> torch.dtype:
    """Autocast's dtype where it is on for this kind of device, else the weight's own (float32 for integer storage, and for
    bitsandbytes' 4 bits, which may be stored as any type)."""
    if torch.is_autocast_enabled(device) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    if hasattr(weight, "quant_state"):
        return torch.float32
    return weight.dtype if weight.dtype in (torch.float16, torch.bfloat16, torch.float64) else torch.float32


def autocast(x: Tensor) -> Tensor:
    """x in autocast's dtype where that is on; as in torch, float64 stays."""
    if x.dtype in (torch.float32, torch.float16, torch.bfloat16) and torch.is_autocast_enabled(x.device.type):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


class DeftLinear(DeftLayer):
    """A frozen `nn.Linear` (or a quantised subclass of it, or transformers' `Conv1D`) with adapters.

    y = x W'^T + b with W' = W - B K^T W + s B R (arXiv 2509.22793); x (..., n) -> y (..., m).

    Args:
        base_layer: the layer to adapt; it is kept as it is, and frozen.
        config: the adapter's; None for a layer without one yet.
        adapter_name: its name.

    Raises:
        TypeError: a base layer that is no linear one.
        ValueError: rank below 1, unknown decomposition, a name in use.
    """

    def __init__(self, base_layer: nn.Module, config: DeftConfig | None = None, adapter_name: str = "default"):
        if not isinstance(base_layer, nn.Linear) and not is_conv1d(base_layer):
            raise TypeError(f"DeftLinear adapts nn.Linear and transformers' Conv1D, not {type(base_layer).__name__}")
        super().__init__(base_layer, config, adapter_name)

    @property
    def in_features(self) -> int:
        return self.shape[1]

    @property
    def out_features(self) -> int:
        return self.shape[0]

    def _shape(self) -> tuple[int, int]:
        if is_conv1d(self.base_layer):  # stored (in, out)
            return self.base_layer.weight.shape[1], self.base_layer.weight.shape[0]
        return self.base_layer.out_features, self.base_layer.in_features

    def matrix(self, stored: Tensor) -> Tensor:
        return stored.t() if is_conv1d(self.base_layer) else stored

    @staticmethod
    def forward_is_plain(base: nn.Module) -> bool:
        return is_conv1d(base) or type(base).forward is nn.Linear.forward

    def _removed(self, K: Tensor) -> Tensor:
        removed = super()._removed(K)
        if self.pristine_weight() is not None:
            return removed
        with torch.no_grad():
            own = torch.Generator().manual_seed(0)  # the caller's seed draws the same P on any base
            x = torch.randn(PROBED, self.shape[1], generator=own).to(K.device, self._input_dtype(K.device))
            y, bias = self._base_output(x)
            through = (y.float() if bias is None else y.float() - bias.float()) @ K.float()
            expected = x.float() @ removed.float().t()
            self.start_deviation = float((through - expected).norm() / expected.norm().clamp_min(1e-30))
        if not self.start_deviation <= NOT_ITS_WEIGHT:
            raise ValueError(
                f"the output of {self.base_layer} is {self.start_deviation:.0%} away from the product with the weight that "
                "it holds, so that the start cannot be the identity: load its weight again, or start at random "
                "(init_weights=False)"
            )
        return removed

    def _removed_by_output(self, K: Tensor) -> Tensor:
        # through the layer itself: the gradient of its output along K's columns
        with torch.enable_grad():
            x = torch.zeros(K.shape[1], self.shape[1], device=K.device, dtype=self._input_dtype(K.device))
            y = self.base_layer(x.requires_grad_())
            return torch.autograd.grad(y, x, K.t().to(y.dtype))[0].to(K.dtype)

    def _input_dtype(self, device: torch.device) -> torch.dtype:
        """What the base layer takes: GGUF's say."""
        return getattr(self.base_layer, "compute_dtype", None) or compute_dtype(self.weight, device.type)

    def _rows(self, x: Tensor) -> int:
        return x.numel() // max(x.shape[-1], 1)

    def _adapted(self, x: Tensor, factors: list[Factors], args, kwargs) -> Tensor:
        self._check_width(x)
        B, A, K = (beside(factors, role, self.shape[1]) for role in "BAK")
        folded = not any(self.dropout(name) for name in self.active)
        R = beside(factors, "R", self.shape[1]) if folded else None
        x = autocast(x)
        if A is not None:
            self._check_dtype(x)
            y = LowRankLinear.apply(x, self.frozen_weight(), self.bias, B.to(x.dtype), A.to(x.dtype))
        else:
            y, bias = self._base_output(x, args, kwargs)
            if K is not None or R is not None:
                B, K, R = (None if t is None else t.to(y.dtype) for t in (B, K, R))
                y = ActivationLinear.apply(self.base_layer, x.to(y.dtype), y, bias, B, K, R)
        if not folded:
            for f, name in zip(factors, self.active):
                if f.R is not None:
                    h = F.linear(F.dropout(x, self.dropout(name)), f.R.to(x.dtype))
                    y = y + F.linear(h, f.B.to(x.dtype)).to(y.dtype)
        return y

    def _whole(self, x: Tensor, weight: Tensor) -> Tensor:
        """y by W'."""
        self._check_width(x)
        if x.dtype != weight.dtype:
            self._check_dtype(x)
        return F.linear(x.contiguous(), weight, self.bias)  # else torch rounds otherwise with grad than without

    def _check_width(self, x: Tensor) -> None:
        if x.shape[-1] != self.shape[1]:
            raise ValueError(f"input of shape {tuple(x.shape)} does not fit a linear layer of {self.shape[1]} features")

    def _base_output(self, x: Tensor, args=(), kwargs=None) -> tuple[Tensor, Tensor | None]:
        rows = x.reshape(-1, x.shape[-1]) if hooked(self.base_layer) else x
        y, bias = super()._base_output(rows, args, kwargs)
        if x.requires_grad and torch.is_grad_enabled() and not y.requires_grad:
            raise RuntimeError(
                f"the base layer, {self.base_layer}, passes no gradient on to its input, so that nothing before it can be "
                "trained: quantise its weight alone, not its activations"
            )
        return y.reshape(*x.shape[:-1], -1), bias

    def _routed(self, x: Tensor, factors: list[Factors], args, kwargs) -> Tensor:
        index, weight = self._route(x)
        y, bias = self._base_output(autocast(x), args, kwargs)
        (m, n), batch = self.shape, x.shape[0]
        B, A, K, R = self._per_sample(factors, index, y.dtype)
        rows, plain = x.to(y.dtype).reshape(batch, -1, n), y.reshape(batch, -1, m)
        h = []
        if A is not None:
            h.append(rows @ A.mT)
        if R is not None:
            h.append(self._dropped(rows, index) @ R.mT)
        if K is not None:
            h.append(-(plain if bias is None else plain - bias.to(y.dtype)) @ K)
        h = sum(h) * weight.to(y.dtype)[:, None, None]
        return torch.baddbmm(plain, h, B.mT).view(y.shape)


class DeftConv2d(DeftLayer):
    """A frozen `nn.Conv2d` with adapters: y = conv(x, W) + b + conv1x1(conv(x, A), B).

    W is taken as (out, in*kh*kw); any kernel, stride, padding, padding mode and dilation.

    Raises:
        TypeError: a base layer that is no Conv2d, or one with groups > 1.
    """

    def __init__(self, base_layer: nn.Module, config: DeftConfig | None = None, adapter_name: str = "default"):
        if not isinstance(base_layer, nn.Conv2d):
            raise TypeError(f"DeftConv2d adapts nn.Conv2d, not {type(base_layer).__name__}")
        if base_layer.groups != 1:
            raise TypeError(f"DeftConv2d does not adapt grouped convolutions (groups={base_layer.groups})")
        super().__init__(base_layer, config, adapter_name)

    def _shape(self) -> tuple[int, int]:
        return self.base_layer.weight.shape[0], self.base_layer.weight[0].numel()

    def matrix(self, stored: Tensor) -> Tensor:
        return stored.reshape(stored.shape[0], -1)

    @staticmethod
    def forward_is_plain(base: nn.Module) -> bool:
        return type(base).forward is nn.Conv2d.forward

    def _rows(self, x: Tensor) -> int:
        return x.shape[-1] * x.shape[-2] * (x.shape[0] if x.dim() == 4 else 1)

    def _adapted(self, x: Tensor, factors: list[Factors], args, kwargs) -> Tensor:
        A = beside(factors, "A", self.shape[1])
        folded = not any(self.dropout(name) for name in self.active)
        x = autocast(x)
        base, batched = self.base_layer, x.dim() == 4
        padded, padding = self._pad(x if batched else x[None])
        geometry = (base.stride, padding, base.dilation)

        def inject(z: Tensor, R: Tensor) -> Tensor:
            return F.conv2d(z, R.to(z.dtype).reshape(-1, *base.weight.shape[1:]), None, *geometry)

        def expand(h: Tensor, B: Tensor) -> Tensor:
            return F.conv2d(h, B.to(h.dtype)[:, :, None, None])

        if A is not None:
            self._check_dtype(x)
            B, weight = beside(factors, "B", self.shape[1]), base.weight.detach()
            y = LowRankConv2d.apply(padded, weight, self.bias, B.to(x.dtype), A.to(x.dtype), geometry)
        else:
            # by autograd: a convolution whose weight is out of reach keeps its output for the removal's gradient
            y, bias = self._base_output(x if batched else x[None])
            plain = y if bias is None else y - bias[:, None, None].to(y.dtype)
            for f in factors:
                if f.K is not None:
                    y = y - expand(F.conv2d(plain, f.K.to(y.dtype).t()[:, :, None, None]), f.B)
                if f.R is not None and folded:
                    y = y + expand(inject(padded, f.R), f.B).to(y.dtype)
        if not folded:
            for f, name in zip(factors, self.active):
                if f.R is not None:
                    y = y + expand(inject(F.dropout(padded, self.dropout(name)), f.R), f.B).to(y.dtype)
        return y if batched else y[0]

    def _routed(self, x: Tensor, factors: list[Factors], args, kwargs) -> Tensor:
        base, batched = self.base_layer, x.dim() == 4
        x = autocast(x if batched else x[None])
        index, weight = self._route(x)
        y, bias = self._base_output(x)
        padded, padding = self._pad(x)
        geometry = (base.stride, padding, base.dilation)
        batch, (B, A, K, R) = len(x), self._per_sample(factors, index, y.dtype)

        def each(z: Tensor, thin: Tensor) -> Tensor:
            """A convolution of its own for every sample: one of as many groups."""
            kernels = thin.reshape(-1, *base.weight.shape[1:])
            h = F.conv2d(z.to(y.dtype).reshape(1, -1, *z.shape[2:]), kernels, None, *geometry, groups=batch)
            return h.reshape(batch, thin.shape[1], -1)

        h = []
        if A is not None:
            h.append(each(padded, A))
        if R is not None:
            h.append(each(self._dropped(padded, index), R))
        if K is not None:
            plain = y if bias is None else y - bias[:, None, None].to(y.dtype)
            h.append(-K.mT @ plain.flatten(2))
        h = sum(h) * weight.to(y.dtype)[:, None, None]
        y = torch.baddbmm(y.flatten(2), B, h).view(y.shape)
        return y if batched else y[0]

    def _pad(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The input with whatever padding a plain convolution cannot do itself, and the padding it can."""
        base = self.base_layer
        if base.padding_mode != "zeros":
            return F.pad(x, base._reversed_padding_repeated_twice, base.padding_mode), (0, 0)
        if isinstance(base.padding, str):
            left, right, top, bottom = sides = base._reversed_padding_repeated_twice
            return (x, (top, left)) if (left, top) == (right, bottom) else (F.pad(x, sides), (0, 0))
        return x, base.padding


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D, a linear layer stored transposed (told by name: transformers is no
    dependency here)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and module.weight.dim() == 2
