"""Adapters into a model and out of it: which layers, which are active and how strongly, and the way back."""

import difflib
import math
import numbers
import re
import warnings

import torch
from torch import Tensor, nn

from ..config import DEFAULT_TARGETS, TARGETS, DeftConfig
from ..nn.bank import Bank
from ..nn.layers import DeftConv2d, DeftLayer, DeftLinear, MasterDict, Routes, is_conv1d, refuse_fused
from ..nn.prepare import COMBINATIONS
from ..nn.quantised import hold, release

# Modules that use their layers' weights directly, torch's fast paths among them.
READS_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
BASE = ("base", "__base__")  # a sample without adapter; the second is PEFT's name for it
INEXACT = 0.005  # start_deviation that is told: an output rounded to bfloat16 is 0.002 away, one of 8-bit inputs 0.006


# The parts of pipelines that adapters go into, by diffusers' names.
DENOISERS = ("unet", "transformer", "transformer_2")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")


class Parts(nn.ModuleDict):
    """Several models adapted as one, those of the pipeline that `name` says: layers are named `<part>.<layer>`. Each part is
    called by itself, and so has a bank of its own."""

    def __init__(self, parts: dict[str, nn.Module], name: str):
        super().__init__(parts)
        self._name = name

    def _get_name(self) -> str:
        return self._name


def inject_adapter(model: nn.Module, config: DeftConfig, adapter_name: str = "default") -> list[str]:
    """`deft_kernels.inject_adapter` of one model."""
    return attach(model, config, adapter_name, match_targets(model, config))


def attach(
    model: nn.Module,
    config: DeftConfig | dict[str, DeftConfig],
    adapter_name: str,
    names: list[str],
    tensors: dict[str, dict] | None = None,
    trainable: bool = True,
    activate: bool = True,
) -> list[str]:
    """`inject_adapter` on the layers given by name, with given values for P, R and gate where they come from a file; each
    layer may have a config of its own."""
    if not adapter_name or "." in adapter_name:
        raise ValueError(f"adapter_name {adapter_name!r}: expected a non-empty name without dots")
    if hasattr(MasterDict(), adapter_name):
        raise ValueError(f"adapter_name {adapter_name!r} is an attribute of the modules that hold adapters: choose another")
    if adapter_name in BASE:
        raise ValueError(f"adapter_name {adapter_name!r} stands for the base model: choose another name")
    modules = dict(model.named_modules(remove_duplicate=False))
    layers = adapted_layers(model)
    if any(adapter_name in layer.configs for layer in layers.values()):
        raise ValueError(f"the model has an adapter named {adapter_name!r} already: choose another name or delete it")
    if activate and any(layer.is_merged for layer in layers.values()):
        raise RuntimeError("an adapter is merged: call deft_kernels.unmerge(model) before adding another")
    roots = {f"{part}.": root for part, root in model.items()} if isinstance(model, Parts) else {"": model}
    for prefix, root in roots.items():
        if prefix in names:
            raise TypeError(f"the model itself is a {type(root).__name__}: wrap it, deft_kernels.DeftLinear(layer, config)")
    configs = config if isinstance(config, dict) else dict.fromkeys(names, config)
    for name in names:
        parent = modules[name.rpartition(".")[0]]
        if isinstance(parent, READS_WEIGHTS):
            raise TypeError(
                f"{name}: a {type(parent).__name__} reads its layers' weights without calling them, so that an adapter "
                "would have no effect; leave it out by exclude_modules"
            )
        refuse_fused(name.rpartition(".")[0], parent)

    wrappers: dict[int, DeftLayer] = {}  # by identity, so that a module used in two places stays one
    targets: list[tuple[str, DeftLayer]] = []
    for name in names:
        module = modules[name]
        if id(module) not in wrappers:
            wrappers[id(module)] = wrap(name, module)
            targets.append((name, wrappers[id(module)]))
    for name, layer in targets:
        if layer.device.type == "meta":
            raise ValueError(f"{name}: its weight is on the meta device, not loaded and not offloaded either; load it first")
    done: list[DeftLayer] = []
    try:
        for name, layer in targets:
            layer.train(modules[name].training)
            try:
                layer.add_adapter(adapter_name, configs[name], None if tensors is None else tensors[name], trainable)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            done.append(layer)
            for p in layer.adapter_tensors(adapter_name).values():
                if not torch.isfinite(p).all():
                    raise ValueError(f"{name}: the adapter's first values are not finite; its base weight has NaN or inf")
    except BaseException:  # an interrupt too: the model stays as it was
        for layer in done:
            layer.delete_adapter(adapter_name)
        for module in [] if layers else modules.values():
            release(module)
        raise

    for prefix, root in roots.items():
        joining = {name: layer for name, layer in targets if name.startswith(prefix)}
        bank = root.__dict__.get("_deft_bank")
        if joining and bank is None:
            bank = root.__dict__["_deft_bank"] = Bank(root)
            adapters = {id(p) for layer in layers.values() for n in layer.configs for p in layer.adapter_tensors(n).values()}
            bank.frozen = [p for p in root.parameters() if p.requires_grad and id(p) not in adapters]
            for p in bank.frozen:
                p.requires_grad_(False)
        if joining:
            for module in root.modules():  # gradients pass through those without an adapter as well
                hold(module)
            blocks = dict.fromkeys(name.rpartition(".")[0] for name in joining)
            bank.blocks |= {name: modules[name] for name in blocks if hasattr(modules[name], "fused_projections")}
            bank.layers += [layer for name, layer in joining.items() if layer is not modules[name]]
    for name, module in modules.items():
        layer = wrappers.get(id(module), module)
        if layer is not module:
            module.requires_grad_(False)
            _replace(model, name, layer)
    if activate:
        set_adapters(model, adapter_name)
    tell_inexact(dict(targets))
    return names


def tell_inexact(layers: dict[str, DeftLayer]) -> None:
    """Warn of the layers whose start was found not to be quite the identity."""
    deviations = {name: layer.start_deviation for name, layer in layers.items() if layer.start_deviation > INEXACT}
    if deviations:
        worst = max(deviations, key=deviations.get)
        warnings.warn(
            f"{len(deviations)} layers do not act exactly as the weight that they hold, as where 8-bit layers round their "
            f"inputs too (worst: {worst}, whose output is {deviations[worst]:.1%} away). The start is the identity but for "
            "that share of what the adapter removes. Bases of which the weights alone are quantised start exactly; "
            "init_weights=False starts at random",
            stacklevel=4,
        )


def match_targets(model: nn.Module, config: DeftConfig) -> list[str]:
    """Names of the layers that a config targets, matched as PEFT matches them: a list entry is a full name or the end of
    one after a dot, a string is a regular expression for the full name, "all-linear" is every linear layer but a language
    model's output layer."""
    modules = outer_modules(model)
    targets = config.target_modules
    if targets is None:
        targets = next((TARGETS[c.__name__] for c in type(model).__mro__ if c.__name__ in TARGETS), DEFAULT_TARGETS)
    if targets == "all-linear":
        head = getattr(model, "get_output_embeddings", lambda: None)()
        found = [k for k, v in modules.items() if isinstance(_base(v), nn.Linear) or is_conv1d(_base(v))]
        found = [k for k in found if head is None or _base(modules[k]) is not head]
    elif isinstance(targets, str):
        found = [k for k, v in modules.items() if re.fullmatch(targets, k) and adaptable(v)]
    else:
        found = []
        for target in targets:
            matched = [k for k in modules if k == target or k.endswith(f".{target}")]
            if not matched and config.target_modules is not None:
                ends = {".".join(parts[-i:]) for parts in (k.split(".") for k in modules) for i in (1, 2)} | set(modules)
                near = difflib.get_close_matches(target, sorted(e for e in ends if e), n=5, cutoff=0.4)
                hint = f"; the nearest names are {', '.join(near)}" if near else ""
                raise ValueError(f"target module {target!r} matches no layer of {type(model).__name__}{hint}")
            wrong = [k for k in matched if not adaptable(modules[k]) and not _excluded(k, config)]
            if wrong:
                raise TypeError(
                    f"target module {target!r} matches {wrong[0]}, a {type(modules[wrong[0]]).__name__}; only linear "
                    "layers, Conv1D and ungrouped Conv2d can be adapted"
                )
            found += matched
    chosen = set(found)
    names = [k for k in modules if k in chosen and not _excluded(k, config)]
    if not names:
        linear = sorted({k.rpartition(".")[2] for k, v in modules.items() if adaptable(v)})
        some = ", ".join(linear[:12]) + (", …" if len(linear) > 12 else "")
        raise ValueError(
            f"no layer of {type(model).__name__} matches target_modules={config.target_modules!r} "
            f"(exclude_modules={config.exclude_modules!r}); its adaptable layers end in: {some or 'none'}"
        )
    return names


def outer_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The model's modules by name, without the insides of adapted layers; a module used in two places has both names."""
    if isinstance(model, DeftLayer):
        return {"": model}
    inner = tuple(f"{name}." for name in adapted_layers(model, remove_duplicate=False))
    return {name: m for name, m in model.named_modules(remove_duplicate=False) if not name.startswith(inner)}


def _base(module: nn.Module) -> nn.Module:
    return module.base_layer if isinstance(module, DeftLayer) else module


def adaptable(module: nn.Module) -> bool:
    """Whether an adapter can be put on this module."""
    base = _base(module)
    return isinstance(base, nn.Linear) or is_conv1d(base) or (isinstance(base, nn.Conv2d) and base.groups == 1)


def _excluded(name: str, config: DeftConfig) -> bool:
    excludes = config.exclude_modules or []
    if isinstance(excludes, str):
        return re.fullmatch(excludes, name) is not None
    return any(name == e or name.endswith(f".{e}") for e in excludes)


def wrap(name: str, module: nn.Module) -> DeftLayer:
    """The module as an adapted layer without an adapter yet; itself if it is one. TypeError names what cannot be adapted."""
    if isinstance(module, DeftLayer):
        return module
    try:
        return DeftConv2d(module) if isinstance(module, nn.Conv2d) else DeftLinear(module)
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from None


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def adapted_layers(model: nn.Module, remove_duplicate: bool = True) -> dict[str, DeftLayer]:
    """The adapted layers of a model by name."""
    modules = model.named_modules(remove_duplicate=remove_duplicate)
    return {name: module for name, module in modules if isinstance(module, DeftLayer)}


def require_layers(model: nn.Module, adapter_names=()) -> dict[str, DeftLayer]:
    """The adapted layers; ValueError where there are none, or where no layer has one of the named adapters."""
    layers = adapted_layers(model)
    if not layers:
        raise ValueError(f"{model._get_name()} has no adapter: call deft_kernels.inject_adapter(model, config) first")
    known = sorted({name for layer in layers.values() for name in layer.configs})
    for name in adapter_names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            raise ValueError(f"no adapter named {name!r}; the model has {', '.join(known) or 'none'}"
                             + (f" (did you mean {near[0]!r}?)" if near else ""))  # fmt: skip
    return layers


def named_weights(names, weights) -> dict[str, float]:
    """{adapter: strength} from the forms that a caller may give: a name or several, a number or several, or None."""
    names = [names] if isinstance(names, str) else list(names)
    if weights is None:
        weights = [1.0] * len(names)
    elif isinstance(weights, numbers.Real):
        weights = [weights] * len(names)
    weights = [float(w) for w in weights]
    if len(names) != len(weights):
        raise ValueError(f"{len(names)} adapter names but {len(weights)} weights")
    if len(set(names)) != len(names):
        raise ValueError(f"an adapter is named twice in {names}")
    if not all(math.isfinite(w) for w in weights):
        raise ValueError(f"weights {weights} are not all finite numbers")
    return dict(zip(names, weights))


def set_adapters(
    model: nn.Module, names: list[str] | str, weights: list[float] | float | None = None, combine: str = "sum"
) -> None:
    """Make exactly these adapters active, each at its strength, on every sample.

    Args:
        names: one name, several, or an empty list for the base model.
        weights: any real number for each adapter, or one for all; None: 1.
        combine: how several act on one layer, always at the cost of their factors alone:
            "sum": W' = W + sum_i w_i B_i A_i, every A_i from the pristine W;
            "sequential": one after the other in the order of `names`, W_i = W_(i-1) + w_i B_i (s_i R_i - K_i^T W_(i-1));
            "joint": PaRa adapters as one, W' = W - w Q Q^T W with Q = qr([Q_1, Q_2, ...]), a shared direction removed once.
            The last two are equal where the subspaces are orthogonal.

    An adapter that becomes inactive stops requiring grad, and does so again when it is active as it did before.
    Raises ValueError for an unknown name or combination, a weight that is not finite, or adapters that cannot act jointly;
    RuntimeError while an adapter is merged.
    """
    chosen = named_weights(names, weights)
    layers = _unmerged(model, chosen)
    check_combination(layers, chosen, combine)
    for layer in layers.values():
        layer.set_adapters(chosen, combine)


def route_adapters(model: nn.Module, adapter_names: list[str], weights: list[float] | float | None = None) -> None:
    """Give each sample of a batch its own adapter, until `set_adapters` or another call: all in one grouped pass of low-rank
    products, forward and backward, equal to running each sample alone.

    Args:
        adapter_names: one name for each sample, "base" for the base model.
        weights: any real number for each sample, or one for all; None: 1.

    The model may be called with a multiple of that many samples, as guidance makes of a batch: the list is then repeated as
    a whole, so that with diffusers' `num_images_per_prompt` every picture must be named, not every prompt.
    Samples are the first dimension of the model's first tensor, and must be that of every adapted layer's input; the layer
    for which they are not is named when it is called.
    Raises ValueError for an unknown name or a weight that is not finite, RuntimeError while an adapter is merged.
    """
    if isinstance(adapter_names, str) or not adapter_names:
        raise ValueError(f"adapter_names is {adapter_names!r}, expected a list with one name for each sample")
    unique = list(dict.fromkeys(name for name in adapter_names if name not in BASE))
    strengths = named_weights(range(len(adapter_names)), weights).values()
    samples = [(None if name in BASE else name, w) for name, w in zip(adapter_names, strengths)]
    layers = _unmerged(model, unique)
    for name, layer in layers.items():
        layer.set_adapters(dict.fromkeys(unique, 1.0), routes=Routes(name, samples))


def _unmerged(model: nn.Module, names) -> dict[str, DeftLayer]:
    layers = require_layers(model, names)
    if any(layer.is_merged for layer in layers.values()):
        raise RuntimeError("an adapter is merged: call deft_kernels.unmerge(model) first, or use deft_kernels.hotswap")
    return layers


def check_combination(layers: dict[str, DeftLayer], chosen: dict[str, float], combine: str) -> None:
    """ValueError for a combination that there is not, or that these adapters cannot enter."""
    if combine not in COMBINATIONS:
        raise ValueError(f"combine is {combine!r}, expected one of {', '.join(COMBINATIONS)}")
    if combine != "joint":
        return
    if len(set(chosen.values())) > 1:
        raise ValueError(f"adapters act jointly at one strength, not at {', '.join(f'{w:g}' for w in chosen.values())}")
    for name, layer in layers.items():
        for adapter in chosen:
            config = layer.configs.get(adapter)
            if config is not None and not (config.para and config.method in ("qr", "svd")):
                raise ValueError(
                    f"{name}: only PaRa adapters with an orthonormal basis (para=True, qr or svd) act jointly, and "
                    f"{adapter!r} is none: use combine='sequential'"
                )
        together = sum(layer.rank(adapter) for adapter in chosen if adapter in layer.configs)
        if together > layer.shape[0]:
            raise ValueError(f"{name}: {together} directions cannot be removed from the {layer.shape[0]} of its output")


def delete_adapter(model: nn.Module, name: str) -> None:
    """Remove an adapter from every layer. Raises ValueError for an unknown name, RuntimeError while it is merged."""
    layers = require_layers(model, [name])
    if any(name in layer.merged for layer in layers.values()):
        raise RuntimeError(f"adapter {name!r} is merged: call deft_kernels.unmerge(model) first")
    for layer in layers.values():
        if name in layer.configs:
            layer.delete_adapter(name)


def eject(model: nn.Module, keep_merged: bool = False) -> None:
    """Take all adapters out: the very original modules are back, trainable where they were, and unmerged to the bit, or,
    with `keep_merged`, with what is merged in their weights for good."""
    from .merge import unmerge

    layers = require_layers(model)
    if "" in layers:
        raise TypeError(f"this is the adapted layer itself: its original is {type(model).__name__}.base_layer")
    if not keep_merged and any(layer.is_merged for layer in layers.values()):
        unmerge(model)
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, DeftLayer):
            _replace(model, name, module.base_layer)
    for layer in layers.values():  # a bank further out may still list it
        layer.set_adapters({})
        layer.is_merged, layer.merged, layer._pristine, layer._merged_version = False, {}, None, None
    for module in model.modules():
        release(module)
        bank = module.__dict__.pop("_deft_bank", None)
        if bank is not None:
            bank.remove()
            for p in bank.frozen:
                p.requires_grad_(True)


def adapter_parameters(model: nn.Module, adapter_name: str = "default") -> dict[str, list[Tensor]]:
    """An adapter's parameters by role, `{"P": [...], "R": [...], "gate": [...]}`, for optimizer groups with learning rates
    of their own (DEFT's authors train R at ten times P's). For LoRA, "P" holds its B and "R" its A."""
    groups: dict[str, list[Tensor]] = {"P": [], "R": [], "gate": []}
    for layer in require_layers(model, [adapter_name]).values():
        for role, p in layer.adapter_tensors(adapter_name).items():
            groups[role].append(p)
    return groups
