"""How far off the planner's answer may be."""

from __future__ import annotations

from cruxy_triton.planner.card import Card


def error_bytes(
    allocated: int, card: Card, attention: str, full: bool = False, quantized: bool = False, traced: bool = False
) -> int:
    """How far the process's peak may be off, either way: the context's own uncertainty, and a share of what is
    allocated. The shares are what runs on a real T4 were off by, rounded up (tests/planner/test_t4.py): 2 % (0.3 %
    seen), 4 % for 4-bit base weights, whose loading leaves the allocator in a state that no two runs share (1.8 %
    seen), 5 % where large score matrices make fragmentation depend on chance (eager and math attention; 2.8 % seen).
    Full fine-tuning, and the traced step of a model type that is none of `families`, have 5 % too: they were held to
    the CPU's allocator alone."""
    share = 0.05 if full or traced or attention in ("eager", "math") else 0.04 if quantized else 0.02
    return int(share * allocated) + card.context_error_bytes
