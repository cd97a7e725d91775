"""Compile every Triton kernel for compute capability 9.0 without a GPU; prints one JSON line a kernel.

Run by test_sm90.py in a process of its own: with TRITON_INTERPRET set, nothing is compiled.
"""

from __future__ import annotations

import json

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bitdistill.kernels import head, matmul, norm_quantize, relation, stack, weights

F32, BF16, I8, I32, I64 = "*fp32", "*bf16", "*i8", "i32", "*i64"
FORWARD = {
    "x_ptr": BF16,
    "gain_ptr": F32,
    "codes_ptr": I8,
    "scale_ptr": F32,
    "rrms_ptr": F32,
    "n_columns": I32,
    "x_stride": I32,
    "eps": "fp32",
    "gain_offset": "fp32",
}
BACKWARD = {
    "grad_ptr": BF16,
    "grad_scale_ptr": F32,
    "x_ptr": BF16,
    "gain_ptr": F32,
    "rrms_ptr": F32,
    "codes_ptr": I8,
    "scale_ptr": F32,
    "out_scale_ptr": F32,
    "out_ptr": BF16,
    "gain_grad_ptr": F32,
    "x_hat_ptr": BF16,
    "n_rows": I32,
    "n_columns": I32,
    "x_stride": I32,
    "gain_offset": "fp32",
}
DOCUMENTS = {"begin_ptr": "*i32", "end_ptr": "*i32", "weight_ptr": F32, "s_lse_ptr": F32, "t_lse_ptr": F32}
STRIDES = {"s_stride_m": I32, "s_stride_a": I32, "t_stride_m": I32, "t_stride_a": I32}
FACTORS = {"s_factor": "fp32", "t_factor": "fp32"}
HEADS = {
    "S_SIZE": 64, "T_SIZE": 64, "S_BLOCK": 64, "T_BLOCK": 64, "BLOCK_M": 64, "BLOCK_N": 64, "PRECISION": "ieee",
    "WIDEN": False,
}  # fmt: skip
KERNELS = {
    "relation": (
        relation._forward_kernel,
        {"s_ptr": BF16, "t_ptr": BF16, **DOCUMENTS, "loss_ptr": F32, "n_rows": I32, **STRIDES, **FACTORS},
        HEADS,
        4,
    ),
    "relation_backward": (
        relation._backward_kernel,
        {
            "s_ptr": BF16,
            "t_ptr": BF16,
            **DOCUMENTS,
            "grad_ptr": F32,
            "out_ptr": BF16,
            "n_rows": I32,
            **STRIDES,
            "out_stride_m": I32,
            "out_stride_a": I32,
            **FACTORS,
        },
        HEADS,
        4,
    ),
    "head": (
        head._rows_kernel,
        {
            "student_ptr": BF16,
            "teacher_ptr": BF16,
            "target_ptr": I64,
            "lm_ptr": F32,
            "kl_ptr": F32,
            "student_stride": I32,
            "teacher_stride": I32,
            "vocabulary": I32,
            "lm_weight": "fp32",
            "kl_weight": "fp32",
            "inv_tau": "fp32",
        },
        {"HAS_TEACHER": True, "ONE_TEMPERATURE": False, "BLOCK": 2048},
        8,
    ),
    "norm": (
        norm_quantize._forward_kernel,
        {**FORWARD, "x_ptr": F32},
        {"NORM": True, "ACT": 0, "MAIN": 512, "REST": 64, "VECTOR": 4, "INTERPRETED": False},
        1,
    ),
    "gate": (
        norm_quantize._forward_kernel,
        FORWARD,
        {"NORM": True, "ACT": 1, "MAIN": 1024, "REST": 512, "VECTOR": 8, "INTERPRETED": False},
        2,
    ),
    "norm_backward": (
        norm_quantize._backward_kernel,
        {**BACKWARD, "x_ptr": F32, "out_ptr": F32},
        {"NORM": True, "ACT": 0, "SCALED": True, "MAIN": 512, "REST": 64, "VECTOR": 4},
        1,
    ),
    "stacked_backward": (
        norm_quantize._backward_kernel,
        {**BACKWARD, "x_ptr": F32, "out_ptr": F32},
        {"NORM": True, "ACT": 0, "SCALED": False, "MAIN": 512, "REST": 64, "VECTOR": 4},
        1,
    ),
    "backward": (
        norm_quantize._backward_kernel,
        BACKWARD,
        {"NORM": True, "ACT": 1, "SCALED": True, "MAIN": 1024, "REST": 512, "VECTOR": 8},
        4,
    ),
    "stack": (
        stack._stack_kernel,
        {
            **dict.fromkeys(("first_ptr", "second_ptr", "third_ptr"), BF16),
            "scale_ptr": F32,
            "out_ptr": BF16,
            **dict.fromkeys(("n_rows", "first_size", "second_size", "third_size"), I32),
        },
        {"ROWS": stack.ROWS, "BLOCK": stack.BLOCK},
        4,
    ),
    "wide_backward": (
        norm_quantize._wide_backward_kernel,
        BACKWARD,
        {"NORM": True, "ACT": 2, "SCALED": True, "ROWS": 2, "BLOCK": 2048},
        8,
    ),
    "product": (
        matmul._product_kernel,
        {
            "x_ptr": I8,
            "w_ptr": I8,
            "x_scale_ptr": F32,
            "w_scale_ptr": F32,
            "y_ptr": BF16,
            "n_rows": I32,
            "n_out": I32,
            "n_in": I32,
        },
        {"GROUP": 8, "WHOLE_I": True, "BLOCK_N": 128, "BLOCK_O": 128, "BLOCK_I": 64},
        4,
    ),
    "scale": (
        matmul._scale_kernel,
        {
            "product_ptr": "*i32",
            "x_scale_ptr": F32,
            "w_scale_ptr": F32,
            "y_ptr": BF16,
            "n_rows": I32,
            "n_out": I32,
            "stride": I32,
        },
        {"ROWS": 8, "BLOCK": 512},
        4,
    ),
    "gain_sums": (
        norm_quantize._sum_rows_kernel,
        {
            **dict.fromkeys(("first_ptr", "second_ptr", "third_ptr", "out_ptr"), F32),
            **dict.fromkeys(("first_rows", "second_rows", "third_rows"), I32),
            **dict.fromkeys(("first_size", "second_size", "third_size"), I32),
        },
        {"ROWS": norm_quantize.SUM_ROWS, "BLOCK": norm_quantize.SUM_BLOCK},
        8,
    ),
    "sums": (
        weights._sums_kernel,
        {"weight_ptrs": I64, "sizes_ptr": I64, "partial_ptr": "*fp64"},
        {"PARTS": 64, "BLOCK": 1024},
        4,
    ),
    "codes": (
        weights._codes_kernel,
        {
            "weight_ptrs": I64,
            "code_ptrs": I64,
            "scale_ptrs": I64,
            "sizes_ptr": I64,
            "outs_ptr": I64,
            "partial_ptr": "*fp64",
        },
        {"PARTS": 64, "BLOCK": 1024},
        4,
    ),
}


def main() -> None:
    for name, (kernel, types, constants, warps) in KERNELS.items():
        names = kernel.arg_names
        source = ASTSource(
            fn=kernel,
            signature={n: types.get(n, "constexpr") for n in names},
            constexprs={(names.index(n),): value for n, value in constants.items()},
            # What a launch finds by itself for aligned tensors and even sizes
            attrs={(names.index(n),): [["tt.divisibility", 16]] for n, t in types.items() if t[0] in "*i"},
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
        ptx = compiled.asm["ptx"]
        found = {
            "kernel": name,
            "bytes": len(compiled.asm["cubin"]),
            "int8_tensor_cores": "wgmma" in ptx and "s8" in ptx,
            "approximate_division": "div.full" in ptx,
            "exact_division": "div.rn.f32" in ptx,
        }
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
