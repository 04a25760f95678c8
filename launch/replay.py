"""`transfuse replay`: a recorded push done again, to see at which step its digests part."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import Json, emit

if TYPE_CHECKING:
    from weight_update.replay import Replay

SHOWN = 20  # tensors named of one parting


def replay(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Of one transaction: what 'serve --record' wrote.")],
    as_json: Json = False,
) -> None:
    """Replay a recorded push on CPU and show where its digests part.

    Puts the recorded chunks together again and compares, tensor by tensor, what the trainer meant, what came, what was
    staged and what was installed. Exit code 1 where they part.
    """
    from weight_update.replay import replay as replay_files

    from .progress import Bars

    with Bars().show("replay"):
        found = replay_files(directory)
    emit(asdict(found), _text(found), as_json)
    if found.partings or found.broken:
        raise typer.Exit(1)


def _text(found: Replay) -> str:
    from .tables import mebibytes

    kind = "changes" if found.is_delta else "whole tensors"
    size = f"{found.num_chunks} chunks, {mebibytes(found.num_bytes)} in {found.seconds:.2f} s"
    lines = [f"transaction {found.transaction}, version {found.version}, {kind}: {size}"]
    lines += [f"rank {who}: {outcome}" for who, outcome in found.outcomes.items()]
    lines += [f"not recorded: {each}" for each in found.missing]
    lines += [f"broken: {each}" for each in found.broken]
    for each in found.partings:
        lines.append(f"replica {each.replica}: {each.step} is not what was {each.before}, {len(each.tensors)} tensors:")
        lines += [f"  - {name}" for name in each.tensors[:SHOWN]]
    agree = "all digests agree" if not (found.partings or found.broken) else ""
    return "\n".join([*lines, agree] if agree else lines)
