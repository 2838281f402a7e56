"""How the CUDA kernels for many tokens share their work out, without a GPU: csrc/cuda/choice.h, gemm_plan.h,
portable_gemm_plan.h and gemm_walk.h."""

import os
import pathlib
import re
import runpy
import shutil
import subprocess

import pytest

HERE = pathlib.Path(__file__).parent


def compiled(source, folder):
    """The program of a source file beside this one."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("there is no C++ compiler on the PATH (c++, or what CXX names)")
    program = folder / "program"
    subprocess.run([compiler, "-std=c++17", "-O1", "-Wall", "-o", program, HERE / source], check=True)
    return program


def test_sizes_are_shared_out_in_the_ways_that_the_gpu_tests_want(tmp_path):
    tests = runpy.run_path(str(HERE / "test_cuda_gemm.py"))
    cases = [(case, 0) for case in tests["SHARES"]] + [(case, 1) for case in tests["PORTABLE_SHARES"]]
    lines = [
        f"{m} {k} {n} {k // 128} {int(not scale_dtype)} {int(zeros)} {portable}"
        for (m, k, n, scale_dtype, zeros, _), portable in cases
    ]
    program = compiled("describe_products.cc", tmp_path)
    said = subprocess.run([program], input="\n".join(lines), capture_output=True, text=True, check=True)
    for (case, _), line in zip(cases, said.stdout.splitlines(), strict=True):
        assert case[-1] in line, case


def test_every_block_of_k_is_met_once(tmp_path):
    program = compiled("walk_gemm_plans.cc", tmp_path)
    walked = subprocess.run([program], capture_output=True, text=True)
    assert walked.returncode == 0, walked.stdout
    kinds = re.findall(r"\d+", walked.stdout)
    assert len(kinds) == 6 and "0" not in kinds, walked.stdout
