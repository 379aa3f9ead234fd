"""Compiles kernels for GPUs that are not here; run by `test_triton_compile.py`.

stdin: JSON [[name of COMPILE, its arguments ...], ...]; stdout: a JSON object per case with registers, stack (spilled
bytes), shared (bytes) and, of the loop, tensor (products), per_weight (instructions per weight, or per number of the
cache) and late_loads (from global memory into registers).
"""

import json
import re
import subprocess
import sys
import tempfile
import warnings
from typing import NamedTuple

import torch
import triton
from quantkit_kernels.triton import columns, columns_op, grouped_op, kv_op, scaled_op
from quantkit_kernels.triton.configs import rule
from quantkit_kernels.triton.grouped import grouped_kernel
from quantkit_kernels.triton.kv import decode_kernel, write_kernel
from quantkit_kernels.triton.launch import constants
from quantkit_kernels.triton.layout import geometry
from quantkit_kernels.triton.linear import linear_kernel
from quantkit_kernels.triton.scaled import quantize_kernel, scaled_linear_kernel
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import ASTSource

INTEGERS = ("n_m", "n", "k", "ldx", "words", "chunks", "trips")
NOT_SIXTEENS = ("n_m", "words", "chunks", "trips")


def compiled(kernel, arch, fixed, kinds, odd, warps, stages):
    """A kernel for sm_`arch` or gfx`arch`. kinds: types of its arguments, all multiples of 16 but those named odd."""
    amd, names = arch >= 900, kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: kinds.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in fixed.items()},
        attrs={(names.index(a),): [["tt.divisibility", 16]] for a in kinds if a not in odd},
    )
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    target = GPUTarget("hip", f"gfx{arch}", 64) if amd else GPUTarget("cuda", arch, 32)
    return triton.compile(source, target=target, options=options)


def compile_linear(arch, bits, activations, zeros, fp8, group, m, n, k):
    """(the kernel that `launch` would run, its configuration, weights of a tile and trip)."""
    cut, amd = geometry(bits, group, k), arch >= 900
    config = rule(bits, m, n, cut, 132, 0 if amd else arch // 10)
    fixed = constants(bits, zeros, fp8, group, k, None if amd else activations, "bf16", arch // 10 == 10)
    fixed |= {"BM": config.bm, "BN": config.bn, "UNROLL": config.unroll, "SPLIT": config.splits > 1}
    fixed |= {"HAS_BIAS": True, "STAGES": config.stages}
    pointers = {"codes": "*u8", "zeros": "*i32", "scales": "*i32", "parts": "*fp32", "tickets": "*i32"}
    kinds = pointers | dict.fromkeys(("x", "bias", "y"), "*" + activations) | dict.fromkeys(INTEGERS, "i32")
    kernel = compiled(linear_kernel, arch, fixed, kinds, NOT_SIXTEENS, config.warps, config.stages)
    return kernel, config, config.bn * cut.chunk * config.unroll


def compile_grouped(arch, bits, activations, zeros, fp8, group, slots, n, k, experts):
    """As `compile_linear`, of the experts of a mixture."""
    cut = geometry(bits, group, k)
    config = grouped_op.config_of(bits, slots, experts, n, cut, 132, arch // 10)
    fixed = constants(bits, zeros, fp8, group, k, activations, "bf16", arch // 10 == 10)
    fixed |= {"BM": config.bm, "BN": config.bn, "UNROLL": config.unroll, "EP": experts}
    fixed |= {"HAS_BIAS": True, "STAGES": config.stages}
    pointers = {"codes": "*u8", "zeros": "*i32", "scales": "*i32", "index": "*i64", "offsets": "*i64"}
    kinds = pointers | dict.fromkeys(("x", "bias", "y"), "*" + activations)
    kinds |= dict.fromkeys(("experts", "n", "k", "ldx", "words", "chunks", "trips"), "i32")
    odd = ("experts", "words", "chunks", "trips", "offsets")
    kernel = compiled(grouped_kernel, arch, fixed, kinds, odd, config.warps, config.stages)
    return kernel, config, config.bn * cut.chunk * config.unroll


def compile_scaled(arch, number, activations, zero, group, m, n, k, rows=1):
    """As `compile_linear`, of 8-bit products; inputs rounded inside with few tokens."""
    config = scaled_op.rule(m, n, k, group, 132)
    fused = m <= scaled_op.FUSED_TOKENS and group == k and not zero
    fixed = scaled_op.constants(number, group, rows, k, fused, zero, True)
    fixed |= {"BM": config.bm, "BN": config.bn, "BK": config.bk, "SPLIT": config.splits > 1, "EVEN_K": True}
    fixed |= {"HAS_BIAS": True, "STAGES": config.stages}
    code = {"int8": "*i8", "fp8_e4m3": "*fp8e4nv"}[number]
    kinds = dict.fromkeys(("bias", "y"), "*" + activations) | {
        "x": "*" + activations if fused else code,
        "w": code,
    }
    kinds |= dict.fromkeys(("x_scale", "w_scale", "parts"), "*fp32")
    kinds |= dict.fromkeys(("x_zero", "sums", "tickets"), "*i32")
    kinds |= dict.fromkeys(("n_m", "n", "k", "ldx", "x_scales", "groups", "trips"), "i32")
    odd = ("n_m", "x_scales", "groups", "trips")
    kernel = compiled(scaled_linear_kernel, arch, fixed, kinds, odd, config.warps, config.stages)
    return kernel, config, config.bn * config.bk


def compile_decode(arch, number, activations, stored, capped, group, d):
    """As `compile_linear`, of attention over a quantized cache: 4,096 places, 64 sequences of 8 heads."""
    config = kv_op.rule(4 * 8, 4096, 132)
    dtype = {"int8": torch.int8, "fp8_e4m3": torch.float8_e4m3fn}[number]
    fixed = kv_op.constants(dtype, group, d, stored, capped, arch >= 90)
    fixed |= {"BS": config.bs, "SPLIT": config.splits > 1, "STAGES": config.stages}
    code = "*i8" if number == "int8" else "*u8"
    kinds = dict.fromkeys(("q", "out"), "*" + activations) | {"k": code, "v": code}
    kinds |= dict.fromkeys(("k_scales", "v_scales", "parts"), "*fp32")
    kinds |= dict.fromkeys(("first", "end", "tickets"), "*i32")
    kinds |= dict.fromkeys(("kv_heads", "group", "places", "d"), "i32") | {
        "factor": "fp32",
        "softcap": "fp32",
    }
    odd = ("kv_heads", "group", "factor", "softcap")
    kernel = compiled(decode_kernel, arch, fixed, kinds, odd, config.warps, config.stages)
    return kernel, config, 2 * config.bs * d


def compile_write(arch, number, activations, stored, d):
    """As `compile_linear`, of the entries of a cache; a number is written once."""
    fixed = {"FP8": number == "fp8_e4m3", "CAST": arch >= 90, "STATIC": stored, "D": d}
    code = {"int8": "*i8", "fp8_e4m3": "*u8"}[number]
    kinds = dict.fromkeys(("k", "v"), "*" + activations) | dict.fromkeys(("k_codes", "v_codes"), code)
    kinds |= dict.fromkeys(("k_scales", "v_scales"), "*fp32") | {"begin": "*i32"}
    strides = ("k_b", "k_h", "k_t", "v_b", "v_h", "v_t")
    kinds |= dict.fromkeys(("heads", "tokens", "places", "d", *strides), "i32")
    kernel = compiled(write_kernel, arch, fixed, kinds, ("heads", "tokens"), 1, 3)
    return kernel, Launch(1), 2 * d


def compile_quantize(arch, number, activations, group, static, zero):
    """As `compile_linear`, of the rounding of inputs."""
    fixed = {"FP8": number == "fp8_e4m3", "CAST": True, "GROUP": group, "STATIC": static, "HAS_ZERO": zero}
    fixed["BK"] = group or 1024
    code = {"int8": "*i8", "fp8_e4m3": "*fp8e4nv"}[number]
    kinds = {"x": "*" + activations, "codes": code, "scales": "*fp32", "zero": "*i32"}
    kinds |= dict.fromkeys(("k", "ldx", "groups"), "i32")
    warps = 1 if group else 4
    return compiled(quantize_kernel, arch, fixed, kinds, ("groups",), warps, 3), Launch(warps), fixed["BK"]


def compile_columns(arch, name, b):
    """As `compile_linear`, of GPTQ's loops over a block of `b` columns; nothing about sizes is known."""
    kernel = {"spread": columns.spread_kernel, "descend": columns.descend_kernel}[name]
    tile = columns_op.config(b)
    pointers = ("weight", "value", "gradient", "matrix", "scale", "low", "high", "levels", "errors")
    names = [each for each in kernel.arg_names if each not in tile]
    kinds = {each: "*fp32" if each in pointers else "i32" for each in names} | {"group_of": "*i32"}
    odd = [each for each in names if kinds[each] == "i32"]
    return compiled(kernel, arch, tile, kinds, odd, 1, 3), Launch(1), tile["BLOCK"] * tile["STRIP"]


class Launch(NamedTuple):
    """What `main` needs of a configuration."""

    warps: int


COMPILE = {
    "linear": compile_linear,
    "grouped": compile_grouped,
    "scaled": compile_scaled,
    "decode": compile_decode,
    "write": compile_write,
    "quantize": compile_quantize,
    "columns": compile_columns,
}


def products(code: list[str]) -> int:
    """Tensor core products among instructions."""
    return sum("MMA" in text.split()[0] for text in code)


def main_loop(sass: str) -> list[str]:
    """Instructions of the loop with the most products in it, the shortest if several have as many."""
    labels, code = {}, []
    for line in sass.splitlines()[1:]:
        if re.fullmatch(r"LBB\d+:", line):
            labels[line[:-1]] = len(code)
        else:
            code.append(re.sub(r"^@!?U?P\w+ ", "", line.split("\t")[-1]))
    loops = [[]]
    for i, text in enumerate(code):
        jump = re.match(r"BRA\S* .*?(LBB\d+|0x[0-9a-f]+)", text)  # an address if the predicate is uniform
        if jump and (start := labels[jump[1]] if jump[1] in labels else int(jump[1], 16) // 16) <= i:
            loops.append(code[start : i + 1])
    return max(loops, key=lambda body: (products(body), -len(body)))


def usage(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack) by the disassembler that triton ships."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return tuple(int(v) for v in re.search(r"REG:(\d+) STACK:(\d+)", text).groups())


def main() -> None:
    warnings.simplefilter("ignore")
    assert nvidia  # the backend is part of triton, no driver is needed
    for name, *case in json.load(sys.stdin):
        kernel, config, weights = COMPILE[name](*case)
        if "amdgcn" in kernel.asm:
            spills = int(re.search(r"vgpr_spill_count:\s*(\d+)", kernel.asm["amdgcn"])[1])
            print(
                json.dumps({"stack": spills, "shared": kernel.metadata.shared, "config": config}), flush=True
            )
            continue
        loop = main_loop(kernel.asm["sass"])
        registers, stack = usage(kernel.asm["cubin"])
        weights /= 32 * config.warps
        report = {
            "registers": registers,
            "stack": stack,
            "shared": kernel.metadata.shared,
            "tensor": products(loop),
            "from_registers": bool(re.search(r"HGMMA\S* R\d+, R\d+, gdesc", kernel.asm["sass"])),
            "per_weight": round(len(loop) / weights, 2),
            "late_loads": sum(text.startswith("LDG.") for text in loop),
            "config": config,
        }
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
