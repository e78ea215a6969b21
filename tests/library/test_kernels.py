"""The Triton kernel against the PyTorch form; without a GPU under Triton's interpreter."""

import os
import subprocess
import sys

import pytest
import torch

from llava_hivtp.importance import column_means_in_pytorch

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
SHAPES = [  # (T, H, 1 + N, Dh)
    (1, 1, 1, 16),  # CLS alone
    (2, 3, 65, 8),  # narrower than a tensor core takes, one row in the last block
    (1, 2, 64, 16),  # exactly one block
    (3, 1, 130, 80),  # a width that is no power of two
    (1, 1, 577, 64),  # a head of ViT-L/14-336
]


@pytest.fixture(scope="module")
def column_means():
    pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    from llava_hivtp.kernels import column_means

    return column_means


def projected(shape, dtype=torch.float32, seed=0, scale=2.0):
    """Queries and keys as the tap records them: (T, H, 1 + N, Dh) views of (T, 1 + N, H * Dh)."""
    tiles, heads, length, width = shape
    generator = torch.Generator().manual_seed(seed)
    for _ in range(2):
        flat = scale * torch.randn(tiles, length, heads * width, generator=generator)
        yield flat.to(dtype).unflatten(-1, (heads, -1)).transpose(1, 2).to(DEVICE)


def reference(queries, keys):
    return column_means_in_pytorch(queries.cpu(), keys.cpu())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_equals_the_pytorch_form(column_means, shape):
    queries, keys = projected(shape)
    torch.testing.assert_close(
        column_means(queries, keys).cpu(), reference(queries, keys), rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float16,
        pytest.param(
            torch.bfloat16,
            marks=pytest.mark.skipif(not ON_GPU, reason="Triton's interpreter has no bfloat16 dot"),
        ),
    ],
)
def test_half_precision_inputs_are_summed_in_float32(column_means, dtype):
    queries, keys = projected((2, 2, 65, 16), dtype)
    means = column_means(queries, keys).cpu()
    assert means.dtype == torch.float32
    torch.testing.assert_close(means, reference(queries, keys), rtol=1e-5, atol=1e-7)


def test_large_logits_do_not_overflow(column_means):
    queries, keys = projected((1, 1, 65, 16), scale=40.0)
    # Float32 rounds logits of some thousands to 5e-4, each library in its own order.
    torch.testing.assert_close(
        column_means(queries, keys).cpu(), reference(queries, keys), rtol=1e-3, atol=1e-6
    )


def test_a_tile_is_the_same_alone_to_the_bit(column_means):
    queries, keys = projected((3, 2, 65, 16))
    together = column_means(queries, keys)
    for tile in range(3):
        alone = column_means(queries[tile : tile + 1], keys[tile : tile + 1])
        assert torch.equal(alone, together[tile : tile + 1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [0, 1], ids=["queries", "keys"])
def test_nan_shows_in_its_own_tile_only(column_means, bad, which):
    tensors = list(projected((3, 2, 65, 16)))
    tensors[which][1, 0, 7, 3] = bad
    assert torch.isnan(column_means(*tensors)).any(1).tolist() == [False, True, False]


COMPILE = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from llava_hivtp import kernels

SIZES = dict(scale="fp32", PADDED="constexpr", BLOCK="constexpr")
for kernel, half, full in (
    (kernels._row_log_sums, ["queries", "keys"], ["log_sums"]),
    (kernels._column_sums, ["queries", "keys"], ["log_sums", "sums"]),
    (kernels._mean_over_heads, [], ["sums", "means"]),
):
    types = dict.fromkeys(half, "*" + sys.argv[2]) | dict.fromkeys(full, "*fp32") | SIZES
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    constants = {name: 64 for name in ("PADDED", "BLOCK") if name in signature}
    source = ASTSource(kernel, signature, constexprs=constants)
    made = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32))
    assert made.asm["cubin"]
    print(made.metadata.shared)
"""


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("capability", [80, 86, 90])  # A100, A40, H100 and H200
def test_the_kernels_compile_for_gpus_that_are_not_here(column_means, capability, dtype, tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(capability), dtype],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    shared = [int(line) for line in done.stdout.split()]
    assert len(shared) == 3
    assert max(shared) <= 48 * 1024  # what every GPU gives without being asked for more


def test_without_a_gpu_triton_is_never_imported():
    program = (
        "import sys, torch; from llava_hivtp.importance import column_means;"
        "column_means(torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4));"
        "sys.exit('triton' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
