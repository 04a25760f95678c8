"""Every command of README.md and docs: run against a service, or named here with the reason why not, and parsed."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from launch import cli
from quant.formats import FORMATS
from quant.layouts import LAYOUTS
from tests.local import LocalService, local_service
from tests.test_cli import byte_tokenizer
from tests.tiny import save, tiny_llama
from weight_update.client import Pusher

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHELL = ("sh", "console")
WORDS = ("transfuse", "make", "python", "torchrun", "sbatch", "vllm", "curl", "grpcurl", "pip", "ray", "kubectl")
# How a command begins, and why it is not run here: it is parsed all the same.
NOT_RUN = {
    "make": "sets up an environment of its own and takes minutes: CI runs its targets",
    "grpcurl": "is another program: tests/test_grpcurl.py makes the same calls",
    "torchrun": "starts a trainer of several ranks: tests/test_examples.py does",
    "vllm": "is another program, and needs a GPU",
    "curl": "talks to vLLM",
    "python -m sglang.launch_server": "is another program, and needs a GPU",
    "transfuse serve": "runs until it is stopped: tests/test_demo.py and test_restart.py start fleets",
    "transfuse watch": "goes on until it is stopped: tests/test_admin.py",
    "transfuse replica": "starts and ends processes: tests/test_recovery.py",
    "transfuse reset": "is for a version that was lost: tests/test_restart.py",
    "transfuse node": "needs other nodes: tests/test_node.py has two, in network namespaces",
    "transfuse doctor": "looks at a node: tests/test_node.py",
    "transfuse denoise": "takes a pipeline: tests/test_diffusion_service.py",
    "transfuse build-mixed EXPORT": "takes a FLUX.1 export: tests/test_tools.py makes one",
    "transfuse convert-fp8 EXPORT": "takes an amax state: tests/test_tools.py makes one",
    "transfuse compare REFERENCE": "compares diffusion models: tests/test_compare.py",
}
# What a reader puts his own in place of, and what stands for it here. ADDRESS is the service's.
PLACEHOLDERS = {"MODEL": "policy", "DIR": "made", "10.0.0.1": "127.0.0.1"}


@dataclass(frozen=True)
class Command:
    """One line of a page. prefix: assignments before it."""

    page: str
    line: int
    text: str

    @property
    def words(self) -> list[str]:
        """As the shell takes them, without a comment, redirection or a job's ampersand."""
        words = shlex.split(re.split(r"\s+>|\s+&$", self.text)[0], comments=True)
        return [word for word in words if not re.match(r"[A-Z_]+=\S", word)]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"


def fences(path: Path) -> Iterator[tuple[str, int, list[str]]]:
    """(language, number of its first line, lines) of every fenced block."""
    language: str | None = None
    first, lines = 0, list[str]()
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.startswith("```"):
            lines.append(line)
        elif language is None:
            language, first, lines = line[3:], number + 1, []
        else:
            yield language, first, lines
            language = None
    assert language is None, f"{path}: a fence is not closed"


def commands(path: Path) -> list[Command]:
    """Of all shell blocks of a page: every line of "sh", and what follows a "$ " of "console"."""
    found = []
    page = str(path.relative_to(ROOT))
    for language, first, lines in fences(path):
        joined = "\n".join(lines).replace("\\\n", "").splitlines() if language == "sh" else lines
        if language in SHELL:
            given = [line if language == "sh" else line[2:] for line in joined if language == "sh" or line[:2] == "$ "]
            found += [Command(page, first, text) for text in given if text]
    return found


COMMANDS = [each for path in PAGES for each in commands(path)]
SPOKEN = sorted(
    {
        (str(path.relative_to(ROOT)), span)
        for path in PAGES
        for span in re.findall(r"`(transfuse [^`]+)`", re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL))
    }
)


def reason(command: Command) -> str:
    """Why it is not run; "" where it is."""
    said = " ".join(command.words)
    options = re.sub(r"^transfuse (--\S+ \S+ )+", "transfuse ", said)
    return next((why for start, why in NOT_RUN.items() if options == start or options.startswith(f"{start} ")), "")


def parsed(words: Sequence[str]) -> None:
    """AssertionError unless there is such a command of ours, with such options."""
    group: Any = cli.get_command(cli.app)
    rest = list(words)
    while hasattr(group, "commands"):
        options = {option for each in group.params for option in each.opts}
        while rest and rest[0] in options:
            del rest[:2]
        assert rest and rest[0] in group.commands, f"{' '.join(words)}: expected one of {', '.join(group.commands)}"
        group = group.commands[rest.pop(0)]
    known = {option for each in group.params for option in (*each.opts, *each.secondary_opts)}
    given = {word.partition("=")[0] for word in rest if word.startswith("--")}
    assert given <= known, f"{' '.join(words)}: no option {', '.join(sorted(given - known))}"


# ---------------------------------------------------------------- what needs no service


def test_commands_stand_in_blocks_that_say_so() -> None:
    for path in PAGES:
        for language, first, lines in fences(path):
            if language not in SHELL:
                wrong = [line for line in lines if line.split(" ")[0] in WORDS]
                assert not wrong, f"{path}:{first}: mark this block as sh or console: {wrong}"
        outside = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
        assert not re.search(rf"^ {{4}}({'|'.join(WORDS)}) ", outside, re.MULTILINE), f"{path}: put it into a block"
    assert len(COMMANDS) > 40


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_every_command_exists_with_its_options(command: Command) -> None:
    first, *rest = command.words
    if first == "transfuse":
        parsed(rest)
    elif first == "make":
        assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif first == "python" and not reason(command):
        assert rest[0] == "-m" and importlib.util.find_spec(rest[1]), f"{command}: no such module"
    else:
        assert reason(command), f"{command}: run it here, or say in NOT_RUN why not"


@pytest.mark.parametrize(("page", "span"), SPOKEN, ids=lambda each: each)
def test_commands_within_sentences_exist_too(page: str, span: str) -> None:
    said = re.sub(r"[][]|\.\.\.", " ", span)  # optional parts
    words = said.split()[1:]
    names = [word for word in words if word != "|"] if "|" in words else [words[0]]
    for name in names:
        parsed([name, *(() if "|" in words else words[1:])])


def test_every_reason_is_of_a_command_that_is_there() -> None:
    said = [" ".join(each.words) for each in COMMANDS]
    for start in NOT_RUN:
        pattern = start.replace("transfuse ", r"transfuse (--\S+ \S+ )*")
        assert any(re.match(pattern, each) for each in said), f"no page has {start!r} any more"


def test_links_and_pictures_lead_somewhere() -> None:
    for path in PAGES:
        text = path.read_text()
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            file, _, heading = target.partition("#")
            if "://" in target:
                continue
            there = path if not file else path.parent / file
            assert there.exists(), f"{path}: {target}"
            if heading:
                heads = re.findall(r"^#+ (.+)$", there.read_text(), re.MULTILINE)
                slugs = {re.sub(r"[^a-z0-9 -]", "", each.lower()).replace(" ", "-") for each in heads}
                assert heading in slugs, f"{path}: {target}"


def test_the_readme_names_every_page_and_the_size_of_the_tables() -> None:
    readme = (ROOT / "README.md").read_text()
    assert f"{len(FORMATS)} formats and {len(LAYOUTS)} layouts" in readme
    for path in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{path.name})" in readme, f"README.md has no line for docs/{path.name}"


# ---------------------------------------------------------------- what does


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalService]:
    folder = tmp_path_factory.mktemp("service")
    model = _policy(folder, "model", 0)
    with local_service(model, folder, ("trtllm", "cutlass"), store_dir=folder / "versions") as running:
        with closing(Pusher(running.address)) as pusher:
            pusher.push(tiny_llama(seed=3), durable=True)  # so that there is something to go back to
        yield running


def _policy(folder: Path, name: str, seed: int) -> Path:
    PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer()).save_pretrained(folder / name)
    return save(tiny_llama(seed=seed), folder / name)


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted({each.page for each in COMMANDS if not reason(each)}))
@pytest.mark.filterwarnings("ignore")  # what nvidia-modelopt and transformers say while they calibrate
def test_the_commands_of_a_page_run_in_its_order(
    page: str, service: LocalService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRANSFUSE_SERVICE", service.address)
    _policy(tmp_path, "policy", 1)
    _policy(tmp_path, "trained", 2)
    (tmp_path / "prompts.txt").write_text("The capital of France is Paris.\n")
    for command in COMMANDS:
        if command.page != page or reason(command):
            continue
        words = [_filled(word) for word in command.words[1:]]
        with pytest.raises(SystemExit) as ended:
            cli.main(words)
        assert not ended.value.code, f"{command} ended with {ended.value.code}"


def _filled(word: str) -> str:
    for placeholder, value in PLACEHOLDERS.items():
        word = re.sub(rf"\b{re.escape(placeholder)}\b", value, word)
    return word
