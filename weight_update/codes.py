"""Error codes: what each means, where it comes from, what to do. One table: `transfuse explain` and docs/errors.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .errors import ERRORS


@dataclass(frozen=True, slots=True, kw_only=True)
class Code:
    """One row: for people, in sentences."""

    code: str
    means: str
    cause: str
    cure: str


ROWS = (
    Code(
        code="manifest",
        means="a push does not match what the service holds",
        cause="The trainer's model has other names, shapes or formats than the served one, a tensor of the scope is"
        " missing, or a value is not finite. The message lists every mismatch; nothing was staged.",
        cure="Compare with 'transfuse describe'. Push the model that is served, or serve the model that is trained;"
        " narrow --scope to what is meant; look for NaN in the step before.",
    ),
    Code(
        code="plan",
        means="format, layout, shape, sharding, memory or an argument do not fit together",
        cause="The planner refused before anything was changed: an unknown name, a checkpoint that cannot be read, a"
        " shape that a layout does not take, or a peak above the memory budget.",
        cure="Read which value was expected. 'transfuse formats' lists formats and layouts; for memory raise the budget"
        " or serve the model on more ranks.",
    ),
    Code(
        code="layout",
        means="a kernel layout is missing or applied twice, or a sealed tensor was moved",
        cause="Something outside of Transfuse replaced a parameter's storage after the model was built, or wrote into"
        " padding. The commit was undone and the old version serves.",
        cure="Find what rebinds the parameter that the message names (param.data =, load_state_dict with assign=True,"
        " an optimizer on the serving side) and make it copy in place. Then push again.",
    ),
    Code(
        code="transfer",
        means="bytes did not arrive, or not as they were sent",
        cause="No service at the address, a broken connection that did not come back within the retry time, a chunk"
        " whose checksum is wrong, or a lapsed lease of a trainer.",
        cure="'transfuse status' against the same address shows whether the service is up. Check address, firewall and"
        " network, then push again: an unfinished push changed nothing, and a push id is never committed twice.",
    ),
    Code(
        code="digest",
        means="bytes arrived whole and are not what the trainer meant",
        cause="A digest of staged or installed bytes differs from the trainer's: memory or a disk flipped bits, two"
        " replicas loaded different files, or a model changed while it was being pushed. The push was undone.",
        cure="Push again. If the same rank is named twice, drain its replica and replace its host's memory;"
        " 'transfuse verify' reads everything again, 'transfuse replay' shows at which step the digests part.",
    ),
    Code(
        code="version",
        means="not the current version, or no such version",
        cause="A push named a base that is not current, a rollback a version that no replica and no store holds, or the"
        " coordinator was replaced by a newer one.",
        cure="'transfuse versions' shows what is current and what can be reached. Push without a base, or roll back to"
        " a listed version.",
    ),
    Code(
        code="busy",
        means="another push is open, a commit is in progress, or serving is paused or drained",
        cause="One transaction runs at a time, and an operator's pause or drain outlives it.",
        cure="'transfuse status' says who holds the slot and since when. Wait for it, or 'transfuse abort' where its"
        " trainer is gone; 'transfuse resume' ends a pause or a drain.",
    ),
    Code(
        code="member",
        means="a rank failed, is fenced, or cannot be reached",
        cause="A process died, a host is gone, a step of the protocol failed on a rank, or its bytes were found to be"
        " damaged. Its replica serves nothing until it is filled again; the others go on.",
        cure="'transfuse status' gives the reason. A fleet rebuilds the replica by itself; where it does not, read the"
        " rank's log, then 'transfuse replica remove' it and 'transfuse replica add' another.",
    ),
    Code(
        code="store",
        means="the version store cannot write, or read, a version",
        cause="Its disk is full, read-only or gone, or a stored file is damaged. Serving goes on; the version is not"
        " durable.",
        cure="'transfuse status' says what the disk answered. Free it, or lower --keep; writing is tried again every"
        " few seconds. For a damaged file export another version.",
    ),
    Code(
        code="denied",
        means="whoever asks may not do this",
        cause="No token was shown, one that the service does not know, one of a lesser role than the call takes, or a"
        " push of another name is to be joined.",
        cure="Name the file with --token-file or TRANSFUSE_TOKEN_FILE. 'transfuse tokens list' shows names and roles;"
        " 'transfuse tokens add' makes one, which running services take up at once.",
    ),
    Code(
        code="unconfirmed",
        means="a command that takes something away was not confirmed",
        cause="It runs without a terminal, so that nobody could be asked, or the answer was no. Nothing was done.",
        cure="Read what it says will happen; add --yes where that is meant.",
    ),
    Code(
        code="internal",
        means="an error that belongs to no other code",
        cause="A defect of Transfuse, or of something below it.",
        cure="Keep the message, the coordinator's log and 'transfuse events --json', and report them. Nothing that was"
        " not decided is served.",
    ),
)
CODES: Mapping[str, Code] = {row.code: row for row in ROWS}
assert CODES.keys() == ERRORS.keys(), "every code has one row"
