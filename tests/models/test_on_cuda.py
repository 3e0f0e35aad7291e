"""Training and decoding steps of every family as they run on a GPU, traced without one: nothing may make the host wait
for it.
"""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from fixtures.trace_on_cuda import CASES, LENGTH, config_of
from mixtura.config.families import never_served
from mixtura.models import MixtureForCausalLM

FIXTURES = Path(__file__).parents[1] / "fixtures"
TORCH = Path(torch.__file__).parent

WAITS = {
    # How many experts a token runs follows from its gates, so only the device knows how many rows there are.
    "remoe": "the host waits for aten.nonzero.default",
    "expert threshold": "the host waits for aten.nonzero.default",
}
"""What cannot be helped, by case: the host asks once a layer and pass."""
IN_FLOAT32 = "the host waits for aten._local_scalar_dense.default"
"""In float32 torch has no grouped product that runs without the rows of every expert on the host."""
SERVED = [case for case, (family, _) in CASES.items() if not never_served([family])]
MIXED_OR_DENSE = ("dense", "dense, gated", "layer mix", "soft", "mixture of tokens")


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """What `trace_on_cuda.py` found, by case and dtype."""
    library = []
    if torch.version.cuda is not None and not torch.cuda.is_available():
        pytest.skip("torch is built with CUDA and sees no GPU: it refuses to trace on one")
    if torch.version.cuda is None:
        compiler = shutil.which("c++")
        if compiler is None:
            pytest.skip("torch is built without CUDA, and there is no C++ compiler to stand in for it")
        library = [tmp_path_factory.mktemp("cuda") / "pretend_cuda.so"]
        build = [compiler, "-std=c++20", "-O0", "-shared", "-fPIC", f"-I{TORCH / 'include'}", f"-L{TORCH / 'lib'}"]
        source = [FIXTURES / "pretend_cuda.cpp", "-o", *library, "-lc10", "-ltorch_cpu"]
        subprocess.run([*build, *map(str, source)], check=True, capture_output=True)
    command = [sys.executable, str(FIXTURES / "trace_on_cuda.py"), *map(str, library)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ})
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_a_step_in_bfloat16_never_waits_for_the_device(traced, case):
    assert traced[f"{case}, bfloat16"]["error"] == WAITS.get(case)


@pytest.mark.parametrize("case", CASES)
def test_a_step_in_float32_waits_only_where_experts_have_rows_to_count(traced, case):
    runs_rows = not case.startswith(MIXED_OR_DENSE) or case.endswith("alone")
    assert traced[f"{case}, float32"]["error"] == (WAITS.get(case, IN_FLOAT32) if runs_rows else None)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("case", SERVED)
def test_a_decoding_step_can_be_captured_as_a_cuda_graph(traced, case, dtype):
    """No number is asked for on the host, and no shape depends on data: a graph can do neither."""
    waits = WAITS | ({"token choice, capacity": IN_FLOAT32} if dtype == "float32" else {})
    assert traced[f"{case}, {dtype}, decoding"]["error"] == waits.get(case)


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith(("token choice", "expert choice"))])
def test_rows_are_multiplied_by_the_grouped_product(traced, case):
    ran = traced[f"{case}, bfloat16"]["ran"]
    wanted = "mixtura.grouped_ffn.default" if find_spec("triton") else "aten._grouped_mm.default"
    assert wanted in ran


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_groups_are_mixed_and_spread_by_the_kernels(traced):
    ran = traced["mixture of tokens, bfloat16"]["ran"]
    for name in ("mix_groups", "mix_groups_backward", "spread_groups", "spread_groups_backward"):
        assert f"mixtura.{name}.default" in ran


# Dynamo makes an instance of a custom autograd function, which torch itself warns of.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("case", CASES)
def test_a_whole_training_step_is_one_graph(case):
    """torch.compile with fullgraph: the loss with the router losses in it, its gradients, and the same numbers."""
    torch._dynamo.reset()  # each case compiles anew, and only so many versions of one function are allowed
    family, settings = CASES[case]
    config = config_of(family, settings)
    torch.manual_seed(0)
    model = MixtureForCausalLM(config).train()
    model.prepare_step(0, steps=2)
    ids_BL = torch.randint(64, (4, LENGTH))

    def loss_of(ids_BL):
        return model(ids_BL, labels=ids_BL, use_cache=False).loss

    gradients = []
    for run in (loss_of, torch.compile(loss_of, fullgraph=True, backend="aot_eager", dynamic=False)):
        model.zero_grad()
        torch.manual_seed(1)
        run(ids_BL).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, eager in gradients[0].items() if "half" not in case else ():  # which half is drawn differs
        torch.testing.assert_close(gradients[1][name], eager, rtol=1e-4, atol=1e-6)
