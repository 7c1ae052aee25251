"""diffusers' verbs on a pipeline: `enable_deft`, and what it leaves as it was."""

import copy
import inspect
import json

import pytest
import tiny_pipelines
import torch
from deft_diffusers.pipeline import DeftVerbs, enable_deft
from diffusers import StableDiffusionPipeline
from diffusers.loaders.lora_base import LoraBaseMixin
from tiny_pipelines import FAMILIES, build, draw

import deft_kernels as dk

FAMILY = "stable-diffusion"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two adapters of the UNet and the text encoder, a DEFT and a LoRA."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, (name, config) in enumerate({"cat": dk.DeftConfig(r=2, init_weights=False, init_scale=15),
                                           "toy": dk.LoraConfig(r=3, alpha=60, init_weights=False)}.items()):  # fmt: skip
        torch.manual_seed(seed)
        pipe = build(FAMILY)
        dk.inject_adapter(pipe, {"unet": config, "text_encoder": config})
        dk.save_adapter(pipe, folder / name)
    return folder


@pytest.fixture
def pipe(folders):
    pipe = enable_deft(build(FAMILY))
    for name in ("cat", "toy"):
        pipe.load_lora_weights(folders / name, adapter_name=name)
    return pipe


def picture(pipe, **more):
    return draw(pipe, FAMILY, **more)


def same(a, b):
    """Pictures that differ by the order of sums in float32 at most."""
    return (a - b).abs().max() < 2e-5


def test_one_line_changes_nothing_but_the_verbs(tmp_path):
    for family in FAMILIES:
        plain = build(family)
        kind, call = type(plain), inspect.signature(plain.__call__)
        pipe = enable_deft(plain)
        assert pipe is plain and isinstance(pipe, kind) and isinstance(pipe, DeftVerbs)
        assert (type(pipe).__name__, type(pipe).__module__) == (kind.__name__, kind.__module__)
        assert inspect.signature(pipe.__call__) == call and enable_deft(pipe) is pipe
        assert torch.equal(draw(pipe, family), draw(build(family), family))
    build(FAMILY).save_pretrained(tmp_path / "plain")
    enable_deft(build(FAMILY)).save_pretrained(tmp_path / "ours")
    index = [json.loads((tmp_path / kind / "model_index.json").read_text()) for kind in ("plain", "ours")]
    assert index[0] == index[1]
    assert type(StableDiffusionPipeline.from_pretrained(tmp_path / "ours")) is StableDiffusionPipeline
    assert copy.copy(pipe).get_list_adapters() == {}


def test_every_verb_of_diffusers_is_there_with_its_arguments():
    for name in ("set_adapters", "get_active_adapters", "get_list_adapters", "delete_adapters", "fuse_lora", "unfuse_lora",
                 "enable_lora", "disable_lora", "unload_lora_weights", "set_lora_device"):  # fmt: skip
        theirs = [p for p in inspect.signature(getattr(LoraBaseMixin, name)).parameters if p != "kwargs"]
        assert list(inspect.signature(getattr(DeftVerbs, name)).parameters) == theirs, name
    theirs = list(inspect.signature(StableDiffusionPipeline.load_lora_weights).parameters)
    assert list(inspect.signature(DeftVerbs.load_lora_weights).parameters) == theirs


def test_load_weigh_list_delete_save(pipe, folders, tmp_path):
    both = {"unet": ["cat", "toy"], "text_encoder": ["cat", "toy"]}
    assert pipe.get_list_adapters() == both and pipe.get_active_adapters() == ["toy"]
    toy = picture(pipe)
    pipe.set_adapters(["cat", "toy"], [0.7, -0.4])
    assert dk.list_adapters(pipe) == {part: {"cat": 0.7, "toy": -0.4} for part in both}
    mixed = picture(pipe)
    pipe.set_adapters(["cat", "toy"], [{"unet": 0.7, "text_encoder": 0.0}, -0.4])
    assert dk.list_adapters(pipe) == {"unet": {"cat": 0.7, "toy": -0.4}, "text_encoder": {"cat": 0.0, "toy": -0.4}}
    pipe.set_adapters("cat", {"text_encoder": 0.5})
    cat = picture(pipe)
    assert dk.list_adapters(pipe) == {"unet": {"cat": 1.0, "toy": None}, "text_encoder": {"cat": 0.5, "toy": None}}
    base = picture(build(FAMILY))
    for a, b in ((toy, mixed), (toy, cat), (mixed, cat), (toy, base), (cat, base)):
        assert (a - b).abs().max() > 0.01
    pipe.set_adapters("cat")
    pipe.save_lora_weights(tmp_path)
    for part in both:
        assert list(dk.list_adapters(pipe)[part]) == ["cat", "toy"]
    pipe.delete_adapters(["cat"])
    assert pipe.get_list_adapters() == {"unet": ["toy"], "text_encoder": ["toy"]} and pipe.get_active_adapters() == []
    pipe.load_lora_weights(tmp_path)  # named as diffusers does
    assert pipe.get_active_adapters() == ["default_1"]
    pipe.set_adapters("default_1", {"text_encoder": 0.5})
    assert same(picture(pipe), cat)
    modules = [type(m) for m in build(FAMILY).unet.modules()]
    pipe.unload_lora_weights()
    assert [type(m) for m in pipe.unet.modules()] == modules and same(picture(pipe), base)
    pipe.unload_lora_weights()


def test_disable_and_enable(pipe):
    base = picture(build(FAMILY))
    pipe.set_adapters(["cat", "toy"], [{"unet": 0.7, "text_encoder": 0.2}, -0.4])
    before, drawn = dk.list_adapters(pipe), picture(pipe)
    pipe.disable_lora()
    pipe.disable_lora()
    assert pipe.get_active_adapters() == [] and same(picture(pipe), base)
    pipe.enable_lora()
    assert dk.list_adapters(pipe) == before and torch.equal(picture(pipe), drawn)
    pipe.enable_lora()
    assert dk.list_adapters(pipe) == before


def test_fuse_and_unfuse(pipe, folders):
    weights = {name: p.clone() for name, p in pipe.unet.named_parameters() if "base_layer" in name}
    pipe.set_adapters("cat", 0.6)
    drawn = picture(pipe)
    pipe.fuse_lora()
    assert pipe.fused_loras == {"cat"} and pipe.num_fused_loras == 1 and same(picture(pipe), drawn)
    with pytest.raises(RuntimeError, match="an adapter is merged"):
        pipe.set_adapters("toy")
    assert dk.list_adapters(pipe)["unet"] == {"cat": 0.6, "toy": None}
    pipe.unfuse_lora()
    assert pipe.num_fused_loras == 0 and all(
        torch.equal(dict(pipe.unet.named_parameters())[k], w) for k, w in weights.items()
    )
    pipe.fuse_lora(components=["unet"], lora_scale=0.5)  # the text encoder's stays beside its weights
    half = picture(pipe)
    pipe.unfuse_lora(components=["unet"])
    pipe.set_adapters("cat", {"unet": 0.3, "text_encoder": 0.6})
    assert same(picture(pipe), half)
    pipe.fuse_lora(adapter_names=["toy"])
    pipe.load_lora_weights(folders / "cat", hotswap=True)
    swapped = picture(pipe)
    pipe.unfuse_lora()
    pipe.set_adapters("cat")
    assert same(picture(pipe), swapped)


@pytest.mark.gpu
def test_adapters_rest_on_the_host(pipe):
    pipe.to("cuda")
    drawn = picture(pipe)
    pipe.set_lora_device(["cat", "toy"], "cpu")
    assert {p.device.type for p in dk.adapter_parameters(pipe, "toy")["P"]} == {"cpu"}
    pipe.set_lora_device(["cat", "toy"], "cuda")
    assert torch.equal(picture(pipe), drawn)


@pytest.mark.parametrize("call,error,message", [
    (lambda p: p.set_adapters(["cat", "dog"]), ValueError, "no adapter named 'dog'; the model has cat, toy"),
    (lambda p: p.set_adapters(["cat", "toy"], [1.0]), ValueError, "2 adapter names but 1 weights"),
    (lambda p: p.set_adapters("cat", {"transformer": 1.0}), ValueError, "a weight is for transformer, but the parts with"),
    (lambda p: p.set_adapters("cat", {"unet": {"down": 1.0}}), ValueError, "weights by block are not served"),
    (lambda p: p.set_adapters("cat", float("nan")), ValueError, "the weight for unet is nan, expected a finite number"),
    (lambda p: p.fuse_lora(components=["transformer"]), ValueError, "has no transformer; its parts are unet, text_encoder"),
    (lambda p: p.set_lora_device(["dog"], "cpu"), ValueError, "no adapter named 'dog'"),
    (lambda p: p.load_lora_weights({}), TypeError, "expected a folder, a file or a hub id, not a state dict"),
    (lambda p: p.load_lora_weights(".", proxies={}), TypeError, "unexpected keyword argument 'proxies'"),
    (lambda p: p.unfuse_lora(), RuntimeError, "nothing is merged"),
    (lambda p: [p.set_adapters(["cat", "toy"]), p.save_lora_weights(".")], ValueError, "active adapters are cat, toy: say"),
    (lambda p: p(tiny_pipelines.PROMPT, cross_attention_kwargs={"scale": 0.5}), ValueError, "does not reach these adapters"),
])  # fmt: skip
def test_what_is_refused(pipe, call, error, message):
    with pytest.raises(error, match=message):
        call(pipe)
    assert dk.list_adapters(pipe)["unet"]["toy"] == 1.0 and pipe.num_fused_loras == 0
