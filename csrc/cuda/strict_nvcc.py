"""Run a compiler command, and fail also when ptxas reports that a kernel came out slow.

Usage: strict_nvcc.py NVCC ARGUMENTS...    (CMake's CUDA_COMPILER_LAUNCHER)

ptxas only warns when it spills registers (with -warn-spills) and merely notes C7510 and C7511, that it
serialised wgmma; its -Werror knows nothing of notes. Either makes a decode kernel miss its purpose.
"""

import re
import subprocess
import sys

SLOW = re.compile(r"Registers are spilled|\bC751[01]\b|wgmma\S* instructions are serialized")


def main() -> int:
    done = subprocess.run(sys.argv[1:], stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True)
    sys.stderr.write(done.stdout)
    slow = [line for line in done.stdout.splitlines() if SLOW.search(line)]
    if done.returncode == 0 and slow:
        sys.stderr.write(
            f"error: ptxas spilled registers or serialised wgmma, {len(slow)} times (above). Make the kernel "
            "smaller, or build with -DJAX_TRIRUN_CUDA_STRICT=OFF to have it all the same.\n"
        )
        return 1
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
