"""The one protoc call. `python -m protos.generate` rewrites the generated code beside transfuse.proto."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
GENERATED = ("transfuse_pb2.py", "transfuse_pb2.pyi", "transfuse_pb2_grpc.py")


def generate(out: Path) -> None:
    """Write protos/{GENERATED} under `out`."""
    from grpc_tools import protoc

    # The proto is named from the repository root, so that the service stubs import `protos.transfuse_pb2`.
    code = protoc.main(
        [
            "protoc",
            f"--proto_path={HERE.parent}",
            f"--python_out={out}",
            f"--pyi_out={out}",
            f"--grpc_python_out={out}",
            "protos/transfuse.proto",
        ]
    )
    if code != 0:
        raise RuntimeError(f"protoc exited with {code} for {HERE / 'transfuse.proto'}; its message is above")


if __name__ == "__main__":
    generate(HERE.parent)
    sys.stdout.write("".join(f"protos/{name}\n" for name in GENERATED))
