"""exp, log and max of float32 in forms that numba's compiler vectorises, and the switches of its kernels."""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from .sinkhorn_kernels import SMALLEST

F = np.float32
jit = njit(fastmath=True, nogil=True, cache=True, error_model="numpy")  # the callers keep inf and NaN out
# for what other kernels call. Inlined by force: else a process that compiles them and one that loads them from the
# cache would link different copies, and round differently
inner = njit(fastmath=True, nogil=True, cache=True, error_model="numpy", forceinline=True)
_LOWEST, _LOG2E = F(SMALLEST), F(1.4426950408889634)


@intrinsic
def _bits_to_float(context, bits):
    """Reinterpret an int32 as a float32."""

    def generate(context, builder, signature, args):
        return builder.bitcast(args[0], context.get_value_type(types.float32))

    return types.float32(types.int32), generate


@intrinsic
def _float_to_bits(context, value):
    """Reinterpret a float32 as an int32."""

    def generate(context, builder, signature, args):
        return builder.bitcast(args[0], context.get_value_type(types.int32))

    return types.int32(types.float32), generate


@intrinsic
def largest(context, p, q):
    """The larger of two float32, as the reduction that the compiler vectorises: 10 times the speed of max()."""

    def generate(context, builder, signature, args):
        single = ir.FloatType()
        kind = ir.FunctionType(single, [single, single])
        return builder.call(builder.module.declare_intrinsic("llvm.maxnum", [single], kind), args, fastmath=["fast"])

    return types.float32(types.float32, types.float32), generate


@inner
def exp32(x):
    """e^x for x <= 0, not below e^SMALLEST: 2^k times a degree-5 polynomial in the rest."""
    t = largest(x, _LOWEST) * _LOG2E
    k = np.int32(t - F(0.5))  # truncation towards zero: the nearest integer, as t <= 0
    r = t - F(k)
    p = F(1.32765e-3)
    p = p * r + F(9.67554e-3)
    p = p * r + F(5.550713e-2)
    p = p * r + F(2.402212e-1)
    p = p * r + F(6.9314697e-1)
    p = p * r + F(1.0)
    return p * _bits_to_float(np.int32((k + np.int32(127)) << np.int32(23)))


@inner
def exp_any(x):
    """e^x for |x| <= 60."""
    return exp32(x - F(60.0) if x > F(0.0) else x) * (F(1.1420074e26) if x > F(0.0) else F(1.0))


@inner
def log32(x):
    """log x of a positive normal float32: exponent, and 2 artanh of the mantissa; absolute error 2e-7 (1 + |log x|)."""
    bits = _float_to_bits(x)
    k = np.int32((bits - np.int32(0x3F3504F3)) >> np.int32(23))  # mantissa in [sqrt(1/2), sqrt(2))
    m = _bits_to_float(np.int32(bits - np.int32(k << np.int32(23))))
    q = (m - F(1.0)) / (m + F(1.0))
    s = q * q
    p = F(0.2222222)
    p = p * s + F(0.2857143)
    p = p * s + F(0.4)
    p = p * s + F(0.6666667)
    p = p * s + F(2.0)
    return q * p + F(k) * F(0.6931472)
