"""The loops of a kernel's disassembly that hold its tensor-core products, and what each of them does in an iteration.

A loop is a natural loop (Aho, Lam, Sethi, Ullman, Compilers, 9.6): a jump back to a place that every way to the jump
comes by, and all that can reach the jump without passing that place. Code that was moved out of a loop's way and jumps
back into its middle makes no loop of its own. Reads nvdisasm's listing and AMD's assembly.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_LABEL = re.compile(r"^\s*([.\w$]+):")
_NVIDIA = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z]\w*(?:\.\w+)*)\s*([^;]*);")
_AMD = re.compile(r"^\s+([a-z]\w+)\b([^;]*)")
_TARGET = re.compile(r"(\.L\w+)")

# The opcodes, without what follows a dot, of asynchronous copies into shared memory.
_COPIES = ("LDGSTS", "UTMALDG", "UBLKCP")


class Loop(NamedTuple):
    """What an iteration of a main loop has of each: all instructions, tensor-core products, sm_90's waits for products
    under way (WARPGROUP.DEPBAR), its beginnings of groups of them (WARPGROUP.ARRIVE), asynchronous copies."""

    instructions: int
    products: int
    waits: int
    arrives: int
    copies: int

    @property
    def serialised(self) -> bool:
        """Whether each product is waited for before the next begins."""
        return self.products > 1 and self.waits >= self.products


class _Line(NamedTuple):
    opcode: str
    targets: tuple[str, ...]  # labels that it may jump to
    goes_on: bool  # whether the next instruction may follow


def is_product(opcode: str) -> bool:
    """Whether an instruction multiplies matrices: HMMA, HGMMA, UTCHMMA with what follows a dot; v_mfma_*."""
    return opcode.partition(".")[0].endswith("MMA") or "mfma_" in opcode


def main_loops(listing: str) -> list[Loop]:
    """The innermost loops with tensor-core products, in the order of the code, of a kernel's nvdisasm -c or of its AMD
    assembly."""
    lines, labels = _parse(listing)
    products = {i for i, line in enumerate(lines) if is_product(line.opcode)}
    if not products:
        return []
    after = [[labels[t] for t in line.targets if t in labels] for line in lines]
    for i, line in enumerate(lines[:-1]):
        if line.goes_on:
            after[i].append(i + 1)
    before: list[list[int]] = [[] for _ in lines]
    for i, following in enumerate(after):
        for j in following:
            before[j].append(i)
    loops: dict[int, set[int]] = {}
    for i, line in enumerate(lines):
        for head in (labels[t] for t in line.targets if t in labels):
            if head <= i and i not in _reach(after, 0, head):
                loops[head] = loops.get(head, set()) | _reach(before, i, head) | {head}
    bodies = [body for body in loops.values() if body & products]
    innermost = [body for body in bodies if not any(other < body for other in bodies)]
    return [_count([lines[i].opcode for i in body]) for body in sorted(innermost, key=min)]


def _parse(listing: str) -> tuple[list[_Line], dict[str, int]]:
    """All instructions, and for each label the index of the first one after it."""
    lines: list[_Line] = []
    labels: dict[str, int] = {}
    for text in listing.splitlines():
        if found := _LABEL.match(text):
            labels[found[1]] = len(lines)
        elif found := _NVIDIA.match(text):
            predicate, opcode, operands = found.groups()
            jumps = opcode.startswith(("BRA", "JMP"))
            # BRA.U UP0 and BRA P0 have their condition among the operands
            always = predicate is None and (operands.lstrip("`(").startswith(".L") or not jumps)
            ends = always and (jumps or opcode.partition(".")[0] in ("EXIT", "RET", "BRX", "KILL"))
            lines.append(_Line(opcode, tuple(_TARGET.findall(operands)) if jumps else (), not ends))
        elif found := _AMD.match(text):
            opcode, operands = found.groups()
            jumps = opcode.startswith(("s_branch", "s_cbranch"))
            ends = opcode in ("s_branch", "s_endpgm", "s_setpc_b64")
            lines.append(_Line(opcode, tuple(_TARGET.findall(operands)) if jumps else (), not ends))
    return lines, {label: index for label, index in labels.items() if index < len(lines)}


def _reach(graph: list[list[int]], start: int, without: int) -> set[int]:
    """What can be reached from `start`, itself too, by ways that do not pass `without`."""
    found, left = set(), [start]
    while left:
        node = left.pop()
        if node != without and node not in found:
            found.add(node)
            left += graph[node]
    return found


def _count(opcodes: list[str]) -> Loop:
    return Loop(
        instructions=len(opcodes),
        products=sum(map(is_product, opcodes)),
        waits=sum(opcode.startswith("WARPGROUP.DEPBAR") for opcode in opcodes),
        arrives=sum(opcode.startswith("WARPGROUP.ARRIVE") for opcode in opcodes),
        copies=sum(opcode.partition(".")[0] in _COPIES for opcode in opcodes),
    )
