"""csrc's CUDA kernels: their own code played by the CPU under sanitizers, compiled for every architecture, and on a GPU."""

import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch

import deft_kernels as dk
from deft_kernels import reference
from deft_kernels.ops._dispatch import _kernels

ROOT = Path(__file__).parents[2]
deft = torch.ops.deft_kernels


# Played by the CPU (tests/csrc/on_cpu.h): a thread of the system for each thread of a block ------------------------------


@pytest.fixture(scope="session", params=["thread", "address,undefined"])
def played(request, tmp_path_factory):
    """The kernels as a program, in which a missing barrier is a data race and a wrong address is caught."""
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler here")
    folder = tmp_path_factory.mktemp("played")
    sanitizer = [f"-fsanitize={request.param}", "-fno-sanitize-recover=all"]
    command = ["c++", "-std=c++20", "-O2", "-g", *sanitizer, "-I", ROOT / "tests/csrc", ROOT / "tests/csrc/cuda_on_cpu.cpp"]
    subprocess.run([*command, "-o", folder / "program"], check=True)

    def run(
        operation: str, rank: int, blocks: int, rows_shared: int, layers: list[tuple], dtype: torch.dtype
    ) -> torch.Tensor:
        """`layers`: (m, n, r, has K, has R) and the matrices of each."""
        parts = [struct.pack("4i", rank, blocks, rows_shared, len(layers))]
        parts += [struct.pack("5i", *sizes) for sizes, _ in layers]
        parts += [bytes(t.contiguous().view(torch.uint8).numpy()) for _, tensors in layers for t in tensors]
        (folder / "in").write_bytes(b"".join(parts))
        done = subprocess.run(
            [folder / "program", operation, folder / "in", folder / "out"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[:3000]
        return torch.frombuffer(bytearray((folder / "out").read_bytes()), dtype=dtype)

    return run


@pytest.mark.parametrize(
    "rank,blocks,rows_shared,shapes",
    [
        (16, 1, 200, [(200, 16), (37, 5), (16, 16), (1, 1)]),
        (16, 2, 60, [(113, 9), (3, 2)]),
        (16, 4, 0, [(100, 16), (5, 3)]),  # rows that stay in Q, and blocks without any
        (32, 2, 40, [(70, 32), (80, 20)]),
        (64, 1, 70, [(70, 40)]),
        (128, 2, 0, [(150, 100)]),
    ],
)
def test_orthonormalize_played(played, rank, blocks, rows_shared, shapes):
    P = [torch.randn(m, r) * 10.0 ** (i - 1) for i, (m, r) in enumerate(shapes)]
    out = played(
        "orthonormalize", rank, blocks, rows_shared, [((m, 0, r, 0, 0), [p]) for (m, r), p in zip(shapes, P)], torch.float32
    )
    for p, q in zip(P, out.split([p.numel() for p in P])):
        q = q.view(p.shape)
        (truth,), (plain,) = reference.orthonormalize([p.double()]), reference.orthonormalize([p])
        assert (q - truth).norm() <= 2 * (plain - truth).norm() + 3e-7 * truth.norm()  # signs included
        assert (q.double().T @ q.double() - torch.eye(q.shape[1])).norm() <= 1e-5


def test_orthonormalize_of_anything_played(played):
    P = [
        torch.zeros(30, 4),
        torch.randn(60, 2).repeat(1, 6),
        torch.eye(40)[:, :7],
        torch.full((1, 1), -2.0),
        torch.randn(50, 8),
    ]
    P[-1] *= torch.tensor([1e-30, 1e30, 1, 1e-3, 1e10, 1e-12, 0, 1])
    out = played("orthonormalize", 16, 2, 30, [((*p.shape[:1], 0, p.shape[1], 0, 0), [p]) for p in P], torch.float32)
    for p, q in zip(P, out.split([p.numel() for p in P])):
        q = q.view(p.shape).double()
        assert (q.T @ q - torch.eye(q.shape[1])).norm() <= 1e-5
        torch.testing.assert_close(q @ (q.T @ p.double()), p.double(), rtol=1e-4, atol=2e-5 * p.abs().max().item())


@pytest.mark.parametrize(
    "rank,blocks,shapes",
    [
        (16, 1, [(300, 40, 5, 1, 1), (33, 32, 16, 1, 0), (64, 8, 3, 0, 1), (1, 8, 1, 1, 1)]),
        (16, 2, [(200, 72, 16, 1, 1), (5, 16, 2, 1, 1)]),  # the second leaves a block without rows
        (32, 3, [(120, 64, 20, 1, 1)]),
        (64, 1, [(48, 32, 64, 1, 1)]),
    ],
)
def test_merge_played(played, rank, blocks, shapes):
    """Out of place, and every other layer in place."""
    layers = []
    for m, n, r, has_K, has_R in shapes:
        W, B = torch.randn(m, n).bfloat16(), torch.randn(m, r) / m**0.5
        layers.append([W, B, torch.randn(m, r) / m**0.5 if has_K else None, torch.randn(r, n) if has_R else None])
    given = [(sizes, [t for t in layer if t is not None]) for sizes, layer in zip(shapes, layers)]
    out = played("merge", rank, blocks, 0, given, torch.bfloat16)
    for (W, *factors), merged in zip(layers, out.split([layer[0].numel() for layer in layers])):
        doubles = [[None if t is None else t.double()] for t in factors]
        (truth,), (plain,) = reference.merge([W.double()], *doubles), reference.merge([W], *([t] for t in factors))
        merged = merged.view(W.shape).double()
        assert (merged - truth).norm() <= 1.01 * (plain.double() - truth).norm()
        assert (merged != truth.bfloat16().double()).float().mean() <= 0.002  # rounded once, but for what float32 rounds


# Compiled ------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc here")
def test_the_kernels_compile_for_every_architecture_without_spills(record_property, tmp_path):
    archs = {"80": 163 << 10, "90a": 227 << 10, "100a": 227 << 10}  # and the shared memory that a block may have
    options = "-std=c++20 -O3 -Xptxas -v --expt-relaxed-constexpr -DTORCH_TARGET_VERSION=0x020b000000000000".split()
    command = ["nvcc", *options, "-isystem", Path(torch.__file__).parent / "include", "-c", "csrc/cuda/library.cu"]
    command += [*(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs), "-o", tmp_path / "library.o"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    entry = r"entry function '\S*?((?:orthonormalize|merge)_kernel)ILi(\d+)E\S*' for 'sm_(\w+)'\n"
    usage = r".*?(\d+) bytes spill stores, (\d+) bytes spill loads\n.*?Used (\d+) registers"
    rows = re.findall(entry + usage, run.stderr, re.DOTALL)
    shared = dict(
        re.findall(
            r"(\w+ \d+) (\d+)", subprocess.run([sizes_of(tmp_path)], capture_output=True, text=True, check=True).stdout
        )
    )
    table = ["kernel                  rank  arch   registers  spills  shared memory beside rows of P or W"]
    for name, rank, arch, stores, _, registers in rows:
        table.append(f"{name:<24}{rank:<6}{arch:<7}{registers:<11}{stores:<8}{shared[f'{name} {rank}']}")
    record_property("table", "\n".join(table))
    assert len(rows) == 7 * len(archs) and {arch for _, _, arch, *_ in rows} == set(archs)
    assert not [row for row in rows if row[3] != "0" or row[4] != "0"]
    for name, rank, arch, _, _, registers in rows:
        assert int(registers) <= 65536 // (512 if name.startswith("orthonormalize") else 256)
        too_much = int(shared[f"{name} {rank}"]) > archs[arch]
        assert too_much == (arch == "80" and (name, rank) == ("orthonormalize_kernel", "128"))  # refused there


def sizes_of(folder: Path) -> Path:
    """A program that prints the kernels' shared memory."""
    (folder / "sizes.cpp").write_text(
        '#include <cstdio>\n#include "merge.h"\n#include "orthonormalize.h"\nusing namespace deft;\nint main() {\n'
        + "".join(
            f'std::printf("orthonormalize_kernel {r} %zu\\n", sizeof(QrShared<{r}, 512>));\n' for r in (16, 32, 64, 128)
        )
        + "".join(
            f'std::printf("merge_kernel {r} %zu\\n", sizeof(MergeShared<{r}, {t}>));\n'
            for r, t in ((16, 256), (32, 256), (64, 128))
        )
        + "}\n"
    )
    include = ["-I", ROOT / "csrc/cuda", "-I", ROOT / "tests/csrc"]
    subprocess.run(["c++", "-std=c++20", *include, folder / "sizes.cpp", "-o", folder / "sizes"], check=True)
    return folder / "sizes"


def test_where_they_do_not_serve_is_said(monkeypatch):
    row = dk.backends()["orthonormalize"]
    if torch.cuda.is_available():
        assert row["cuda"].startswith(("serves only where it is forced", "built without"))
    else:
        assert row["cuda"].startswith("no GPU")
    monkeypatch.setenv("DEFT_KERNELS_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match="cuda cannot serve deft_kernels::(orthonormalize|project)"):
        (
            deft.orthonormalize([torch.randn(3, 2)]),
            deft.project([torch.randn(3, 2)], [torch.randn(3, 2)], [None], *torch.ones(2, 1)),
        )


# On a GPU -------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("r", [1, 8, 16, 33, 64, 128])
def test_orthonormalize_on_a_gpu(monkeypatch, r):
    monkeypatch.setenv("DEFT_KERNELS_BACKEND", "cuda")
    P = [torch.randn(m, r, device="cuda") for m in (r, 640, 1280, 20480, r + 3)]
    for p, q, again in zip(P, deft.orthonormalize(P), deft.orthonormalize(P)):
        truth, plain = torch.linalg.qr(p.double()).Q, torch.linalg.qr(p).Q
        assert (q - truth).norm() <= 2 * (plain - truth).norm() + 1e-6 * truth.norm()
        assert (q.double().T @ q.double() - torch.eye(r, device="cuda")).norm() <= 1e-5
        assert torch.equal(q, again)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(12288, 3072), (15360, 3072), (1280, 1280), (37, 40)])
@pytest.mark.parametrize("r", [4, 16, 64])
def test_merge_on_a_gpu(monkeypatch, shape, r):
    monkeypatch.setenv("DEFT_KERNELS_BACKEND", "cuda")
    (m, n), randn = shape, lambda *s: torch.randn(*s, device="cuda")
    W, B, K, R = randn(m, n).bfloat16(), randn(m, r) / m**0.5, randn(m, r) / m**0.5, randn(r, n)
    (truth,) = reference.merge([W.double()], [B.double()], [K.double()], [R.double()])
    (plain,) = reference.merge([W], [B], [K], [R])
    (merged,) = deft.merge([W], [B], [K], [R])
    assert (merged.double() - truth).norm() <= 1.01 * (plain.double() - truth).norm()
    deft.merge_into([W], [W], [B], [K], [R])
    assert torch.equal(W, merged)


@pytest.mark.gpu
def test_a_graph_of_them_replays(monkeypatch):
    monkeypatch.setenv("DEFT_KERNELS_BACKEND", "cuda")
    P = [torch.randn(640, 8, device="cuda") for _ in range(3)]
    deft.orthonormalize(P)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        Q = deft.orthonormalize(P)
    P[1].normal_()
    graph.replay()
    assert torch.equal(Q[1], _kernels["orthonormalize"]["cuda"][0](P)[1])
