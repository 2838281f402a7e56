"""How the CUDA kernels for many tokens share their work out, without a GPU: csrc/cuda/gemm_plan.h,
portable_gemm_plan.h and gemm_walk.h."""

import os
import pathlib
import re
import shutil
import subprocess

import pytest

HERE = pathlib.Path(__file__).parent


def test_every_block_of_k_is_met_once(tmp_path):
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("there is no C++ compiler on the PATH (c++, or what CXX names)")
    program = tmp_path / "walk"
    subprocess.run(
        [compiler, "-std=c++17", "-O1", "-Wall", "-o", program, HERE / "walk_gemm_plans.cc"], check=True
    )
    walked = subprocess.run([program], capture_output=True, text=True)
    assert walked.returncode == 0, walked.stdout
    kinds = re.findall(r"\d+", walked.stdout)
    assert len(kinds) == 6 and "0" not in kinds, walked.stdout
