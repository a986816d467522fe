"""The kernels of training compile for a Hopper GPU where there is none: the interpreter takes what compilers refuse."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

PROGRAM = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from llmasos.train.kernels.adamw8bit import _adamw8bit
from llmasos.train.kernels.cross_entropy import _cross_entropy
from llmasos.train.kernels.divergence import _divergence

POINTERS = {"logits": "*bf16", "ours": "*bf16", "theirs": "*bf16", "labels": "*i64"}
POINTERS |= dict.fromkeys(("losses", "entropies", "divergences"), "*fp32")
POINTERS |= dict.fromkeys(("weights", "gradients", "mean_scales", "root_scales"), "*fp32")
POINTERS |= dict.fromkeys(("mean_codes", "root_codes"), "*u8")
WHOLE = ("stride", "our_stride", "their_stride", "size", "shared", "count", "num_blocks")

def compiled(kernel, constants):
    types = {n: POINTERS.get(n, "i32" if n in WHOLE else "fp32") for n in kernel.arg_names}
    types |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, types, {(kernel.arg_names.index(n),): value for n, value in constants.items()}, {})
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8}).asm["cubin"]

compiled(_adamw8bit, {"ROWS": 4, "SIZE": 256})
compiled(_cross_entropy, {"CAPPED": True, "GRADIENT": True, "BLOCK": 4096})
for kind in range(3):
    compiled(_divergence, {"KIND": kind, "OURS_CAPPED": False, "THEIRS_CAPPED": True, "GRADIENT": True, "BLOCK": 2048})
"""


def test_they_compile() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
