"""Every Triton kernel becomes machine code for the accelerators it is meant for; that needs no accelerator."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

if find_spec("triton") is None:
    pytest.skip("triton is not installed: pip install triton", allow_module_level=True)

PROGRAM = """
import sys, warnings
warnings.simplefilter("ignore")
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from mixtura.kernels import triton_mixing as mixing, triton_sparse as sparse

def build(kernel, types, warps=4, **constants):
    kind = lambda name: types.get(name, types["rest"] if name.endswith("_ptr") else "i32")
    signature = {name: "constexpr" if name in constants else kind(name) for name in kernel.arg_names}
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    target = GPUTarget("cuda", int(sys.argv[1]), 32)
    built = triton.compile(ASTSource(kernel, signature, values), target=target, options={"num_warps": warps})
    print(kernel.__name__, built.metadata.shared, len(built.asm["cubin"]))

narrow = dict(rest="*bf16", logits_ptr="*fp32", lse_ptr="*fp32", grad_ptr="*fp32")
for types, group, columns in ((narrow, 32, 64), (narrow, 256, 64), (narrow | {"rest": "*fp32"}, 128, 32)):
    blocks = dict(BLOCK_G=group, BLOCK_S=32, BLOCK_D=columns, warps=8 if group > 64 else 4)
    for known in (False, True):
        build(mixing._mix_kernel, types, LSE_KNOWN=known, **blocks)
    build(mixing._spread_kernel, types, **blocks)
    build(mixing._grad_logits_kernel, types, **blocks)
build(sparse._count_kernel, {"rest": "*i64"}, BLOCK=sparse.BLOCK_ROWS, BLOCK_E=sparse.BLOCK_EXPERTS)
build(sparse._place_kernel, {"rest": "*i64"}, BLOCK=sparse.BLOCK_ROWS)
rows = dict(rest="*bf16", weight_ptr="*fp32", grad_weight_ptr="*fp32", row_ptr="*i64", rows_ptr="*i64")
rows["start_ptr"] = "*i32"
kinds = [("relu", True, rows), ("gelu", True, rows), ("gelu_tanh", True, rows), ("silu", True, rows)]
for kind, gated, types in [*kinds, ("relu", False, rows), ("silu", True, rows | {"rest": "*fp16"})]:
    constants = dict(KIND=kind, GATED=gated, ROWS=sparse.BLOCK_R, COLUMNS=256)
    build(sparse._activate_kernel, types, **constants)
    build(sparse._activate_backward_kernel, types, **constants)
build(sparse._sum_rows_kernel, rows, BLOCK_D=1024)
build(sparse._clear_unused_kernel, rows, SPAN=sparse.CLEARED, BLOCK=1024)
written = [name for module in (mixing, sparse) for name in vars(module) if name.endswith("_kernel")]
print("written", *written)
"""
SHARED_BYTES = 99 << 10
"""What a program may use on the smallest of these: compute capability 8.9."""


@pytest.mark.parametrize("capability", ["90", *(pytest.param(each, marks=pytest.mark.slow) for each in ("80", "89"))])
def test_every_kernel_compiles_within_the_shared_memory(capability, tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", PROGRAM, capability]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, run.stderr
    *built, written = (line.split() for line in run.stdout.splitlines())
    assert written[0] == "written" and {name for name, *_ in built} == set(written[1:])
    for name, shared, machine_code in built:
        assert int(shared) <= SHARED_BYTES and int(machine_code) > 0, name
