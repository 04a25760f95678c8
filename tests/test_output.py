"""Output folders of the checkpoint tools: whole or not there, and no refusal that is not asked for."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest

from quant.output import REPORT, ToolError, check_output, output_folder, put_in_place, write_report

TOOL = "transfuse build-mixed"


def write(
    out: Path, text: str = "new", *, tool: str = TOOL, inputs: tuple[Path, ...] = (), overwrite: bool = False
) -> None:
    with output_folder(out, tool, inputs, overwrite) as folder:
        (folder / "weights").write_text(text)
        write_report(folder, {"tool": tool})


def tree(root: Path) -> dict[str, str | None]:
    """Everything below a folder: path -> content, None for a folder; symlinks are not followed."""
    found = {}
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = Path(folder) / name
            found[str(path.relative_to(root))] = path.read_text() if path.is_file() and not path.is_symlink() else None
    return found


def mark(folder: Path, *names: str) -> None:
    """Make a folder look as if the tool had written it, with all that it holds."""
    assert folder.is_dir()
    files = "".join(f'"{name}": 1, ' for name in names)
    (folder / REPORT).write_text(f'{{"tool": "{TOOL}", "files": {{{files}"x": 1}}}}')


def test_a_folder_appears_whole_and_others_may_read_it(tmp_path: Path) -> None:
    seen = []
    with output_folder(tmp_path / "out", TOOL, [], overwrite=False) as folder:
        (folder / "private").touch(0o600)
        seen = [path.name for path in tmp_path.iterdir()]
        assert folder.parent == tmp_path and not (tmp_path / "out").exists()
        write_report(folder, {"tool": TOOL, "counts": {}})
    assert len(seen) == 1 and [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "out" / "private").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failing_run_leaves_nothing_and_the_old_folder_as_it_was(tmp_path: Path, error: type[BaseException]) -> None:
    write(tmp_path / "out", "old")
    before = tree(tmp_path)
    for out in ("out", "other"):
        with (
            pytest.raises(error),
            output_folder(tmp_path / out, TOOL, [], overwrite=True) as folder,
        ):
            (folder / "weights").write_text("half")
            raise error
    assert tree(tmp_path) == before


def test_what_the_tool_wrote_before_is_replaced_on_request(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    with pytest.raises(ToolError, match="exists; name another, or give --overwrite"):
        write(tmp_path / "out")
    write(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_link_to_what_the_tool_wrote_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    write(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "weights").read_text() == "new"


def test_an_old_folder_that_somebody_adds_to_during_the_run_is_kept(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    with (
        pytest.raises(ToolError, match=r"notes\.txt came from elsewhere"),
        output_folder(tmp_path / "out", TOOL, [], overwrite=True) as folder,
    ):
        write_report(folder, {"tool": TOOL})
        (tmp_path / "out" / "notes.txt").write_text("precious")
    assert (tmp_path / "out" / "notes.txt").read_text() == "precious"
    assert (tmp_path / "out" / "weights").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_old_folder_comes_back_if_the_new_one_cannot_take_its_place(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    before = tree(tmp_path)
    with pytest.raises(FileNotFoundError):
        put_in_place(tmp_path / ".out.partial", tmp_path / "out")  # as if a cleaner of temporary files was there
    assert tree(tmp_path) == before


# In each world: source/transformer and base are inputs; everything is marked as the tool's own, so that only the rule
# under test stands between the tool and the folder.
REFUSED = {
    "source": ("source/transformer", "is an input of this run"),
    "base": ("base", "is an input of this run"),
    "parent_of_the_source": ("source", "an input of this run lies in it"),
    "grandparent_of_the_source": (".", "an input of this run lies in it"),
    "inside_the_source": ("source/transformer/text", "lies in an input of this run"),
    "new_inside_the_source": ("source/transformer/new", "lies in an input of this run"),
    "dots_to_the_base": ("foreign/../base", "is an input of this run"),
    "link_to_the_base": ("link_to_base", "is an input of this run"),
    "link_into_the_source": ("link_to_source/transformer", "is an input of this run"),
    "home": ("home/me", "is a home folder"),
    "parent_of_home": ("home", "a home folder lies in it"),
    "tilde": ("~", "is a home folder"),
    "another_user_s_home": (pwd.getpwuid(0).pw_dir, "is a home folder"),
    "root": ("/", "is the root of a file system"),
    "mount_point": ("/proc", "is the root of a file system"),
    "unmarked": ("foreign", "did not write it"),
    "empty": ("empty", "did not write it"),
    "a_file": ("file", "did not write it"),
    "broken_mark": ("broken", "did not write it"),
    "another_tool_s": ("converted", "'transfuse convert-fp8' wrote it"),
    "added_to": ("added_to", r"mine\.txt came from elsewhere"),
    "nowhere": ("nowhere/out", "is no folder; make it first"),
}


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("source/transformer/text", "base", "home/me", "foreign", "empty", "broken", "converted", "added_to"):
        (tmp_path / name).mkdir(parents=True)
    for name in (".", "source", "source/transformer", "source/transformer/text", "base", "home", "home/me"):
        mark(tmp_path / name, *[path.name for path in (tmp_path / name).iterdir()])
    (tmp_path / "file").write_text("a file")
    (tmp_path / "foreign" / "thesis.txt").write_text("years of work")
    (tmp_path / "broken" / REPORT).write_text("{")
    (tmp_path / "converted" / REPORT).write_text('{"tool": "transfuse convert-fp8", "files": {}}')
    (tmp_path / "added_to" / "mine.txt").write_text("mine")
    mark(tmp_path / "added_to")
    (tmp_path / "link_to_base").symlink_to("base")
    (tmp_path / "link_to_source").symlink_to("source")
    mark(tmp_path, *[path.name for path in tmp_path.iterdir()])
    monkeypatch.setenv("HOME", str(tmp_path / "home" / "me"))
    return tmp_path


@pytest.mark.parametrize("case", REFUSED)
def test_overwrite_refuses_what_is_not_the_tool_s_to_replace(world: Path, case: str) -> None:
    where, why = REFUSED[case]
    out = Path(where) if where[0] in "~/" else world / where
    inputs = (world / "source" / "transformer", world / "base")
    before = tree(world)
    with pytest.raises(ToolError, match=why), output_folder(out, TOOL, inputs, overwrite=True):
        pytest.fail("the run must not begin")
    assert tree(world) == before


def test_the_same_folders_are_free_once_no_rule_speaks_for_them(world: Path) -> None:
    """The world refuses by rules, not by accident: what is marked and no input of the run is replaced."""
    (world / "converted" / REPORT).write_text(f'{{"tool": "{TOOL}", "files": {{}}}}')
    for name in ("base", "converted"):
        write(world / name, inputs=(world / "source" / "transformer",), overwrite=True)
        assert (world / name / "weights").read_text() == "new"


def test_all_reasons_are_given_at_once(world: Path) -> None:
    with pytest.raises(ToolError, match="2 problems") as caught:
        check_output(world / "foreign", TOOL, [world / "foreign" / "x"], overwrite=True)
    assert "an input of this run lies in it" in str(caught.value) and "did not write it" in str(caught.value)
