"""Importers against independent readings: files are made code by code, weights compared bit by bit."""

import re

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jax_trirun
from jax_trirun.checkpoints import (
    CheckpointError,
    from_bitnet,
    from_compressed_tensors,
    from_gguf,
    from_gptq,
    from_hqq,
    from_trilm,
    from_trirun,
    gptq_order,
)

RNG = np.random.default_rng(0)


def dense(qt):
    return np.asarray(jax_trirun.dequantize(qt, dtype=jnp.float32))


def same(qt, wanted, *, group_size=None, zeros=None):
    """The QuantTensor is `wanted` float32 [K, N], bit by bit (0 and -0 being the same weight)."""
    got = dense(qt)
    assert got.shape == wanted.shape == qt.shape
    np.testing.assert_array_equal(got, wanted.astype(np.float32))
    if group_size is not None:
        assert qt.group_size == group_size
    if zeros is not None:
        assert (qt.zeros is not None) == zeros


def int32(values):
    """Python integers of any size -> int32 with the same lowest bits."""
    return np.asarray([[v & 0xFFFFFFFF for v in row] for row in values], np.uint32).view(np.int32)


def refused(function, *arguments, message, **options):
    with pytest.raises(CheckpointError, match=message):
        function(*arguments, **options)


# GPTQ


def gptq_file(codes, zeros, *, version):
    """qweight and qzeros, written with Python integers one code at a time."""
    k, n = codes.shape
    qweight = [
        [sum(int(codes[16 * r + i, c]) << 2 * i for i in range(16)) for c in range(n)] for r in range(k // 16)
    ]
    stored = (zeros - (version == 1)) % 4
    padded = np.pad(stored, ((0, 0), (0, -n % 16)))
    qzeros = [
        [sum(int(row[c + i]) << 2 * i for i in range(16)) for c in range(0, len(row), 16)] for row in padded
    ]
    return int32(qweight), int32(qzeros)


def gptq_layer(k=256, n=24, groups=4, dtype=np.float16):
    codes = RNG.integers(0, 4, (k, n))
    zeros = RNG.integers(0, 4, (groups, n))
    return codes, zeros, RNG.standard_normal((groups, n)).astype(dtype)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("groups", "size"), [(1, -1), (2, 128), (4, 64), (8, 32)])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, ml_dtypes.bfloat16])
def test_gptq(version, groups, size, dtype):
    codes, zeros, scales = gptq_layer(groups=groups, dtype=dtype)
    assert 0 in zeros  # which version 1 stores as 3
    wanted = np.empty(codes.shape, np.float32)
    for k in range(256):
        g = k * groups // 256
        wanted[k] = np.float32(scales[g]) * (codes[k] - zeros[g]).astype(np.float32)
    qt = from_gptq(*gptq_file(codes, zeros, version=version), scales, version=version)
    same(qt, wanted, group_size=size, zeros=True)
    in_order = np.arange(256, dtype=np.int32) * groups // 256
    same(from_gptq(*gptq_file(codes, zeros, version=version), scales, in_order, version=version), wanted)


def test_gptq_long_groups_are_cut_and_symmetric_zeros_left_out():
    codes, _, scales = gptq_layer(k=1024, groups=2)
    ones = np.ones((2, 24), int)
    qt = from_gptq(*gptq_file(codes, ones, version=2), scales, version=2)
    same(qt, np.repeat(np.float32(scales), 512, 0) * (codes - 1), group_size=128, zeros=False)


def test_gptq_act_order():
    codes, zeros, scales = gptq_layer()
    g_idx = RNG.permutation(np.repeat(np.arange(4), 64)).astype(np.int32)
    file = gptq_file(codes, zeros, version=1)
    wanted = np.stack([np.float32(scales[g]) * (codes[k] - zeros[g]) for k, g in enumerate(g_idx)])
    refused(
        from_gptq,
        *file,
        scales,
        g_idx,
        version=1,
        message="act-order scatters .* reorder=True .* requantize=dict",
    )
    qt = from_gptq(*file, scales, g_idx, version=1, reorder=True)
    order = gptq_order(g_idx)
    same(qt, wanted[order], group_size=64)
    x = RNG.standard_normal((3, 256)).astype(np.float32)
    np.testing.assert_allclose(jax_trirun.matmul(x[:, order], qt), x @ wanted, atol=1e-3)
    again = from_gptq(*file, scales, g_idx, version=1, requantize={"group_size": 32})
    assert np.linalg.norm(dense(again) - wanted) < 0.5 * np.linalg.norm(wanted)
    uneven = g_idx.copy()
    uneven[np.flatnonzero(g_idx == 0)[0]] = 1
    refused(
        from_gptq, *file, scales, uneven, version=1, reorder=True, message="groups have 63 to 65 rows each"
    )


def test_gptq_mistakes():
    codes, zeros, scales = gptq_layer()
    qweight, qzeros = gptq_file(codes, zeros, version=1)
    for arguments, options, message in (
        ((qweight, qzeros, scales), {"version": 3}, r"version must be 1 .* or 2 .* got 3"),
        (
            (qweight.astype(np.int64), qzeros, scales),
            {},
            "qweight must be int32 or uint32 with 2 axes, got int64",
        ),
        ((qweight, qzeros[:1], scales), {}, r"qzeros must have shape \(4, 2\), got \(1, 2\)"),
        ((qweight, qzeros, scales[:, :8]), {}, r"scales must have shape \(groups, N=24\), got \(4, 8\)"),
        ((qweight, qzeros, scales.astype(int)), {}, "scales must be float16, bfloat16, float32, got int64"),
        ((qweight, qzeros, scales * np.float16(np.inf)), {}, "scales must be finite"),
        (
            (qweight, qzeros, scales, np.full(256, 4, np.int32)),
            {},
            r"g_idx must be in 0 \.\. 3 .* got 4 \.\. 4",
        ),
        ((qweight, qzeros, scales, np.zeros(9, np.int32)), {}, r"g_idx must have shape \(256,\), got \(9,\)"),
    ):
        refused(from_gptq, *arguments, **{"version": 1, **options}, message=message)
    codes, zeros, scales = gptq_layer(k=256, groups=16)
    refused(
        from_gptq,
        *gptq_file(codes, zeros, version=1),
        scales,
        version=1,
        message="groups of 16 rows.*requantize",
    )


# BitNet


@pytest.mark.parametrize(("linear_class", "divides"), [("bitlinear", True), ("autobitlinear", False)])
@pytest.mark.parametrize("out", [32, 30])
def test_bitnet(linear_class, divides, out):
    values = RNG.integers(-1, 2, (out, 100))
    quarter = -(-out // 4)
    packed = np.zeros((quarter, 100), np.uint8)
    for row in range(out):
        packed[row % quarter] |= (values[row] + 1).astype(np.uint8) << 2 * (row // quarter)
    scale = np.asarray([1.7], ml_dtypes.bfloat16)
    one = np.float32(1) / np.float32(scale[0]) if divides else np.float32(scale[0])
    qt = from_bitnet(packed, scale, linear_class=linear_class, out_features=out)
    same(qt, values.T.astype(np.float32) * one, group_size=-1, zeros=False)


def test_bitnet_mistakes():
    packed, scale = np.zeros((8, 64), np.uint8), np.ones(1, np.float32)
    refused(
        from_bitnet,
        packed,
        scale,
        linear_class="linear",
        message="'bitlinear' or 'autobitlinear', got 'linear'",
    )
    refused(
        from_bitnet, packed.astype(int), scale, linear_class="bitlinear", message="weight_uint8 must be uint8"
    )
    refused(
        from_bitnet, packed, scale * 0, linear_class="bitlinear", message=r"one positive number, got \[0.0\]"
    )
    refused(
        from_bitnet,
        packed,
        scale,
        linear_class="bitlinear",
        out_features=28,
        message=r"in 29 \.\. 32 .* got 28",
    )


# TriLM


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("by", ["outputs", "inputs"])
def test_trilm_with_a_scale_for_each_shard(dtype, by):
    values = RNG.integers(-1, 2, (96, 256))
    scales = np.asarray([0.031, 0.027, 0.044, 0.019], dtype)
    per = np.repeat(scales, 24)[:, None] if by == "outputs" else np.repeat(scales, 64)[None, :]
    w = (values * per.astype(np.float32)).astype(dtype)
    qt = from_trilm(w)
    same(qt, w.astype(np.float32).T, group_size=-1 if by == "outputs" else 64, zeros=False)
    assert qt.scales.dtype == dtype


def test_trilm_with_empty_groups_and_odd_sizes():
    w = np.zeros((5, 70), np.float16)
    w[0, 3] = -0.5
    same(from_trilm(w), w.T, group_size=-1)


def test_trilm_mistakes():
    w = RNG.standard_normal((8, 64)).astype(np.float16)
    refused(from_trilm, w, message="not ternary.* Pass requantize=")
    assert from_trilm(w, requantize={"group_size": 32}).group_size == 32
    refused(from_trilm, w[0], message=r"w must have shape \(out, in\), not empty, got \(64,\)")
    refused(from_trilm, w.astype(np.float64), message="w must be float16, bfloat16, float32, got float64")


# TriRun


def trirun_file(codes, scales):
    """B and s as TriRun's kernel reads them.

    A warp multiplies 16 x 64 codes: lane l holds, of each 16 x 16 tile j, two operands (columns 0-7 and
    8-15) of a tensor-core instruction, each the codes of column l / 4 in rows 2 (l % 4) + 0, 1, 8, 9
    (PTX ISA, matrix fragments for mma.m16n8k16, operand B). Its first word has tiles 0 and 1, its second
    2 and 3; the kernel takes register r of operand o from bits 4 (2 o + r) of both half words, shifted by
    2 for the second tile: row parity is the half word.
    """
    k, n = codes.shape
    B = np.zeros((k // 16, n), np.uint32)
    for tile_k in range(k // 16):
        for run in range(n // 64):
            for lane in range(32):
                for j in range(4):
                    for operand in range(2):
                        for register in range(2):
                            for parity in range(2):
                                row = 16 * tile_k + 2 * (lane % 4) + 8 * register + parity
                                column = 64 * run + 16 * j + 8 * operand + lane // 4
                                shift = 16 * parity + 4 * (2 * operand + register) + 2 * (j % 2)
                                B[tile_k, 64 * run + 2 * lane + j // 2] |= np.uint32(
                                    codes[row, column] << shift
                                )
    s = np.empty_like(scales)
    for column in range(n):
        if len(scales) > 1:  # a lane reads the 8 scales of its columns at once
            place = column // 64 * 64 + column % 8 * 8 + column % 64 // 8
        else:  # of pairs of columns, as the accumulators lie
            place = column // 32 * 32 + column % 8 // 2 * 8 + column % 32 // 8 * 2 + column % 2
        s[:, place] = scales[:, column]
    return B.view(np.int32), s


@pytest.mark.parametrize(("k", "n", "groups"), [(128, 256, 1), (256, 256, 2), (384, 512, 3)])
def test_trirun(k, n, groups):
    codes = RNG.integers(0, 4, (k, n))
    scales = RNG.standard_normal((groups, n)).astype(np.float16)
    qt = from_trirun(*trirun_file(codes, scales))
    same(
        qt, np.repeat(np.float32(scales), k // groups, 0) * (codes - 1), group_size=-1 if groups == 1 else 128
    )


def test_trirun_mistakes():
    B, s = np.zeros((8, 256), np.int32), np.ones((1, 256), np.float16)
    refused(from_trirun, B[:, :100], s, message=r"B must have a multiple of 64 columns, got \(8, 100\)")
    refused(from_trirun, B, s[:, :100], message=r"s must have shape \(groups, N=256\), got \(1, 100\)")
    refused(from_trirun, B.astype(np.float32), s, message="B must be int32 or uint32")
    refused(from_trirun, B, np.ones((3, 256), np.float16), message="K=128 in 3 groups")


# compressed-tensors


def compressed_rows(values):
    """values + 2 [rows, columns] -> int32 [rows, ceil(columns / 16)]."""
    padded = np.pad(values, ((0, 0), (0, -values.shape[1] % 16)), constant_values=-2)
    return int32(
        [
            [sum((int(row[c + i]) + 2) << 2 * i for i in range(16)) for c in range(0, len(row), 16)]
            for row in padded
        ]
    )


@pytest.mark.parametrize("zero_points", [None, "int8", "packed"])
@pytest.mark.parametrize(("k", "groups", "size"), [(256, 2, 128), (256, 8, 32), (100, 1, -1)])
def test_compressed_tensors(zero_points, k, groups, size):
    n = 20
    values = RNG.integers(-2, 2, (n, k))
    scales = RNG.uniform(0.01, 1, (n, groups)).astype(ml_dtypes.bfloat16)
    zeros = RNG.integers(-2, 2, (n, groups)) if zero_points else np.zeros((n, groups), int)
    stored = {
        None: None,
        "int8": zeros.astype(np.int8),
        "packed": np.ascontiguousarray(compressed_rows(zeros.T).T),
    }[zero_points]
    wanted = np.repeat(np.float32(scales), k // groups, 1) * (values - np.repeat(zeros, k // groups, 1))
    qt = from_compressed_tensors(compressed_rows(values), scales, np.asarray([n, k]), stored)
    same(qt, wanted.T.astype(np.float32), group_size=size, zeros=zero_points is not None)
    for g_idx in (np.full(k, -1, np.int32), np.arange(k, dtype=np.int32) * groups // k):
        same(from_compressed_tensors(compressed_rows(values), scales, (n, k), stored, g_idx), wanted.T)


def test_compressed_tensors_mistakes():
    values = RNG.integers(-2, 2, (20, 256))
    packed, scales = compressed_rows(values), np.ones((20, 4), np.float16)
    shuffled = RNG.permutation(np.repeat(np.arange(4), 64)).astype(np.int32)
    for arguments, message in (
        ((packed, scales, (20, 300)), r"weight_packed must have shape \(20, 19\), got \(20, 16\)"),
        ((packed, scales[:3], (20, 256)), r"weight_scale must have shape \(out=20, groups\), got \(3, 4\)"),
        ((packed, scales, (20,)), r"weight_shape must be \(out, in\), got \[20\]"),
        (
            (packed, scales, (20, 256), np.zeros((20, 3), np.int8)),
            r"weight_zero_point must have shape \(20, 4\)",
        ),
        ((packed, scales, (20, 256), None, shuffled), "act-order.* scatters .*requantize"),
        ((packed, scales, (20, 256), None, shuffled + 1), r"weight_g_idx must be in 0 \.\. 3, got 1 \.\. 4"),
    ):
        refused(from_compressed_tensors, *arguments, message=message)
    qt = from_compressed_tensors(packed, scales, (20, 256), None, shuffled, requantize={"group_size": 64})
    np.testing.assert_allclose(dense(qt), values.T, atol=0.75)


# HQQ


def hqq_file(codes):
    """Rows of codes, a multiple of 4, into a quarter of the rows."""
    quarter = len(codes) // 4
    packed = np.zeros((quarter, codes.shape[1]), np.uint8)
    for row in range(len(codes)):
        packed[row % quarter] |= codes[row].astype(np.uint8) << (6 - 2 * (row // quarter))
    return packed


@pytest.mark.parametrize(("given", "size"), [(32, 32), (64, 64), (128, 128), (256, 128), (None, -1)])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_hqq(given, size, dtype):
    out, fan_in = 12, 512
    group = given or fan_in
    codes = RNG.integers(0, 4, (out, fan_in))
    scale = RNG.uniform(0.01, 1, (out * fan_in // group, 1)).astype(dtype)
    zero = RNG.uniform(0, 3, scale.shape).astype(dtype)
    wanted = np.empty((out, fan_in), np.float32)
    for n in range(out):
        for k in range(fan_in):
            g = (n * fan_in + k) // group
            wanted[n, k] = (np.float32(codes[n, k]) - np.float32(zero[g, 0])) * np.float32(scale[g, 0])
    qt = from_hqq(hqq_file(codes.reshape(-1, group)), scale, zero, shape=(out, fan_in), group_size=given)
    same(qt, wanted.T, group_size=size, zeros=True)


def test_hqq_across_outputs_is_requantised_only_when_asked():
    out, fan_in, group = 16, 128, 64
    codes = RNG.integers(0, 4, (group, out * fan_in // group))
    scale, zero = np.ones((1, codes.shape[1]), np.float16), np.ones((1, codes.shape[1]), np.float16)
    file = hqq_file(codes), scale, zero
    refused(
        from_hqq, *file, shape=(out, fan_in), group_size=group, message="axis=0 groups weights across outputs"
    )
    qt = from_hqq(*file, shape=(out, fan_in), group_size=group, requantize={"group_size": 64})
    np.testing.assert_allclose(dense(qt), codes.reshape(out, fan_in).T - 1.0, atol=1e-2)


def test_hqq_mistakes():
    file = np.zeros((32, 16), np.uint8), np.ones((128, 1), np.float16), np.ones((128, 1), np.float16)
    refused(from_hqq, *file, shape=(16, 128), group_size=16, message="groups of 16 rows.*requantize")
    refused(
        from_hqq,
        *file,
        shape=(16, 128),
        group_size=100,
        message="group_size must divide out . in = 2048, got 100",
    )
    refused(
        from_hqq,
        *file,
        shape=(16, 128),
        group_size=64,
        message=r"scale must have shape \(32, 1\), got \(128, 1\)",
    )
    refused(from_hqq, *file, shape=(32, 64), group_size=16, message="groups of 16")
    big = np.zeros((8, 96), np.uint8), np.ones((32, 1), np.float16), np.ones((32, 1), np.float16)
    refused(
        from_hqq, *big, shape=(24, 128), group_size=96, message="does not divide in=128, so that groups cross"
    )


# GGUF


@pytest.mark.parametrize("type", ["TQ1_0", "TQ2_0"])
def test_gguf_ternary(type):
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    w = (RNG.integers(-1, 2, (6, 768)) * RNG.uniform(0.01, 1, (6, 3)).repeat(256, 1)).astype(np.float32)
    kind = gguf.GGMLQuantizationType[type]
    data = gguf.quants.quantize(w, kind)
    qt = from_gguf(data, type, shape=(6, 768))
    same(qt, gguf.quants.dequantize(data, kind).T, group_size=128, zeros=False)
    assert qt.scales.dtype == jnp.float16


def test_gguf_tq2_0_has_a_fourth_level():
    packed = np.zeros(66, np.uint8)
    packed[0] = 0b11_10_01_00  # numbers 0, 32, 64 and 96
    packed[64:] = np.asarray([0.5], np.float16).view(np.uint8)
    w = dense(from_gguf(packed, "TQ2_0", shape=(1, 256)))[:, 0]
    assert w[[0, 32, 64, 96]].tolist() == [-0.5, 0.0, 0.5, 1.0]
    assert (np.delete(w, [0, 32, 64, 96]) == -0.5).all()


def test_gguf_other_types_are_floats():
    data = RNG.standard_normal((5, 64)).astype(np.float16)
    w = from_gguf(data, "F16", shape=(5, 64))
    assert w.dtype == np.float32
    np.testing.assert_array_equal(w, data.astype(np.float32).T)
    refused(
        from_gguf, data, "F16", shape=(5, 65), message=re.escape("shape (5, 65) takes 650 bytes, got 640")
    )
    refused(from_gguf, data, "IQ2_XS", shape=(5, 64), message="type IQ2_XS are not supported")
