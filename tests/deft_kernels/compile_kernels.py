"""Compile every Triton kernel for every architecture, with no GPU: `python tests/deft_kernels/compile_kernels.py --help`.

One line per kernel, type, configuration and architecture: registers, spills, shared memory, matrix instructions. As a
process of its own, because TRITON_INTERPRET is read when a kernel is defined.
"""

import argparse
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from deft_kernels.triton import launch, lowrank_linear, merge, orthonormalize, project

# name: (arguments of triton.compile, bytes of shared memory that a program may use)
ARCHITECTURES = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 << 10),
    "sm_89": (GPUTarget("cuda", 89, 32), 99 << 10),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 << 10),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 << 10),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 << 10),
}
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
COLUMNS = (
    "kernel",
    "type",
    "rank",
    "access",
    "setting",
    "arch",
    "registers",
    "spills",
    "shared",
    "matrix",
    "copies",
    "error",
)

# kernel: (function, the configuration's name, types, its arguments' types where T is the operands')
TABLE = {"table": "*i64", "jobs": "*i64"}
SIZES = dict.fromkeys(("rows", "width", "columns", "r", "m", "n", "m_tiles", "part", "parts"), "i32")
STRIDES = dict.fromkeys(
    "left_row left_column d_row d_rank e_rank e_column out_row m_row m_column dy_row dy_column x_row x_column".split(), "i32"
)
OPERANDS = dict.fromkeys(("left", "matrix", "bias", "d", "e", "out", "h", "dy", "x", "dh", "db", "da"), "*T")
PLAIN = {**SIZES, **STRIDES, **OPERANDS, "partial": "*fp32"}
KERNELS = {
    "orthonormalize": (orthonormalize.orthonormalize_kernel, "orthonormalize", ("fp32",), TABLE),
    "orthonormalize_backward": (orthonormalize.orthonormalize_backward_kernel, "orthonormalize_backward", ("fp32",), TABLE),
    "project": (project.project_kernel, "project", TYPES, {**TABLE, "injection": "*fp32", "removal": "*fp32"}),
    "project_backward": (
        project.project_backward_kernel, "project_backward", TYPES, {**TABLE, "injection": "*fp32", "removal": "*fp32"},
    ),
    "merge": (merge.merge_kernel, "merge", TYPES, TABLE),
    "lowrank_linear expand": (lowrank_linear.expand_kernel, "lowrank_linear expand", TYPES, PLAIN),
    "lowrank_linear fused y": (lowrank_linear.fused_kernel, "lowrank_linear fused", TYPES, PLAIN),
    "lowrank_linear fused dx": (lowrank_linear.fused_kernel, "lowrank_linear fused", TYPES, PLAIN),
    "lowrank_linear thin": (lowrank_linear.thin_kernel, "lowrank_linear thin", TYPES, PLAIN),
    "lowrank_linear thin sum": (lowrank_linear.thin_sum_kernel, "lowrank_linear thin", TYPES, PLAIN),
}  # fmt: skip
ALWAYS_EXACT = ("orthonormalize", "orthonormalize_backward")
MODULES = {"orthonormalize": orthonormalize, "orthonormalize_backward": orthonormalize, "project": project,
           "project_backward": project, "merge": merge}  # fmt: skip


def compile_one(name: str, dtype: str, rank: int, access: str, setting: str, arch: str, config: dict) -> dict:
    """Compile one variant; what `COLUMNS` names."""
    function, _, _, types = KERNELS[name]
    target, limit = ARCHITECTURES[arch]
    config, options = dict(config), {}
    options["num_warps"], options["num_stages"] = config.pop("num_warps"), config.pop("num_stages")
    vectors, hip = access == "vectors", target.backend == "hip"
    pieces = 3 if setting == "exact" else 2 if dtype == "bf16" else 1
    if hip:
        options["num_stages"] = min(options["num_stages"], 2)
    constants = {
        "DTYPE": {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}[dtype], "RANK": rank, "ALIGNED": vectors,
        "FIELDS": getattr(MODULES.get(name), "FIELDS", None), "PIECES": pieces,
        "PRECISION": "ieee" if hip else "tf32x3" if setting == "exact" else "tf32", "GROUP": lowrank_linear.GROUP,
        "DESCRIPTORS": access != "scattered" and not hip and target.arch >= 90, "M_BY_COLUMN": name.endswith("y"), **config,
    }  # fmt: skip
    if name.startswith("lowrank_linear"):  # strides that a launch finds to be 1, and a bias that is None
        ones = {"left_column", "dy_column", "x_column"}
        ones |= {"m_row", "d_row", "e_rank"} if name.endswith("y") else {"m_column", "d_rank", "e_column"}
        constants |= dict.fromkeys(ones, 1) if access != "scattered" else {}
        constants |= {"bias": None} if name.endswith("dx") else {}
    types = {k: v.replace("T", dtype) for k, v in types.items() if k not in constants}
    if constants["DESCRIPTORS"] and "fused" in name:
        block = (config["BN"], config["BK"]) if constants["M_BY_COLUMN"] else (config["BK"], config["BN"])
        types |= {"left": f"tensordesc<{dtype}[{config['BM']}, {config['BK']}]>"}
        types |= {"matrix": f"tensordesc<{dtype}[{block[0]}, {block[1]}]>"}
    names = function.arg_names
    multiples = {*STRIDES, "columns", "n", "width", "m"} if vectors else set()
    divisible = {i: types.get(n, "").startswith("*") or n in multiples & set(types) for i, n in enumerate(names)}
    source = ASTSource(
        fn=function,
        signature={n: types.get(n, "constexpr") for n in names},
        constexprs={(names.index(k),): v for k, v in constants.items() if k in names},
        attrs={(i,): [["tt.divisibility", 16]] for i, yes in divisible.items() if yes},
    )
    result = {"kernel": name, "type": dtype, "rank": rank, "access": access, "setting": setting, "arch": arch}
    compiled = triton.compile(source, target=target, options=options)
    result |= {"shared": compiled.metadata.shared, "config": config | options}
    if hip:
        text = compiled.asm["amdgcn"]
        result |= {"registers": int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])}
        result |= {"spills": int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text)[1])}
        result |= {"matrix": f"mfma {text.count('v_mfma')}", "copies": ""}
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
        ptx = compiled.asm["ptx"]
        counts = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma": "mma.sync"}
        matrix = " ".join(f"{k} {ptx.count(v)}" for k, v in counts.items() if v in ptx)
        tma, wide = ptx.count("cp.async.bulk.tensor"), len(re.findall(r"cp\.async\.cg\S*[^;]*0x10", ptx))
        result |= {"registers": int(registers), "spills": int(stack), "matrix": matrix}
        result |= {"copies": " ".join(f"{k} {v}" for k, v in (("tma", tma), ("16 B", wide)) if v)}
    if result["shared"] > limit:
        result["error"] = f"{result['shared']} bytes of shared memory, {arch} has {limit}"
    return result


def variants(kernels, ranks, architectures):
    """Every kernel x type x configuration x way of access, for every architecture; for sm_90 under torch's TF32 setting
    too, and with descriptors of matrices that loads could not take in vectors."""
    for file in sorted(launch.CONFIGS.glob("*.json")):
        tables = json.loads(file.read_text())["kernels"]
        for name in kernels:
            _, table, types, _ = KERNELS[name]
            for key, config in tables.get(table, {}).items():
                kind, rank, *scattered = key.split()
                if int(rank) not in ranks:
                    continue
                both = not scattered and f"{key} scattered" not in tables[table]
                for dtype in (t for t in types if (t == "fp32") == (kind == "float32")):
                    ways = ["vectors", "scattered"] if both else ["scattered" if scattered else "vectors"]
                    for arch in architectures:
                        variant = (name, dtype, int(rank))
                        yield from ((*variant, access, "exact", arch, config) for access in ways)
                        if arch == "sm_90" and table not in ALWAYS_EXACT:
                            yield from ((*variant, access, "tf32", arch, config) for access in ways)
                        if arch == "sm_90" and "fused" in name and "scattered" in ways:
                            yield (*variant, "descriptors", "exact", arch, config)


def compile_all(kernels=KERNELS, ranks=(16, 32, 64, 128), architectures=ARCHITECTURES, jobs=2) -> list[dict]:
    with ProcessPoolExecutor(jobs) as pool:
        return list(pool.map(_guarded, variants(kernels, ranks, architectures), chunksize=4))


def _guarded(variant) -> dict:
    try:
        return compile_one(*variant)
    except Exception as error:
        return dict(zip(COLUMNS, variant)) | {"error": f"{type(error).__name__}: {error}"}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    words = functools.partial(str.split, sep=",")
    parser.add_argument("--kernels", type=words, default=list(KERNELS), help="names, comma-separated")
    parser.add_argument("--architectures", type=words, default=list(ARCHITECTURES))
    parser.add_argument("--ranks", type=lambda s: [int(r) for r in s.split(",")], default=[16, 32, 64, 128])
    parser.add_argument("--json", type=Path, help="write the table here too")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    rows = compile_all(options.kernels, options.ranks, options.architectures, options.jobs)
    for row in rows:
        print("  ".join(f"{row.get(column, '')!s:<9}" for column in COLUMNS).rstrip())
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
