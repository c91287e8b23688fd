"""Compile run_torchscript and run_package against the installed torch: python scripts/deploy/build.py --out build

With g++ itself and not through CMake: the CMake files of a torch for CUDA ask for the CUDA toolkit, which a program
that runs on the CPU does not need.
"""

import argparse
import os
import shlex
import subprocess
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths

PROGRAMS = ("run_torchscript", "run_package")


def command(source: Path, target: Path) -> list[str]:
    """Return the command that compiles one program."""
    libraries = library_paths()
    return [
        *shlex.split(os.environ.get("CXX", "g++")),
        "-std=c++20",
        "-O1",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *(f"-isystem{path}" for path in include_paths()),
        str(source),
        "-o",
        str(target),
        *(f"-L{path}" for path in libraries),
        # Libraries of other vendors that libtorch itself needs are found by its own search path.
        "-Wl,--no-as-needed,--allow-shlib-undefined",
        "-ltorch",
        "-ltorch_cpu",
        "-lc10",
        *(f"-Wl,-rpath,{path}" for path in libraries),
        "-pthread",
    ]


def main() -> None:
    """Compile the programs that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("programs", nargs="*", default=PROGRAMS, metavar="PROGRAM", help=f"of {', '.join(PROGRAMS)}")
    parser.add_argument("--out", type=Path, default=Path("build"), help="folder for the programs")
    args = parser.parse_args()
    unknown = sorted(set(args.programs) - set(PROGRAMS))
    if unknown:
        parser.error(f"there is no program {', '.join(unknown)}; choose from {', '.join(PROGRAMS)}")
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.programs:
        target = args.out / name
        subprocess.run(command(Path(__file__).parent / f"{name}.cpp", target), check=True)
        print(target)


if __name__ == "__main__":
    main()
