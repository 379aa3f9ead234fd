"""Compiles linear kernels for GPUs that are not here; run by `test_triton_compile.py`.

stdin: JSON [[arch, bits, activations, zeros, fp8, group, m, n, k], ...]; stdout: a JSON object per case with registers,
stack (spilled bytes), shared (bytes) and, of the loop, tensor (products), per_weight (instructions per weight) and
late_loads (from global memory into registers).
"""

import json
import re
import subprocess
import sys
import tempfile
import warnings

import triton
from quantkit_kernels.triton.configs import rule
from quantkit_kernels.triton.launch import constants
from quantkit_kernels.triton.layout import geometry
from quantkit_kernels.triton.linear import linear_kernel
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import ASTSource

INTEGERS = ("n_m", "n", "k", "ldx", "words", "chunks", "trips")
NOT_SIXTEENS = ("n_m", "words", "chunks", "trips")


def compile_offline(arch, bits, activations, zeros, fp8, group, m, n, k):
    """The kernel that `launch` would run, for sm_`arch` or gfx`arch`; and its configuration."""
    cut, amd = geometry(bits, group, k), arch >= 900
    config = rule(bits, m, n, cut, 132, 0 if amd else arch // 10)
    fixed = constants(bits, zeros, fp8, group, k, None if amd else activations, "bf16", arch // 10 == 10)
    fixed |= {"BM": config.bm, "BN": config.bn, "UNROLL": config.unroll, "SPLIT": config.splits > 1}
    fixed |= {"HAS_BIAS": True, "STAGES": config.stages}
    pointers = {"codes": "*u8", "zeros": "*i32", "scales": "*i32", "parts": "*fp32", "tickets": "*i32"}
    kinds = pointers | dict.fromkeys(("x", "bias", "y"), "*" + activations) | dict.fromkeys(INTEGERS, "i32")
    names = linear_kernel.arg_names
    source = ASTSource(
        fn=linear_kernel,
        signature={name: kinds.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in fixed.items()},
        attrs={(names.index(a),): [["tt.divisibility", 16]] for a in kinds if a not in NOT_SIXTEENS},
    )
    options = {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": True}
    target = GPUTarget("hip", f"gfx{arch}", 64) if amd else GPUTarget("cuda", arch, 32)
    return triton.compile(source, target=target, options=options), config, cut


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
    for case in json.load(sys.stdin):
        kernel, config, cut = compile_offline(*case)
        if "amdgcn" in kernel.asm:
            spills = int(re.search(r"vgpr_spill_count:\s*(\d+)", kernel.asm["amdgcn"])[1])
            print(
                json.dumps({"stack": spills, "shared": kernel.metadata.shared, "config": config}), flush=True
            )
            continue
        loop = main_loop(kernel.asm["sass"])
        registers, stack = usage(kernel.asm["cubin"])
        weights = config.bn * cut.chunk * config.unroll / (32 * config.warps)
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
