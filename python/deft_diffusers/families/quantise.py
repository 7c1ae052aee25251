"""A loaded model's linear layers in 4 or 8 bits, on a CPU or a GPU. (diffusers' own loader of bitsandbytes wants a GPU.)"""

from torch import nn

from deft_kernels.nn.quantised import quantised

from .. import UserError

LIBRARIES = {"nf4": "bitsandbytes", "fp4": "bitsandbytes", "int8": "torchao"}


def quantise(model, kind, dtype):
    """Packs the weight of every linear layer of `model`, on the CPU, to compute with in `dtype`.

    nf4 and fp4 are QLoRA's (arXiv 2305.14314) with double quantisation, by bitsandbytes, which packs a weight as it moves to
    a device: call `model.to(device)` first of all. int8 is torchao's, with a scale for each row: unlike bitsandbytes' it
    leaves the layer's inputs as they are. UserError without the library, and for a model with nothing left to quantise.
    """
    # T5 asks for the type of these weights, and the output layer shares the embedding's.
    kept = {*(getattr(model, "_keep_in_fp32_modules", None) or ()), "lm_head"}
    found = {
        name: layer
        for name, layer in model.named_modules()
        if type(layer) is nn.Linear and quantised(layer) is None and not kept & set(name.split("."))
    }
    if not found:
        raise UserError(f"--quantize {kind}: {type(model).__name__} has no linear layer that is not quantised already")
    try:
        if kind == "int8":
            from torchao.quantization import Int8WeightOnlyConfig, quantize_

            quantize_(model, Int8WeightOnlyConfig(), lambda layer, name: name in found)
            return
        import bitsandbytes as bnb
    except ImportError as error:
        library = LIBRARIES[kind]
        raise UserError(f"--quantize {kind} needs {library}: pip install {library} ({error})") from error
    for name, layer in found.items():
        size = layer.in_features, layer.out_features, layer.bias is not None
        packed = bnb.nn.Linear4bit(*size, compute_dtype=dtype, quant_type=kind, device="meta")
        packed.weight = bnb.nn.Params4bit(layer.weight.detach(), requires_grad=False, quant_type=kind, module=packed)
        packed.bias = layer.bias
        model.set_submodule(name, packed.train(layer.training))
