"""The filter of system calls (seccomp) that every program in the sandbox runs under.

Namespaces leave some doors open: sockets that are not Unix sockets (vsock ignores network namespaces), the kernel's key
rings, memory that no limit counts (memfd, System V, shared anonymous mappings, large socket buffers), and calls that no
program here needs. This filter closes them. The refused call fails with EPERM; the program goes on.
"""

from __future__ import annotations

import functools
import platform
import struct

from kdcache.errors import KDError

#: AUDIT_ARCH_*, the kernel's number for a machine and its byte order (linux/audit.h).
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

#: The numbers of the refused system calls, on x86_64 and on aarch64. Newer calls have one number everywhere.
REFUSED_CALLS = {
    # They look into other processes, or change them.
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    # They change what the program sees of the machine.
    "mount": (165, 40),
    "umount2": (166, 39),
    "unshare": (272, 97),
    "setns": (308, 268),
    # They reach the kernel's key rings, which know no namespace.
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    # They hold memory that no limit counts, or open large parts of the kernel to attacks.
    "shmget": (29, 194),
    "msgget": (68, 186),
    "perf_event_open": (298, 241),
    "memfd_create": (319, 279),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "setsockopt": (54, 208),  # it enlarges socket buffers
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "pidfd_getfd": (438, 438),
    "memfd_secret": (447, 447),
}
#: Two calls are refused by what they ask for.
MMAP = (9, 222)
SOCKET = (41, 198)

#: MAP_SHARED | MAP_ANONYMOUS: After MADV_DONTNEED such pages are in no count of a process, but they stay in memory.
SHARED_ANONYMOUS = 0x21
AF_UNIX = 1
#: Numbers from here on are x32's, a second numbering of the calls on x86_64. (No call on aarch64 is that high.)
X32_CALLS = 0x40000000

# The filter is a program of classic BPF: 8 bytes per instruction, one accumulator, and jumps that only go forward
# (linux/filter.h). An instruction is (operation, jump if true, jump if false, operand). A jump is the number of
# instructions to skip: 0 goes on with the next instruction.
LOAD_WORD = 0x20  # BPF_LD | BPF_W | BPF_ABS: accumulator = the 4 bytes at this offset of struct seccomp_data
IF_EQUAL = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
IF_AT_LEAST = 0x35  # BPF_JMP | BPF_JGE | BPF_K
AND = 0x54  # BPF_ALU | BPF_AND | BPF_K: accumulator &= operand
RETURN = 0x06  # BPF_RET | BPF_K

KILL_PROCESS, REFUSE_WITH_EPERM, ALLOW = 0x80000000, 0x00050001, 0x7FFF0000  # SECCOMP_RET_*; EPERM is 1

# Offsets in struct seccomp_data (linux/seccomp.h): what the kernel tells the filter about a call. An argument has 8
# bytes, of which the low 4 come first on both machines.
CALL_NUMBER, ARCHITECTURE, FIRST_ARGUMENT, FOURTH_ARGUMENT = 0, 4, 16, 40


@functools.cache
def filter_program() -> bytes:
    """Return the seccomp program for this machine, as bubblewrap's --seccomp reads it; KDError for an unknown machine.

    ::

        architecture is ours? --no--> kill the process: its call numbers would mean other calls
                |yes
        number is x32's? -----yes--> refuse
                |no
        a refused call? ------yes--> refuse       (one pair of instructions per refused call)
                |no
        mmap? --yes--> flags hold MAP_SHARED and MAP_ANONYMOUS? --yes--> refuse
                |no                        |no
                |                          +-------------------------> allow
        socket? --yes--> family is AF_UNIX? --no--> refuse
                |no                |yes
                +------------------+---------------------------------> allow
    """
    machine = platform.machine()
    if machine not in ARCHITECTURES:
        raise KDError(f"the sandbox has no filter of system calls for {machine}, only {', '.join(ARCHITECTURES)}")
    column = list(ARCHITECTURES).index(machine)
    code = [
        (LOAD_WORD, 0, 0, ARCHITECTURE),
        (IF_EQUAL, 1, 0, ARCHITECTURES[machine]),  # ours: skip the kill
        (RETURN, 0, 0, KILL_PROCESS),
        (LOAD_WORD, 0, 0, CALL_NUMBER),  # it stays in the accumulator until a call's arguments are looked at
        (IF_AT_LEAST, 0, 1, X32_CALLS),  # below: skip the refusal
        (RETURN, 0, 0, REFUSE_WITH_EPERM),
    ]
    for numbers in REFUSED_CALLS.values():
        code += [(IF_EQUAL, 0, 1, numbers[column]), (RETURN, 0, 0, REFUSE_WITH_EPERM)]
    code += [
        (IF_EQUAL, 0, 5, MMAP[column]),  # another call: skip to the test for socket
        (LOAD_WORD, 0, 0, FOURTH_ARGUMENT),  # the flags
        (AND, 0, 0, SHARED_ANONYMOUS),
        (IF_EQUAL, 0, 1, SHARED_ANONYMOUS),  # not both flags: skip the refusal
        (RETURN, 0, 0, REFUSE_WITH_EPERM),
        (RETURN, 0, 0, ALLOW),
        (IF_EQUAL, 0, 3, SOCKET[column]),  # another call: skip to the end
        (LOAD_WORD, 0, 0, FIRST_ARGUMENT),  # the address family
        (IF_EQUAL, 1, 0, AF_UNIX),  # a Unix socket: skip the refusal
        (RETURN, 0, 0, REFUSE_WITH_EPERM),
        (RETURN, 0, 0, ALLOW),
    ]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)
