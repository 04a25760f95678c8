"""Output folders of the checkpoint tools: whole or not there, and never in place of what somebody else put there.

    with output_folder(out, "transfuse build-mixed", inputs=[source, base], overwrite=False) as folder:
        ...                                   # write into `folder`, an empty sibling of `out`
        write_report(folder, report)          # also the mark by which a later --overwrite knows the folder as its own

The sibling is renamed when the block ends; if it raises, the sibling goes and `out` is as it was.
"""

from __future__ import annotations

import json
import os
import pwd
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REPORT = "transfuse_report.json"


class ToolError(ValueError):
    """A checkpoint tool refuses its input; the message lists every reason. Nothing was written."""


def require(what: str, problems: Sequence[str], limit: int = 50) -> None:
    """Raise one ToolError that lists all problems; do nothing where there are none."""
    if problems:
        more = [f"and {len(problems) - limit} more"] if len(problems) > limit else []
        count = f"{len(problems)} problem" + ("s" if len(problems) > 1 else "")
        raise ToolError("\n  - ".join([f"{what}: {count}", *problems[:limit], *more]))


def check_output(out: Path, tool: str, inputs: Sequence[Path], overwrite: bool) -> Path:
    """The folder that `out` means, symlinks resolved; raises ToolError unless `tool` may write it."""
    target = out.expanduser().resolve()
    problems = [*_misplaced(target, [path.expanduser().resolve() for path in inputs])]
    if not target.parent.is_dir():
        problems.append(f"{target.parent} is no folder; make it first")
    if os.path.lexists(target):
        problems += _not_replaceable(target, tool) if overwrite else ["exists; name another, or give --overwrite"]
    require(f"{tool} does not write {target}", problems)
    return target


def _misplaced(target: Path, inputs: Sequence[Path]) -> Iterator[str]:
    """Why nobody may write here, whoever wrote it before."""
    if target == Path(target.anchor) or os.path.ismount(target):
        yield "it is the root of a file system"
    homes = {Path.home().resolve(), *(Path(user.pw_dir) for user in pwd.getpwall())}
    if target in homes:
        yield "it is a home folder"
    elif any(target in home.parents for home in homes):
        yield "a home folder lies in it"
    for path in dict.fromkeys(inputs):
        if target == path:
            yield f"it is an input of this run: {path}"
        elif target in path.parents:
            yield f"an input of this run lies in it: {path}"
        elif path in target.parents:
            yield f"it lies in an input of this run: {path}"


def _not_replaceable(target: Path, tool: str) -> Iterator[str]:
    """Why an existing folder is not this tool's to replace: it holds what the tool did not write."""
    try:
        report = json.loads((target / REPORT).read_text())
        author, files = report["tool"], {REPORT, *report["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        yield f"'{tool}' did not write it: no {REPORT} there says so; remove it yourself, or name another"
        return
    if author != tool:
        yield f"'{author}' wrote it, not '{tool}'; remove it yourself, or name another"
    others = sorted({path.name for path in target.iterdir()} - files)
    if others:
        yield f"'{tool}' did not write all of it: {', '.join(others[:5])} came from elsewhere; move that away first"


@contextmanager
def output_folder(out: Path, tool: str, inputs: Sequence[Path], overwrite: bool) -> Iterator[Path]:
    """An empty folder beside `out` that takes its place when the block ends, and disappears if the block raises.

    out, inputs, overwrite: see check_output, which is asked before and, since that may be hours later, after.
    """
    target = check_output(out, tool, inputs, overwrite)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        yield folder
        check_output(out, tool, inputs, overwrite)
        # mkdtemp's 0700, and the 0600 of some writers of safetensors, would lock out those who serve the result.
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        put_in_place(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def put_in_place(folder: Path, target: Path) -> None:
    """Rename `folder` to `target`; what was there is put back if that fails, else removed."""
    if not target.exists():
        folder.rename(target)
        return
    old = folder.with_suffix(".old")
    target.rename(old)
    try:
        folder.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Write the report, which must name its "tool"; what lies in the folder is added as "files", in bytes."""
    assert isinstance(report["tool"], str)
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    (folder / REPORT).write_text(json.dumps({**report, "files": files}, indent=1) + "\n")
