"""Every error that a user of Transfuse can meet.

    WeightUpdateError                  what, where, expected, got, what to do next
      ManifestError(ValueError)        a push does not match what the service holds
      PlanError(ValueError)            format, layout, shape, sharding or memory do not fit
      LayoutError(RuntimeError)        a layout is missing, applied twice, or a rebind after the seal
      TransferError(ConnectionError)   bytes did not arrive as they were sent
      DigestError(TransferError)       bytes arrived, and are not what the trainer meant
      VersionError(RuntimeError)       wrong base version, or no such version
      BusyError(RuntimeError)          another transaction is open, or serving is paused
      MemberError(RuntimeError)        a rank failed or is fenced
      StoreError(RuntimeError)         a version cannot be written to, or read from, the version store
      DeniedError(PermissionError)     whoever asks may not do this
      UnconfirmedError(RuntimeError)   nobody said yes to a command that takes something away

All are picklable, since they cross processes. `code` is stable: scripts and the wire use it.
"""

from __future__ import annotations

from collections.abc import Sequence


class WeightUpdateError(Exception):
    """Base of all errors of the weight-update job."""

    code = "internal"


class ManifestError(WeightUpdateError, ValueError):
    """A push does not match what the service holds; the message lists every mismatch."""

    code = "manifest"


class PlanError(WeightUpdateError, ValueError):
    """Format, layout, shape, sharding or memory do not fit together."""

    code = "plan"


class LayoutError(WeightUpdateError, RuntimeError):
    """A layout is missing or applied twice, or a sealed tensor would be rebound."""

    code = "layout"


class TransferError(WeightUpdateError, ConnectionError):
    """Bytes did not arrive as they were sent."""

    code = "transfer"


class DigestError(TransferError):
    """Bytes arrived whole, and are not what the trainer meant to send."""

    code = "digest"


class VersionError(WeightUpdateError, RuntimeError):
    """The base version is not the current one, or a version does not exist."""

    code = "version"


class BusyError(WeightUpdateError, RuntimeError):
    """Another transaction is open."""

    code = "busy"


class MemberError(WeightUpdateError, RuntimeError):
    """A rank failed or is fenced."""

    code = "member"


class StoreError(WeightUpdateError, RuntimeError):
    """The version store cannot write, or read, a version."""

    code = "store"


class DeniedError(WeightUpdateError, PermissionError):
    """Whoever asks has no token, or none of the role that this takes."""

    code = "denied"


class UnconfirmedError(WeightUpdateError, RuntimeError):
    """A command that takes something away was not confirmed; nothing was done."""

    code = "unconfirmed"


ERRORS: dict[str, type[WeightUpdateError]] = {
    error.code: error
    for error in (
        WeightUpdateError,
        ManifestError,
        PlanError,
        LayoutError,
        TransferError,
        DigestError,
        VersionError,
        BusyError,
        MemberError,
        StoreError,
        DeniedError,
        UnconfirmedError,
    )
}


def raise_all(error: type[WeightUpdateError], what: str, problems: Sequence[str], limit: int = 50) -> None:
    """Raise one `error` that lists every problem, `limit` of them in full; do nothing where there are none."""
    if not problems:
        return
    lines = [f"  - {problem}" for problem in problems[:limit]]
    if len(problems) > limit:
        lines.append(f"  - and {len(problems) - limit} more")
    count = f"{len(problems)} problem" + ("s" if len(problems) != 1 else "")
    raise error("\n".join([f"{what}: {count}", *lines]))
