"""Compiled Triton kernels for Hopper and Blackwell: registers, spills, width of memory accesses.

Triton compiles ahead of time, so no GPU is needed. `compile_kernels` runs in a process without Triton's interpreter and
prints the results.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("triton", minversion="3.6")  # 3.4 takes 77 registers for a gradient, 3.2 has another interface

CAPABILITIES = [90, 100]
DTYPES = {"bf16": 8, "fp32": 4}  # logits per 16 bytes; fp16 is like bf16
FORMS = ["mix", "power", "collision power", "luffy", "nll between", "prob between", "focal", "chord", "entropy"]
FORMS += ["exponential entropy", "eaft", "trsft", "cayley", "asft", "iw", "psft", "schedule", ""]
POINTERS = {"TARGET": "*i64", "FLAGS": "*i1", "BLEND": "*fp64"}
DIVISIBLE = ("row_stride", "out_stride_difference", "columns", "width", "start", "n")


def variants():
    """Yield every launched variant: name, kernel, constants, pointer types, integers divisible by 16, warps."""
    for dtype, vector in DTYPES.items():
        types = {"X": f"*{dtype}", "OUT": f"*{dtype}"}
        for warps in (4, 8):
            shape = {"LANES": 4 * 32 * warps, "VEC": vector}
            for divisible in (DIVISIBLE, ()):
                for extra in ((False, False), (True, False), (False, True), (True, True)):
                    constants = shape | dict(zip(("ENTROPY", "COLLISION"), extra, strict=True))
                    name = f"stats {dtype} {warps} {'+'.join(map(str, extra))} {'any' if not divisible else 16}"
                    yield name, "stats_kernel", constants, {**types, "OUT": "*fp32"}, divisible, warps
                # In place, OUT has the row stride of X at any width.
                divisible = {*divisible, "out_stride_difference"}
                name = f"gradient {dtype} {warps} {'any' if len(divisible) == 1 else 16}"
                yield name, "gradient_kernel", shape, types, divisible, warps
    # A single token, a vocabulary of one entry: Triton specializes integers that are 1 as constants.
    ones = {"row_stride": 1, "width": 1, "columns": 1, "n": 1, "tiles": 1, "upstream_stride": 1}
    yield "gradient of one", "gradient_kernel", {**shape, **ones}, types, ("out_stride_difference",), 4
    ones = {"row_stride": 1, "columns": 1, "n": 1, "start": 1, "vocab_size": 1, "ENTROPY": True, "COLLISION": True}
    yield "stats of one", "stats_kernel", {**shape, **ones}, {**types, "OUT": "*fp32"}, (), 4
    for form in FORMS:
        flags = {"NLL": True, "BLENDED": form == "schedule", "TOKENS": 128}
        flags |= {"ENTROPY": "entropy" in form or form == "eaft", "COLLISION": "collision" in form}
        flags["K"] = 3 + flags["ENTROPY"] + flags["COLLISION"]
        blend = {} if form == "schedule" else {"BLEND": None}
        blend |= {} if form == "cayley" else {"SUMS": None}
        blend |= {} if form in ("asft", "iw", "psft") else {"REFERENCE": None}
        for ranks in ({}, {"ranks": 1}, {"ranks": 1, "n": 1}) if form == "mix" else ({},):
            constants = {"FORM": form.replace("schedule", "mix"), **flags, **blend, **ranks}
            yield f"merge {form} {ranks}", "merge_kernel", constants, {}, (), 4
    for constants in ({"BLEND": None, "BLENDED": False}, {"BLENDED": True}, {"n": 1, "programs": 1, "BLENDED": True}):
        yield f"cayley {constants}", "cayley_kernel", {"NLL": True, "TOKENS": 128, **constants}, {}, (), 4


def compile_kernels(capability):
    """Print {variant: facts}. Runs in its own process."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megatron_dft.ops import triton_backend

    facts = {}
    for name, kernel, constants, types, divisible, warps in variants():
        function = getattr(triton_backend, kernel)
        signature = {}
        for argument in function.arg_names:
            integer = "fp32" if argument in ("log_vocab_size", "first", "second", "floor") else "i32"
            kind = POINTERS.get(argument, "*fp32") if argument.isupper() else integer
            signature[argument] = "constexpr" if argument in constants else types.get(argument, kind)
        aligned = [i for i, (a, kind) in enumerate(signature.items()) if kind.startswith("*") or a in divisible]
        attributes = {(i,): [["tt.divisibility", 16]] for i in aligned if list(signature.values())[i] != "constexpr"}
        source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
        facts[name] = {**usage(triton, compiled.asm["cubin"]), **accesses(compiled.asm["ptx"])}
    print(json.dumps(facts))


def usage(triton, cubin):
    """Registers per thread, bytes of stack, and bytes of local memory (spills)."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {key.lower(): int(re.search(rf"{key}:(\d+)", text)[1]) for key in ("REG", "STACK", "LOCAL")}


def accesses(ptx):
    """Number of instructions of each kind in the program and in its longest loop."""
    lines = [line.strip() for line in ptx.splitlines()]
    labels = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"(\$L\w+):", line))}
    jumps = [(labels[m[1]], i) for i, line in enumerate(lines) if (m := re.search(r"bra(?:\.uni)?\s+(\$L\w+);", line))]
    loops = [lines[start:end] for start, end in jumps if start < end]
    kinds = {
        "wide loads": r"ld\.global\S*\.v4\.b32",
        "wide stores": r"st\.global\S*\.v4\.b32",
        "loads": r"ld\.global",
        "exponentials": r"ex2\.approx",
        "barriers": r"bar\.sync|shfl",
        "atomics": r"\b(?:atom|red)\.",
    }
    count = {kind: len(re.findall(pattern, ptx)) for kind, pattern in kinds.items()}
    loop = "\n".join(max(loops, key=len)) if loops else ""
    return {**count, "loop": {kind: len(re.findall(pattern, loop)) for kind, pattern in kinds.items()}}


@pytest.fixture(scope="module", params=CAPABILITIES)
def facts(request):
    code = f"import test_triton_compiled; test_triton_compiled.compile_kernels({request.param})"
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1]), *sys.path])
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": path}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert out.returncode == 0, out.stderr
    return json.loads(out.stdout)


def of(facts, kernel):
    return {name: fact for name, fact in facts.items() if name.startswith(kernel) and not name.endswith("one")}


def test_kernels_compile_without_spills_and_atomics(facts):
    assert set(facts) == {name for name, *_ in variants()}
    for name, fact in facts.items():
        assert (fact["stack"], fact["local"], fact["atomics"]) == (0, 0, 0), name


# 65536 registers are 64 for each of 1024 threads, half the maximum per SM, with 64 KiB of loads in flight. Only
# vocab_stats computes both extra sums, never training: 768 threads.
@pytest.mark.parametrize("kernel", ["stats", "gradient", "merge", "cayley"])
def test_kernel_registers_are_within_occupancy_limit(facts, kernel):
    for name, fact in of(facts, kernel).items():
        assert fact["reg"] <= (80 if "True+True" in name else 64), name


def test_stats_kernel_loads_16_bytes_at_any_width(facts):
    """The loop has four wide loads, no narrow load and no barrier, and one exponential per logit."""
    assert len(of(facts, "stats")) == 32
    for name, fact in of(facts, "stats").items():
        loop, vector = fact["loop"], DTYPES[name.split()[1]]
        assert loop["wide loads"] == loop["loads"] == 4, name
        assert loop["exponentials"] == 4 * (vector + 1), name  # plus one per vector, for rescaling
        assert loop["barriers"] == loop["atomics"] == 0, name


def test_gradient_kernel_loads_and_stores_16_bytes_at_any_width(facts):
    assert len(of(facts, "gradient")) == 8
    for name, fact in of(facts, "gradient").items():
        assert (fact["wide loads"], fact["wide stores"]) == (4, 8), name  # gradient or zeros
        assert fact["loads"] - 4 == 6, name  # five numbers per row, and the edge


def test_merge_kernel_computes_at_most_one_exponential_per_shard(facts):
    for name, fact in of(facts, "merge").items():
        if "{}" in name:
            assert fact["loop"]["exponentials"] <= 1, name
