"""Which instruction set is chosen for a CPU, from its flags alone."""

from __future__ import annotations

import re

import pytest

from pallas_kernels.native import isa

AVX2 = isa.ISAS["avx2"].needs
AVX512 = isa.ISAS["avx512"].needs
BF16 = isa.ISAS["avx512_bf16"].needs


@pytest.mark.parametrize(
    ("machine", "flags", "best"),
    [
        ("x86_64", BF16 | {"amx_tile"}, "avx512_bf16"),
        ("x86_64", AVX512, "avx512"),
        ("x86_64", AVX512 - {"avx512vl"}, "avx2"),  # Knights Landing
        ("x86_64", AVX2 | {"avx_vnni"}, "avx2"),
        ("x86_64", AVX2 - {"fma"}, None),
        ("aarch64", {"fp", "asimd", "bf16"}, "neon"),
        ("aarch64", set(), None),
        ("riscv64", BF16, None),
    ],
)
def test_the_best_instruction_set_is_one_that_the_cpu_has(machine: str, flags: set[str], best: str | None):
    assert isa.choose(None, machine, flags) == best


def test_a_lesser_instruction_set_can_be_chosen():
    assert isa.choose("avx2", "x86_64", BF16) == "avx2"


def test_native_means_no_prebuilt_library():
    assert isa.choose("native", "x86_64", BF16) is None


def test_an_instruction_set_that_the_cpu_lacks_is_refused_with_what_is_missing():
    message = (
        "PALLAS_KERNELS_ISA is 'avx512_bf16', but this CPU (x86_64) has no avx512_bf16; it can be 'avx512', 'avx2', 'native'"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        isa.choose("avx512_bf16", "x86_64", AVX512)


@pytest.mark.parametrize("unknown", ["avx10", "neon"])
def test_an_unknown_instruction_set_is_refused_with_those_that_are_possible(unknown: str):
    with pytest.raises(ValueError, match=f"is '{unknown}'.* it can be 'avx2', 'native' here"):
        isa.choose(unknown, "x86_64", AVX2)


def test_sets_are_listed_from_the_best_and_each_includes_the_next():
    names = isa.supported("x86_64", BF16)
    assert names == ("avx512_bf16", "avx512", "avx2")
    assert AVX2 < AVX512 < BF16
