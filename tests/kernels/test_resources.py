"""`cruxy-triton kernels`: what every kernel needs on sm_75, found by compiling and disassembling it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cruxy_kernels
from cruxy_kernels import RULES
from cruxy_kernels import layout as L
from cruxy_kernels.launch import MAX_REGISTERS


def kernels(*words, **environment):
    return subprocess.run(
        [sys.executable, "-m", "cruxy_triton", "kernels", *words],
        capture_output=True, text=True, check=False,
        env={**{k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}, **environment},
    )  # fmt: skip


@pytest.fixture(scope="module")
def sm_75():
    result = kernels("--arch", "sm_75", "--json", "--gpu", "gtx1650")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    report = json.loads(result.stdout)
    return {row["name"]: row for row in report["variants"]}, report


def test_every_variant_fits_turing(sm_75):
    rows, report = sm_75
    assert report["ok"]
    assert len(rows) >= 35
    for row in rows.values():
        assert row["spills"] == 0, row
        assert row["registers"] <= MAX_REGISTERS, row
        assert row["occupancy"] == 1.0, row
        assert row["forbidden"] == [], row


def test_aligned_parameters_and_gradients_are_loaded_128_bits_at_a_time(sm_75):
    rows, _ = sm_75
    # 1,024 elements by 128 threads: 8 elements per thread, 32 bytes of fp32 and 16 of fp16, once for each tensor.
    assert rows["telemetry fp32 gamma=1.5"]["main_loads"]["128"] == 2
    assert rows["telemetry fp16 gamma=1.5"]["main_loads"]["128"] == 1
    assert rows["lion fp32/fp32 state int8"]["main_loads"]["128"] == 4
    assert rows["lion fp16/fp16 state int8"]["main_loads"]["128"] == 2
    assert rows["lion bf16/bf16 state int8"]["main_loads"]["128"] == 2
    assert rows["lion fp32/fp32 state int8"]["main_stores"]["128"] == 2
    assert rows["adamw fp32/fp32 state fp32"]["main_loads"]["128"] == 8


def test_every_rule_codec_and_law_is_there(sm_75):
    """All storages of a rule, all switches on and off, and none that it does not have."""
    rows, _ = sm_75
    for rule in RULES.values():
        found = [name for name in rows if name.startswith(f"{rule.name} fp32/fp32 state ")]
        states = {"fp32", *[f"int{bits}" for bits in rule.state_bits if bits != 32]}
        assert {name.split()[3] for name in found} == states
        assert len(found) == len(states) * (2 if rule.flags else 1)
        assert len([name for name in rows if name.startswith(f"clipped {rule.name} fp32/fp32 state ")]) == len(states)
    assert {name.split()[1] for name in rows if name.startswith("control")} == {*L.LAWS, "refresh"}
    assert [name for name in rows if name.startswith("quantize")]


def test_bytes_per_parameter_stay_near_the_floor(sm_75):
    rows, _ = sm_75
    for row in rows.values():
        if row["floor"]:
            assert row["floor"] <= row["bytes_moved"] <= row["floor"] + 0.05, row
    # 14.06 bytes per parameter at 128 GB/s: 0.69 ms for the LoRA census.
    assert rows["lion fp32/fp32 state int8"]["predicted_ms"] == pytest.approx(0.69, abs=0.01)


def test_a_broken_limit_gives_exit_code_1():
    code = (
        "import cruxy_kernels.inspect.resources as r, cruxy_triton.cli.kernels as c, sys;"
        "from cruxy_triton.cli import main;"
        "usage = r.Usage('x', 75, 65, 8, 0, forbidden=('HMMA',));"
        "r.inspect = lambda variant, arch: usage;"
        "sys.exit(main(['kernels', '--arch', '75', '--only', 'telemetry fp16 gamma=1.5', '--processes', '1']))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    for words in ("8 bytes per thread spilled", "65 registers per thread", "0 loads of 128 bits", "uses HMMA"):
        assert words in result.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--arch", "sm_70"], "unknown architecture 'sm_70'"),
        (["--only", "nothing like it"], "no variant has"),
        (["--bandwidth-gb-s", "-1"], "expected a positive number"),
    ],
)
def test_bad_input(words, message):
    result = kernels(*words)
    assert result.returncode == 2
    assert message in result.stderr


def test_interpreter_and_compiler_exclude_each_other():
    result = kernels(TRITON_INTERPRET="1")
    assert result.returncode == 2
    assert "TRITON_INTERPRET=1" in result.stderr


@pytest.mark.slow
def test_every_architecture():
    result = kernels("--json")
    report = json.loads(result.stdout)
    assert report["ok"], [row for row in report["variants"] if row["broken"]]
    assert {row["arch"] for row in report["variants"]} == {75, 80, 86, 89, 90, 100, 120}


SYNCS = re.compile(
    r"\.item\(|\.tolist\(|\.cpu\(|\.numpy\(|synchronize\(|nonzero\(|masked_select|\.is_nonzero|(?<!\.)\bbool\(|(?<!\.)\bfloat\((?!\"|gamma)"
)
PACKAGE = Path(cruxy_kernels.__file__).parent
STEP_FILES = [
    *("tables", "launch", "storage", "rounding", "codec", "update", "laws/telemetry", "laws/control"),
    *("laws/judge", "backends/judge"),
    *("rules/rule", *[f"rules/{name}" for name in RULES], "backends/dispatch", "backends/pieces"),
]


@pytest.mark.parametrize("name", STEP_FILES)
def test_no_synchronisation_in_the_source(name):
    """Nothing on the step path waits for the device. `.tolist()` is allowed on tensors made on the host."""
    source = (PACKAGE / f"{name}.py").read_text()
    host_made = {
        "tables": ["first.tolist()"],
        "codec": ["tl.constexpr(float("],
        "laws/control": ["float(values[slot])"],  # numbers of the caller
        "rules/rule": ["bool(given.get("],
    }
    for line in source.splitlines():
        found = SYNCS.search(line)
        if found and not any(allowed in line for allowed in host_made.get(name, [])):
            raise AssertionError(f"{name}.py may wait for the device: {line.strip()}")


# -- compiled once -------------------------------------------------------------------------------------------


def specialisation(kernel, arguments):
    """What makes Triton compile anew: the part of its key that stands for the arguments."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    binder = create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 75, 32)))
    return str(binder(*arguments.values(), num_warps=4)[1])


def test_counts_and_addresses_of_a_step_compile_nothing_anew():
    """Chunks, partial sums and scalars come in any number and at any address as training goes on."""
    from cruxy_kernels.inspect.variants import all_variants

    buffer = torch.zeros(4096)  # 64-byte aligned; [1:] is not
    pointers = {"*fp32": buffer, "*i64": buffer.long(), "*i32": buffer.int(), "*i16": buffer.short()}
    scalars = ("loss_pointer", "found_inf", "grad_scale")  # of the caller: anywhere
    checked = set()
    for variant in all_variants():
        if variant.name.startswith(("quantize", "dequantize")):
            continue  # not of a step; their tensors' lengths are compiled in as multiples of 16 or not
        keys = set()
        for count, offset in ((1, 0), (2, 1), (16, 0), (17, 1), (4096, 3)):
            arguments = {}
            for name in variant.kernel.arg_names:
                kind = variant.types.get(name)
                if kind is None:
                    arguments[name] = variant.constants[name]
                elif kind == "i32":
                    arguments[name] = count
                    checked.add(name)
                elif kind == "fp32":
                    arguments[name] = 1.0 + count / 2
                else:
                    arguments[name] = pointers[kind][offset if name in scalars else 0 :]
                    checked.update({name} & set(scalars))
            keys.add(specialisation(variant.kernel, arguments))
        assert len(keys) == 1, f"{variant.name} is compiled {len(keys)} times: {keys}"
    numbers = {"chunks", "chunks_per_program", "count", "first", "layers", "log_length", "partials", "rows", "seed"}
    assert checked == numbers | {"tensors", *scalars}
