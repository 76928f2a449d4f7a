"""Reads the output of ``cuobjdump -sass``: instructions of each kernel, its loops, and stores of values."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

_LINE = re.compile(r"\s+/\*([0-9a-f]+)\*/\s+(?:\{\s*)?(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
# Instructions that jump to their target, and instructions that never fall through.
_JUMPS = ("BRA", "JMP", "CALL")
_ENDS = ("BRA", "JMP", "BRX", "JMX", "RET", "EXIT")


@dataclass(frozen=True)
class Instruction:
    """``@!P0 BRA.U UP1, 0x1750``: guard "!P0", opcode "BRA.U", operands ["UP1", "0x1750"]."""

    address: int
    guard: str
    opcode: str
    operands: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def target(self) -> int | None:
        """The address that a jump with a fixed target goes to."""
        last = self.operands[-1] if self.operands else ""
        return int(last, 16) if last.startswith("0x") else None

    @property
    def is_conditional(self) -> bool:
        """Whether this jump may fall through: BRA P0, BRA.U UP0 …"""
        return bool(self.guard) or (self.name == "BRA" and len(self.operands) > 1)


@dataclass(frozen=True)
class Kernel:
    """A function for one architecture, such as "sm_90a"."""

    architecture: str
    name: str
    instructions: tuple[Instruction, ...]

    @property
    def opcodes(self) -> list[str]:
        return [instruction.opcode for instruction in self.instructions]

    @cached_property
    def successors(self) -> list[list[int]]:
        """The possible successors of each instruction, by index."""
        at = {instruction.address: i for i, instruction in enumerate(self.instructions)}
        # BSYNC goes to the target of its barrier's BSSY.
        ends: dict[str, list[int]] = {}
        for instruction in self.instructions:
            if instruction.name == "BSSY" and instruction.target in at:
                ends.setdefault(instruction.operands[0], []).append(at[instruction.target])
        found = []
        for i, instruction in enumerate(self.instructions):
            after: list[int] = []
            if instruction.name == "BSYNC":
                after += ends.get(instruction.operands[0], [])
            elif instruction.name in _JUMPS:
                if instruction.target not in at:
                    raise ValueError(f"{self.name}: cannot tell where {instruction} goes")
                after.append(at[instruction.target])
            stops = instruction.name in _ENDS and not instruction.is_conditional
            if not stops and i + 1 < len(self.instructions):
                after.append(i + 1)
            found.append(after)
        return found

    @cached_property
    def loops(self) -> list[frozenset[int]]:
        """The natural loops: for each jump back to a dominator of the jump, all instructions on the paths
        between the two, wherever they are placed.
        """
        order = _postorder(self.successors)
        position = {node: i for i, node in enumerate(order)}
        predecessors: dict[int, list[int]] = {node: [] for node in order}
        for node in order:
            for after in self.successors[node]:
                predecessors[after].append(node)
        dominator = _dominators(order, position, predecessors)
        bodies: dict[int, set[int]] = {}
        for node in order:
            for head in self.successors[node]:
                if _dominates(head, node, dominator):
                    body = bodies.setdefault(head, {head})
                    pending = [node]
                    while pending:
                        inside = pending.pop()
                        if inside not in body:
                            body.add(inside)
                            pending += predecessors[inside]
        return [frozenset(body) for body in bodies.values()]

    def innermost_loops(self, name: str) -> list[list[Instruction]]:
        """The innermost loops with instructions of this name, each by address."""
        holding = [loop for loop in self.loops if any(self.instructions[i].name == name for i in loop)]
        innermost = [loop for loop in holding if not any(other < loop for other in holding)]
        return [[self.instructions[i] for i in sorted(loop)] for loop in innermost]

    def stores_of(self, prefix: str) -> set[str]:
        """Opcodes of the stores of unmodified results of the instructions whose opcodes start so."""
        found = set()
        for i, instruction in enumerate(self.instructions):
            if instruction.opcode.startswith(prefix):
                found |= self._stores_behind(i, _number(instruction.operands[0]))
        return found

    def _stores_behind(self, start: int, register: int) -> set[str]:
        found = set()
        seen: set[int] = set()
        pending = deque(self.successors[start])
        while pending:
            i = pending.popleft()
            if i in seen:
                continue
            seen.add(i)
            instruction = self.instructions[i]
            operand = instruction.operands[-1 if instruction.name.startswith("ST") else 0 :][:1]
            first = _number(operand[0]) if operand else -1
            if 0 <= first <= register < first + _registers(instruction.opcode):
                if instruction.name.startswith("ST"):
                    found.add(instruction.opcode)
                elif not instruction.guard:
                    continue  # overwritten here
            pending += self.successors[i]
        return found


def parse(text: str) -> list[Kernel]:
    """The kernels in the output of ``cuobjdump -sass``."""
    return list(_kernels(text))


def _kernels(text: str) -> Iterator[Kernel]:
    architecture = following = name = ""
    instructions: list[Instruction] = []
    for line in [*text.splitlines(), "Function : "]:
        if match := re.match(r"\s*arch = (\w+)", line):
            following = match[1]
        elif match := re.match(r"\s*Function : (\S*)", line):
            if name:
                yield Kernel(architecture, name, tuple(instructions))
            name, instructions = match[1], []
            if name:
                architecture = following
        elif match := _LINE.match(line):
            operands = tuple(operand.strip() for operand in match[4].split(",") if operand.strip())
            instructions.append(Instruction(int(match[1], 16), match[2] or "", match[3], operands))


def _postorder(successors: list[list[int]]) -> list[int]:
    """The reachable instructions in postorder."""
    order: list[int] = []
    seen = {0}
    path = [(0, iter(successors[0]))]
    while path:
        node, rest = path[-1]
        following = next((after for after in rest if after not in seen), None)
        if following is None:
            order.append(node)
            path.pop()
        else:
            seen.add(following)
            path.append((following, iter(successors[following])))
    return order


def _dominators(
    order: list[int], position: dict[int, int], predecessors: dict[int, list[int]]
) -> dict[int, int]:
    """The immediate dominator of each instruction, by the algorithm of Cooper, Harvey and Kennedy."""
    dominator = {order[-1]: order[-1]}
    changed = True
    while changed:
        changed = False
        for node in reversed(order[:-1]):
            known = [before for before in predecessors[node] if before in dominator]
            common = known[0]
            for other in known[1:]:
                while common != other:
                    if position[common] < position[other]:
                        common = dominator[common]
                    else:
                        other = dominator[other]
            if dominator.get(node) != common:
                dominator[node] = common
                changed = True
    return dominator


def _dominates(head: int, node: int, dominator: dict[int, int]) -> bool:
    while node != head and dominator[node] != node:
        node = dominator[node]
    return node == head


def _number(operand: str) -> int:
    """12 of "R12" or "R12.H1_H1"; -1 for anything else."""
    match = re.match(r"R(\d+)\b", operand)
    return int(match[1]) if match else -1


def _registers(opcode: str) -> int:
    """Lower bound on the registers that a store reads or another instruction writes."""
    if opcode.startswith(("STSM", "LDSM")):
        return int(opcode[-1]) if opcode.endswith((".2", ".4")) else 1
    return 4 if ".128" in opcode else 2 if ".64" in opcode or ".WIDE" in opcode else 1
