"""The files of DEFT's authors, written by the calls that their code makes, against their formulas in plain torch.

W' is compared in float32 to 1e-5 of weights of size 0.3: rounding of products of at most 24 terms.
"""

import json
import math
import os
import pickle
import warnings

import pytest
import torch
from common import Opaque, small_model
from diffusers import OmniGenTransformer2DModel
from test_inject import assert_untouched, fingerprint
from torch import nn

import deft_kernels as dk
from deft_kernels.adapters.authors import is_reference, read_reference

RANK = 3
TARGETS = ("to_q", "to_v", "to_out.0")


def seeded_model():
    torch.manual_seed(5)
    return small_model()


def targets(model):
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.endswith(TARGETS)]


def orthogonal(P, method):
    if method == "qr":
        return torch.linalg.qr(P).Q
    return torch.linalg.svd(P, full_matrices=False).U[:, : P.shape[1]]


# What their code has: parameters of a layer, what it computes from W, and what it saves -------------------------------


def injected(weight, method="residual_projection", decomposition="qr", gating=False, fixed=False, alpha=8.0):
    """(tensors, configuration, W') of one of their injection layers, at their random start."""
    m, n = weight.shape
    P, R = torch.randn(m, RANK) * 0.02, torch.randn(RANK, n) * 0.02
    lora_A, lora_B, gate = torch.randn(m, RANK) * 0.3, torch.randn(RANK, n) * 0.3, torch.randn(1) + 0.5
    weight = weight.detach()
    tensors = {"P": P, "R_new": R} if method != "lorapara" else {"P": P}
    if method in ("additive_update", "lorapara"):
        tensors |= {"lora_A": lora_A, "lora_B": lora_B}
    factor = torch.sigmoid(gate) if gating else 1.0
    if gating:
        tensors["gate"] = gate
    if decomposition in ("qr", "svd"):
        Q = orthogonal(P, decomposition)
        projector = Q @ Q.T
        if fixed:
            tensors["Q_P_cached"] = Q
    else:  # the string 'None', and no method at all
        Q, projector = P, P @ (torch.relu(P) if decomposition == "None" else P).T
    if method == "additive_update":
        changed = weight + lora_A @ lora_B * (alpha / RANK) * factor
    elif method == "lorapara":
        changed = weight - projector @ weight + lora_A @ lora_B * (alpha / RANK) * factor
    else:
        changed = weight - projector @ weight + Q @ R * factor
    config = {
        "r": RANK, "injection_method": method, "lora_alpha": alpha, "lora_dropout": 0.0, "in_features": n, "out_features": m,
        "init_scale": 1.0, "use_gating": gating, "decomposition_method": decomposition,
        "compute_svd_each_forward": not fixed,
    }  # fmt: skip
    return tensors, config, changed


def written(folder, layers, stem="knowledge_injection", json_too=True):
    """Their `save_pretrained`: a dictionary of tensors, and the configuration twice."""
    os.makedirs(folder, exist_ok=True)
    state = {f"{name}.{role}": t.detach().cpu() for name, (tensors, *_) in layers.items() for role, t in tensors.items()}
    torch.save(state, os.path.join(folder, f"{stem}_state.bin"))
    config = {"layer_configs": {name: config for name, (_, config, _) in layers.items()}}
    torch.save(config, os.path.join(folder, f"{stem}_config.bin"))
    if json_too:
        with open(os.path.join(folder, f"{stem}_config.json"), "w") as out:
            json.dump(config, out, indent=2, default=str)
    return folder


def assert_weights(model, layers, rename=lambda name: name):
    """The model's merged weights are W', and the others what they were."""
    pristine = seeded_model().state_dict()
    dk.merge(model)
    for name, (_, _, changed) in layers.items():
        got = model.get_submodule(rename(name)).weight
        assert (got - pristine[f"{rename(name)}.weight"]).abs().max() > 1e-4
        torch.testing.assert_close(got, changed, rtol=1e-5, atol=1e-5)
    assert torch.equal(model.conv_in.weight, pristine["conv_in.weight"])
    dk.unmerge(model)


METHODS = {
    "project_replace": {"method": "project_replace"},
    "residual_projection": {},
    "svd": {"decomposition": "svd"},
    "'None'": {"decomposition": "None"},
    "gated": {"gating": True},
    "gated 'None'": {"gating": True, "decomposition": "None"},
    "cached": {"fixed": True},
    "cached svd": {"fixed": True, "decomposition": "svd"},
    "additive_update": {"method": "additive_update"},
    "additive_update gated": {"method": "additive_update", "gating": True, "alpha": 2.0},
    "lorapara": {"method": "lorapara"},
    "lorapara gated svd": {"method": "lorapara", "gating": True, "decomposition": "svd"},
}


@pytest.mark.parametrize("json_too", [True, False])
@pytest.mark.parametrize("options", METHODS.values(), ids=METHODS)
def test_every_injection_method(tmp_path, options, json_too):
    model = seeded_model()
    names = targets(model)
    layers = {name: injected(model.get_submodule(name).weight, **options) for name in names}
    written(tmp_path, layers, json_too=json_too)
    assert sorted(dk.import_reference(model, tmp_path)) == sorted(names)
    assert not any(p.requires_grad for p in model.parameters())
    assert_weights(model, layers)


def test_what_was_trained_is_what_trains(tmp_path):
    """P, R and the gate themselves, not what was made of them, go on training, and save in our own layout."""
    model = seeded_model()
    layers = {name: injected(model.get_submodule(name).weight, gating=True, fixed=True) for name in targets(model)}
    dk.import_reference(model, written(tmp_path / "theirs", layers), "mine", trainable=True)
    for name, (tensors, *_) in layers.items():
        mine = model.get_submodule(name).adapter_tensors("mine")
        assert all(p.requires_grad for p in mine.values())
        assert torch.equal(mine["P"], tensors["P"]) and torch.equal(mine["R"], tensors["R_new"])
        assert torch.equal(mine["gate"], tensors["gate"].reshape(()))
    config = model.get_submodule(next(iter(layers))).configs["mine"]
    assert (config.r, config.decomposition_method, config.gate, config.init_weights) == (RANK, "qr", True, False)
    dk.save_adapter(model, tmp_path / "ours", "mine")
    other = seeded_model()
    dk.load_adapter(other, tmp_path / "ours")
    assert_weights(other, layers)


def test_a_basis_that_was_fixed_before_P_moved(tmp_path):
    """compute_svd_each_forward off: they sample with Q_P_cached, whatever P has become."""
    model = seeded_model()
    layers = {name: injected(model.get_submodule(name).weight, fixed=True) for name in targets(model)}
    for tensors, *_ in layers.values():
        tensors["P"] = tensors["P"] + torch.randn_like(tensors["P"]) * 0.02
    with pytest.warns(UserWarning, match="Q_P_cached, which these layers sample with, are not those of their P"):
        dk.import_reference(model, written(tmp_path, layers))
    assert_weights(model, layers)


@pytest.mark.parametrize("away, replaced", [(2**-8, False), (2**-6, True)])
def test_how_far_a_cached_basis_may_be_from_that_of_P(tmp_path, away, replaced):
    """Bases of one size rounded to bfloat16 are 2^-9 apart at most."""
    layers = {"x": injected(torch.randn(8, 8), fixed=True)}
    layers["x"][0]["Q_P_cached"][0, 0] += away
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        adapter = read_reference(written(tmp_path, layers))[""]
    assert bool(told) == replaced and adapter.config.decomposition_method == ("none" if replaced else "qr")
    assert [w.filename for w in told] == [__file__] * replaced


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_caches_are_no_other_basis(tmp_path, dtype, recwarn):
    model = seeded_model()
    layers = {name: injected(model.get_submodule(name).weight, fixed=True) for name in targets(model)}
    for tensors, *_ in layers.values():
        tensors["Q_P_cached"] = tensors["Q_P_cached"].to(dtype)
    dk.import_reference(model, written(tmp_path, layers))
    assert not [w for w in recwarn if "Q_P_cached" in str(w.message)]
    assert_weights(model, layers)


# The SDXL runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "unet.", "module."])
@pytest.mark.parametrize("kind", ["deft", "gated", "para", "qr"])
def test_sdxl_runs(tmp_path, kind, prefix):
    """`checkpoint-N/project_replace.pt`: P P^T as it is, a gate that is there and unused for PaRa, and no configuration."""
    model = seeded_model()
    state, layers = {}, {}
    for name in targets(model):
        W = model.get_submodule(name).weight.detach()
        P, R, gate = torch.randn(8, RANK) * 0.3, torch.randn(RANK, 8) * 0.3, torch.randn(1)
        Q = orthogonal(P, "qr") if kind in ("para", "qr") else P
        tensors = {"P": P} | ({} if kind == "para" else {"R_new": R}) | ({"gate": gate} if kind in ("gated", "para") else {})
        injection = 0 if kind == "para" else Q @ R * (torch.sigmoid(gate) if kind == "gated" else 1)
        layers[name] = (tensors, None, W - Q @ Q.T @ W + injection)
        state |= {f"{prefix}{name}.lora_layer.{role}": t for role, t in tensors.items()}
    file = tmp_path / "checkpoint-500" / "project_replace.pt"
    file.parent.mkdir()
    torch.save(state, file)
    chosen = "qr" if kind == "qr" else None  # runs with orthonormalize=True do not say so
    assert len(dk.import_reference(model, file, decomposition_method=chosen)) == 6
    assert_weights(model, layers)
    dk.eject(model)
    dk.import_reference(model, file.parent, decomposition_method=chosen)
    assert_weights(model, layers)


# PaRa -----------------------------------------------------------------------------------------------------------------


def removed(weight, method="qr", adaptive=False, sparse=False, truncated=None):
    """(tensors, configuration, W') of one of their PaRa layers: kaiming_uniform(a=sqrt(5)) B."""
    B = nn.init.kaiming_uniform_(torch.empty(weight.shape[0], RANK), a=math.sqrt(5))
    tensors = {"B": B}
    if sparse:
        mask = torch.bernoulli(torch.full_like(B, 0.7))
        tensors, B = {"B_dense": B, "sparse_mask": mask}, B * mask
    U, S, _ = torch.linalg.svd(B, full_matrices=False)
    keep = RANK
    if method == "eigen":
        values, vectors = torch.linalg.eigh(B @ B.T + torch.eye(len(B)) * 1e-6)
        values, U = values.flip(0), vectors.flip(1)
        if adaptive:
            keep = min(int((torch.cumsum(values, 0) / values.sum() < 0.8).sum()) + 1, RANK)
        projector = U[:, :keep] @ torch.diag(values[:keep]) @ U[:, :keep].T
    elif method == "qr" and not truncated:
        Q = orthogonal(B, "qr")
        projector = Q @ Q.T
    else:
        if adaptive:
            keep = int((torch.cumsum(S**2, 0) / (S**2).sum() < 0.8).sum()) + 1
        projector = U[:, :keep] @ torch.diag(S[:keep]) @ U[:, :keep].T
    config = {"r": RANK, "lora_alpha": RANK, "in_features": weight.shape[1], "out_features": weight.shape[0]}
    if truncated is not None:
        config["truncated_svd"] = truncated
    else:
        config |= {"decomposition_method": method, "adaptive_rank": adaptive, "sparse_parameterization": sparse}
        config |= {"variance_threshold": 0.8} if adaptive else {}
        config |= {"sparsity_factor": 0.3} if sparse else {}
    return tensors, config, weight.detach() - projector @ weight.detach()


@pytest.mark.parametrize("options", [
    {}, {"truncated": False}, {"truncated": True}, {"method": "tsvd"}, {"method": "lrmf"}, {"method": "eigen"},
    {"sparse": True}, {"method": "tsvd", "sparse": True}, {"method": "tsvd", "adaptive": True},
    {"method": "lrmf", "adaptive": True}, {"method": "eigen", "adaptive": True},
], ids=str)  # fmt: skip
def test_every_para(tmp_path, options):
    model = seeded_model()
    layers = {name: removed(model.get_submodule(name).weight, **options) for name in targets(model)}
    written(tmp_path, layers, "para_rank")
    dk.import_reference(model, tmp_path)
    assert model.get_submodule(next(iter(layers))).configs["default"].para
    assert_weights(model, layers)


def test_para_without_a_configuration_is_qr(tmp_path):
    model = seeded_model()
    layers = {name: removed(model.get_submodule(name).weight) for name in targets(model)}
    written(tmp_path, layers, "para_rank")
    for name in ("bin", "json"):
        os.remove(tmp_path / f"para_rank_config.{name}")
    dk.import_reference(model, tmp_path)
    assert_weights(model, layers)


# OmniGen: one layer there, three in diffusers -------------------------------------------------------------------------


def omnigen():
    torch.manual_seed(1)
    return OmniGenTransformer2DModel(
        in_channels=4, num_layers=2, hidden_size=16, num_attention_heads=2, num_key_value_heads=2, intermediate_size=24,
        pad_token_id=0, vocab_size=30, time_step_dim=8, pos_embed_max_size=4,
        rope_scaling={"short_factor": [1.0] * 4, "long_factor": [1.0] * 4, "type": "su"},
    )  # fmt: skip


@pytest.mark.parametrize("options", [{"gating": True}, {"decomposition": "None"}, {"method": "additive_update"},
                                     {"method": "lorapara"}])  # fmt: skip
def test_the_authors_omnigen_in_diffusers_omnigen(tmp_path, options):
    """Phi-3's qkv_proj is the rows of q, k and v one below the other."""
    model = omnigen()
    layers, whole = {}, {}
    for i in range(2):
        parts = [model.get_submodule(f"layers.{i}.self_attn.to_{x}").weight for x in "qkv"]
        name = f"llm.layers.{i}.self_attn"
        layers[f"{name}.qkv_proj"] = injected(torch.cat([p.detach() for p in parts]), **options)
        layers[f"{name}.o_proj"] = injected(model.get_submodule(f"layers.{i}.self_attn.to_out.0").weight, **options)
        whole |= dict(zip([f"layers.{i}.self_attn.to_{x}" for x in "qkv"], layers[f"{name}.qkv_proj"][2].split(16)))
        whole[f"layers.{i}.self_attn.to_out.0"] = layers[f"{name}.o_proj"][2]
    names = dk.import_reference(model, written(tmp_path, layers))
    assert sorted(names) == sorted(whole)
    dk.merge(model)
    for name, changed in whole.items():
        torch.testing.assert_close(model.get_submodule(name).weight, changed, rtol=1e-5, atol=1e-5)


# What is refused ------------------------------------------------------------------------------------------------------


class Canary:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_no_pickle_is_executed(tmp_path):
    canary = tmp_path / "canary"
    model = seeded_model()
    name = targets(model)[0]
    folder = written(tmp_path / "a", {name: injected(model.get_submodule(name).weight)}, json_too=False)
    before = fingerprint(model)
    for file in ("knowledge_injection_state.bin", "knowledge_injection_config.bin"):
        whole = (folder / file).read_bytes()
        for save, reason in ((torch.save, "it asks for posix.mkdir"), (lambda v, f: f.write_bytes(pickle.dumps(v)), "")):
            save({"x": Canary(canary)}, folder / file)
            with pytest.raises(ValueError, match=f"{file} is refused: .* other things than tensors .*{reason}"):
                dk.import_reference(model, folder)
            assert not canary.exists()
        (folder / file).write_bytes(whole)
    assert_untouched(model, before)
    pickle.loads(pickle.dumps(Canary(canary)))
    assert canary.exists()  # it would have shown


def one(change_tensors=None, **change):
    def apply(layers):
        for tensors, config, _ in layers.values():
            config.update(change)
            if change_tensors:
                change_tensors(tensors)
            break

    return apply


@pytest.mark.parametrize("change, message", [
    (one(injection_method="additive_update"), "layers differ in injection_method, 'additive_update' and 'residual"),
    (one(decomposition_method="svd"), "layers differ in decomposition_method, 'svd' and 'qr'"),
    (one(r=3, decomposition_method=["qr"]), "decomposition_method of blocks.0.to_q is a list, expected a plain value"),
    (lambda s: [c.update(decomposition_method="lu") for _, c, _ in s.values()], "unknown decomposition_method 'lu'"),
    (lambda s: [c.update(injection_method="svdiff") for _, c, _ in s.values()], "unknown injection_method 'svdiff'"),
    (lambda s: [c.update(lora_alpha="8") for _, c, _ in s.values()], "lora_alpha is '8', expected a finite number"),
    (lambda s: [c.update(use_gating="0") for _, c, _ in s.values()], "use_gating is '0', expected true or false"),
    (one(lambda t: t.update(Z=torch.ones(1))), r"1 of 13 keys are unknown: blocks.0.to_q.Z"),
    (one(lambda t: t.update(W=torch.ones(1))), r"1 of 13 keys are unknown \(those of nmf, which has no counterpart here\)"),
    (one(lambda t: t.pop("P")), "P of blocks.0.to_q is missing, expected a matrix"),
    (one(lambda t: t.pop("R_new")), "R_new of blocks.0.to_q is missing, expected a matrix"),
    (one(lambda t: t.update(R_new=t["R_new"][:2])), r"R_new of blocks.0.to_q is \(2, 8\), expected \(3, n\), as P is"),
    (one(lambda t: t.update(R_new=t["R_new"][0])), r"R_new of blocks.0.to_q is \(8,\), expected a matrix"),
    (lambda s: [c.update(decomposition_method=None) for _, c, _ in s.values()], "unknown decomposition_method None: expect"),
    (lambda s: [c.update(lora_alpha=10**400) for _, c, _ in s.values()], "lora_alpha is 10+, expected a finite number"),
    (lambda s: [c.update(use_gating=True) for _, c, _ in s.values()], "the gate of blocks.0.to_q is missing or no single"),
    (lambda s: [c.update(injection_method="additive_update") for _, c, _ in s.values()], "lora_A of blocks.0.to_q is miss"),
    (one(lambda t: t.update(P=t["P"][:, :2], R_new=t["R_new"][:2])), r"layers differ in rank, \[2, 3\]"),
    (one(lambda t: t.update(P=t["P"][:4])), r"wrong shapes: blocks.0.to_q \(P: \(4, 3\), expected \(8, 3\)\)"),
    (one(lambda t: t["R_new"].fill_(float("nan"))), "R_new of blocks.0.to_q has values that are not finite"),
    (one(lambda t: t.update(P=t["P"].long())), "blocks.0.to_q.P is a torch.int64, expected a dense tensor"),
    (one(lambda t: t.update(P="text")), "blocks.0.to_q.P is a str, expected a dense tensor"),
    (lambda s: s.update({"blocks.9.to_q": s.pop("blocks.0.to_q")}), "1 of 6 layers are not in Model: blocks.9.to_q"),
    (lambda s: s.clear(), "holds a dict, expected a dictionary of tensors|has no layer_configs"),
])  # fmt: skip
def test_wrong_files(tmp_path, change, message):
    model = seeded_model()
    layers = {name: injected(model.get_submodule(name).weight) for name in targets(model)}
    change(layers)
    os.makedirs(tmp_path, exist_ok=True)
    state = {f"{name}.{role}": t for name, (tensors, *_) in layers.items() for role, t in tensors.items()}
    torch.save(state, tmp_path / "knowledge_injection_state.bin")
    config = {"layer_configs": {name: config for name, (_, config, _) in layers.items()}}
    (tmp_path / "knowledge_injection_config.json").write_text(json.dumps(config))
    before = fingerprint(model)
    with pytest.raises(ValueError, match=message) as error:
        dk.import_reference(model, tmp_path)
    assert str(tmp_path) in str(error.value)
    assert_untouched(model, before)


def test_what_is_not_there(tmp_path):
    model = seeded_model()
    with pytest.raises(FileNotFoundError, match="expected a file or a folder with one of knowledge_injection_state.bin, "):
        dk.import_reference(model, tmp_path)
    layers = {name: injected(model.get_submodule(name).weight) for name in targets(model)}
    written(tmp_path, layers)
    for end in ("bin", "json"):
        os.remove(tmp_path / f"knowledge_injection_config.{end}")
    with pytest.raises(FileNotFoundError, match=r"config.json \(or .bin\) is missing: give decomposition_method"):
        dk.import_reference(model, tmp_path)
    dk.import_reference(model, tmp_path, decomposition_method="qr")
    assert_weights(model, layers)
    torch.save({"a.P": torch.ones(1)}, tmp_path / "project_replace.pt")
    with pytest.raises(ValueError, match=r"knowledge_injection_state.bin and project_replace.pt: name the file to read"):
        read_reference(tmp_path)


@pytest.mark.parametrize("options, change, message", [
    ({"gating": True}, lambda t: t.update(gate=torch.ones(3)), "the gate of blocks.0.to_q is missing or no single number"),
    ({"method": "additive_update"}, lambda t: t.pop("lora_B"), "lora_B of blocks.0.to_q is missing, expected a matrix"),
    ({"method": "additive_update"}, lambda t: t.update(lora_B=torch.ones(4, 8)),
     r"lora_B of blocks.0.to_q is \(4, 8\), expected \(3, n\), as lora_A is \(8, 3\)"),
    ({"fixed": True}, lambda t: t.update(Q_P_cached=torch.ones(8, 2)), r"Q_P_cached of blocks.0.to_q is \(8, 2\), expected"),
])  # fmt: skip
def test_layers_that_lack_what_their_method_has(tmp_path, options, change, message):
    model = seeded_model()
    layers = {name: injected(model.get_submodule(name).weight, **options) for name in targets(model)}
    change(layers["blocks.0.to_q"][0])
    with pytest.raises(ValueError, match=message):
        read_reference(written(tmp_path, layers))  # with no model at hand


def test_a_decomposition_that_does_not_apply(tmp_path):
    model = seeded_model()
    weights = {name: model.get_submodule(name).weight for name in targets(model)}
    written(tmp_path / "lora", {name: injected(w, "additive_update") for name, w in weights.items()})
    written(tmp_path / "tsvd", {name: removed(w, "tsvd") for name, w in weights.items()}, "para_rank")
    written(tmp_path / "deft", {name: injected(w) for name, w in weights.items()})
    for folder, method, message in (
        ("deft", "lu", "decomposition_method is 'lu', expected one of qr, svd, relu, none, or None"),
        ("lora", "qr", "decomposition_method does not apply to additive_update, which is LoRA"),
        ("tsvd", "qr", r"decomposition_method does not apply: this is PaRa by 'tsvd' \(blocks.0.to_q\)"),
    ):
        with pytest.raises(ValueError, match=message):
            dk.import_reference(model, tmp_path / folder, decomposition_method=method)
    assert read_reference(tmp_path / "deft", "svd")[""].config.decomposition_method == "svd"  # told wrongly


def test_numbers_beyond_floats(tmp_path):
    model = seeded_model()
    layers = {name: removed(model.get_submodule(name).weight, "tsvd", adaptive=True) for name in targets(model)}
    for _, config, _ in layers.values():
        config["variance_threshold"] = 10**400
    with pytest.raises(ValueError, match="variance_threshold is 10+, expected a finite number"):
        dk.import_reference(model, written(tmp_path, layers, "para_rank"))


def test_defaults_that_their_files_leave_out(tmp_path):
    """alpha 8 (deft/injection.py), a variance of .95 (their PaRa layers)."""
    model = seeded_model()
    W = model.get_submodule("blocks.0.to_q").weight.detach()
    layers = {"blocks.0.to_q": injected(W, "additive_update", alpha=8.0)}
    del layers["blocks.0.to_q"][1]["lora_alpha"]
    dk.import_reference(model, written(tmp_path / "lora", layers))
    assert_weights(model, layers)
    B = torch.linalg.qr(torch.randn(8, RANK)).Q * torch.tensor([1.0, 0.4, 0.3])  # .80, .93 and 1 of the variance
    config = {"r": RANK, "decomposition_method": "tsvd", "adaptive_rank": True}
    read = {}
    for name, threshold in (("none", None), ("lower", 0.9)):
        written(tmp_path / name, {"x": ({"B": B}, config | ({"variance_threshold": threshold} if threshold else {}), None)},
                "para_rank")  # fmt: skip
        read[name] = read_reference(tmp_path / name)[""].tensors["x"]["P"]
    assert [int(P.any(0).sum()) for P in read.values()] == [3, 2]


@pytest.mark.parametrize("prefix", ["", "module.", "base_model.model.", "unet.", "transformer.", "module.unet."])
def test_names_of_wrapped_models(tmp_path, prefix):
    model = seeded_model()
    layers = {name: injected(model.get_submodule(name).weight) for name in targets(model)}
    written(tmp_path, {prefix + name: layer for name, layer in layers.items()})
    assert sorted(dk.import_reference(model, tmp_path)) == sorted(layers)
    assert sorted(read_reference(tmp_path)[""].tensors) == sorted(layers)


def test_a_prefix_that_is_a_part_of_the_model(tmp_path):
    model = nn.Sequential()
    model.transformer = nn.ModuleDict({"to_q": nn.Linear(8, 8)})
    layers = {"transformer.to_q": injected(model.transformer["to_q"].weight)}
    assert dk.import_reference(model, written(tmp_path, layers)) == ["transformer.to_q"]


def test_a_file_of_another_name(tmp_path):
    model = seeded_model()
    layers = {name: injected(model.get_submodule(name).weight) for name in targets(model)}
    written(tmp_path, layers)
    file = (tmp_path / "knowledge_injection_state.bin").rename(tmp_path / "mine.bin")
    assert is_reference(file) and not is_reference(tmp_path / "knowledge_injection_config.json")
    dk.import_reference(model, file, decomposition_method="qr")
    assert_weights(model, layers)


def test_two_adapters_or_none(tmp_path):
    """lorapara where the second name is taken."""
    model = seeded_model()
    layers = {name: injected(model.get_submodule(name).weight, "lorapara") for name in targets(model)}
    dk.inject_adapter(model, dk.DeftConfig(r=1, target_modules=["conv_in"]), "x-lora")
    before = fingerprint(model)
    with pytest.raises(ValueError, match="the model has an adapter named 'x-lora' already"):
        dk.import_reference(model, written(tmp_path, layers), "x")
    assert_untouched(model, before)


def test_omnigens_fused_layer_needs_dense_weights(tmp_path):
    model = omnigen()
    parts = [model.get_submodule(f"layers.0.self_attn.to_{x}").weight for x in "qkv"]
    layers = {"llm.layers.0.self_attn.qkv_proj": injected(torch.cat([p.detach() for p in parts]))}
    layer = model.layers[0].self_attn.to_q
    layer.__class__ = Opaque
    with pytest.raises(ValueError, match="layers.0.self_attn.to_q: its dense weight is needed to take llm.layers.0"):
        dk.import_reference(model, written(tmp_path, layers))


def test_nmf_is_refused_by_name(tmp_path):
    model = seeded_model()
    layers = {name: removed(model.get_submodule(name).weight) for name in targets(model)}
    for _, config, _ in layers.values():
        config["decomposition_method"] = "nmf"
    with pytest.raises(ValueError, match="decomposition_method of blocks.0.to_q is 'nmf', expected qr, tsvd, lrmf or eigen"):
        dk.import_reference(model, written(tmp_path, layers, "para_rank"))
