"""The command line: exit codes, which stream says what, and one clear line for every bad input."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from command import Terminal, run
from safetensors.torch import load_file, save_file
from tiny import seen

from lowmem_adamms import __version__
from lowmem_adamms.cli import COMMANDS, console, parse

ROOT = Path(__file__).parents[2]
INDEX = "model.safetensors.index.json"
Pair = tuple[Path, Path]
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def copies(pair: Pair, tmp_path: Path) -> Pair:
    """The pair again, to be spoilt."""
    base, donor = (shutil.copytree(side, tmp_path / side.name) for side in pair)
    return base, donor


def shell(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lowmem_adamms", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )


def assert_one_error(out: str, err: str, words: str = "") -> None:
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert err.startswith("error: ")
    assert re.search(words, err), err


# The commands


def test_help_and_version_in_a_real_process() -> None:
    done = shell("--help")
    assert done.returncode == 0
    assert done.stderr == ""
    for command in COMMANDS:
        assert re.search(rf"^ +{command} ", done.stdout, re.MULTILINE)
    assert shell("--version").stdout == f"{__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: Capture) -> None:
    assert run(command, "--help") == 0
    assert "usage: python -m lowmem_adamms" in capsys.readouterr().out


def test_a_merge_in_a_real_process_puts_its_result_on_stdout(pair: Pair, tmp_path: Path) -> None:
    done = shell(*pair, "-o", tmp_path / "out", "--alpha", "0.3")
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(
        rf"{re.escape(str(tmp_path / 'out'))}: \d+ tensors interpolated, \d+ copied, \d.*B\n",
        done.stdout,
    )
    assert "\x1b" not in done.stderr  # no bar where nobody watches
    assert (tmp_path / "out" / "adamms.json").is_file()


def test_an_error_in_a_real_process_is_one_line_and_2(pair: Pair, tmp_path: Path) -> None:
    done = shell(*pair, "-o", tmp_path / "out", "--alpha", "1.5")
    assert done.returncode == 2
    assert_one_error(done.stdout, done.stderr, "alpha is 1.5")


def test_merge_may_be_left_out(pair: Pair, tmp_path: Path, capsys: Capture) -> None:
    assert run(*pair, "-o", tmp_path / "a", "--alpha", "0.3") == 0
    assert run("merge", *pair, "--alpha", "0.3", "--out", tmp_path / "b") == 0
    assert seen(tmp_path / "a") == seen(tmp_path / "b")
    assert "error" not in capsys.readouterr().err


def test_a_mistyped_command_is_not_taken_for_a_model(capsys: Capture) -> None:
    assert run("verfy", "somewhere") == 2
    assert_one_error(
        *capsys.readouterr(), r"^error: verfy: no such folder or file, nor a command \("
    )


def test_options_reach_the_merge(pair: Pair, tmp_path: Path, capsys: Capture) -> None:
    words = ["--dtype", "fp32", "--embeddings", "keep", "--max-shard-size", "200kB"]
    words += ["--rounding", "nearest"]
    assert run(*pair, "-o", tmp_path / "out", "--alpha", "0.5", *words) == 0
    recipe = json.loads((tmp_path / "out" / "adamms.json").read_bytes())
    assert recipe["alpha"] == 0.5
    assert recipe["options"] == {
        "embeddings": "keep",
        "dtype": "F32",
        "unmatched": "stop",
        "rounding": "nearest",
    }
    assert len(recipe["outputs"]) > 4
    assert run("verify", tmp_path / "out", "--deep", "--base", pair[0], "--donor", pair[1]) == 0
    assert ": ok, " in capsys.readouterr().out


def test_what_one_side_lacks_stops_a_merge_or_is_noted_everywhere(
    pair: Pair, tmp_path: Path, capsys: Capture
) -> None:
    donor = tiny.respell(
        pair[1], lambda name: None if name.endswith("q_proj.bias") else name, tmp_path / "donor"
    )
    words = (pair[0], donor, "-o", tmp_path / "out", "--alpha", "0.3")
    assert run(*words) == 2
    assert_one_error(*capsys.readouterr(), r"q_proj\.bias and \d+ more, .* --unmatched keep")
    assert run(*words, "--unmatched", "keep") == 0
    note = "the base's are kept"
    assert note in capsys.readouterr().err
    recipe = json.loads((tmp_path / "out" / "adamms.json").read_bytes())
    assert recipe["options"]["unmatched"] == "keep"
    assert any(note in line for line in recipe["notes"])
    assert note in (tmp_path / "out" / "README.md").read_text()
    assert run("verify", tmp_path / "out", "--deep", "--base", pair[0], "--donor", donor) == 0


def test_verify_tells_what_it_checked(pair: Pair, tmp_path: Path, capsys: Capture) -> None:
    run(*pair, "-o", tmp_path / "out", "--alpha", "0.3")
    capsys.readouterr()
    assert run("verify", tmp_path / "out") == 0
    shallow = capsys.readouterr()
    assert re.search(r": ok, \d+ tensors in 3 shards, [\d.]+ kB\n$", shallow.out)
    assert run("verify", tmp_path / "out", "--deep", "--base", pair[0], "--donor", pair[1]) == 0
    assert re.search(r", \d+ sampled rows equal to the recipe's\n$", capsys.readouterr().out)
    (tmp_path / "out" / "adamms.json").unlink()
    assert run("verify", tmp_path / "out") == 2
    assert_one_error(*capsys.readouterr(), "was not written by lowmem-adamms")


def test_notes_go_to_stderr(copies: Pair, tmp_path: Path, capsys: Capture) -> None:
    (copies[1] / "tokenizer.json").unlink()
    assert run(*copies, "-o", tmp_path / "out", "--alpha", "0.3") == 0
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 1
    assert captured.err.startswith("note: no tokenizer that can be read on both sides")


# plan


def test_plan_shows_a_table_with_layers_collapsed(pair: Pair, capsys: Capture) -> None:
    assert run("plan", *pair) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "base (Qwen2-VL) <- donor (LLaVA-OneVision), 3 layers" in captured.out
    for word in ("embedding", "attention", "MLP", "norm", "head", "vision tower", "connector"):
        assert re.search(rf"│ {word} +│ +\d+ │ +[\d.]+ k?B │", captured.out), word
    assert "left over of the donor: " in captured.out
    assert "layers.0" not in captured.out
    assert len(captured.out.splitlines()) < 40
    assert re.search(r"disk free [\d.]+ GB, needed [\d.]+ kB", captured.out)


def test_plan_json_is_one_document(pair: Pair, capsys: Capture) -> None:
    assert run("plan", *pair, "--json") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    document = json.loads(captured.out)
    tensors = tiny.load(pair[0])
    assert sorted(step["name"] for step in document["steps"]) == sorted(tensors)
    assert document["bytes_written"] == sum(tensor.nbytes for tensor in tensors.values())
    assert sum(document["counts"].values()) == len(tensors)
    assert document["counts"]["interpolate"] == 3 + 3 * 12
    assert document["forecast"]["disk_needed"] == document["bytes_written"]
    for step in document["steps"]:
        rows = [part["rows"] for part in step["parts"]]
        assert rows[0][0] == 0
        assert [stop for _, stop in rows[:-1]] == [start for start, _ in rows[1:]]
        assert rows[-1][1] == tensors[step["name"]].shape[0]
        assert any(part["donor"] for part in step["parts"]) == (step["action"] == "interpolate")


def test_plan_writes_nothing(pair: Pair, tmp_path: Path, capsys: Capture) -> None:
    before = seen(pair[0].parent)
    assert run("plan", *pair, "-o", tmp_path / "a" / "b") == 0
    assert seen(pair[0].parent) == before
    assert not list(tmp_path.iterdir())
    assert "disk free" in capsys.readouterr().out


def test_the_code_that_loads_the_result_runs(pair: Pair, tmp_path: Path, capsys: Capture) -> None:
    assert run(*pair, "-o", tmp_path / "out", "--alpha", "0.3") == 0
    told = capsys.readouterr().err
    assert re.match(r"alpha 0\.3, \w+ <- \w+, \d", told)
    code = textwrap.dedent(told.partition("load it:\n")[2].partition("check it:")[0])
    found: dict[str, Any] = {}
    exec(code.partition("processor =")[0], found)  # the tiny pair has no processor
    assert sum(p.numel() for p in found["model"].parameters()) > 0
    check = told.partition("check it:\n  python -m lowmem_adamms ")[2].split()
    assert run(*check) == 0


def test_hostile_names_do_not_act_on_the_terminal(
    copies: Pair, tmp_path: Path, capsys: Capture
) -> None:
    hostile = "[red]\x1b]0;gotcha\x07\x1b[2J\u202e[bold]"
    base = copies[0].rename(copies[0].with_name(hostile))
    edit(base / "config.json", lambda config: config.update(architectures=[hostile]))
    for words in (
        ["plan", base, copies[1]],
        ["compare", base, copies[1]],
        [base, copies[1], "-o", tmp_path / "out", "--alpha", "0.3"],
        [base, tmp_path / hostile, "-o", tmp_path / "new", "--alpha", "0.3"],
    ):
        run(*words)
    shown = "".join(capsys.readouterr())
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e]", shown)
    assert "[red][U+001B]" in shown


def test_errors_and_notes_have_colours_on_a_terminal_that_wants_any(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for no_color, expected in (("", "\x1b[31merror:\x1b[0m"), ("1", "error:")):
        monkeypatch.setenv("NO_COLOR", no_color)
        monkeypatch.setattr(sys, "stderr", terminal := Terminal())
        assert run("verify", "nowhere") == 2
        assert terminal.getvalue().startswith(f"{expected} nowhere")


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (("serach", "x"), r"\(did you mean search\?\)"),
        (("merge", "a", "b", "-o", "x", "--alhpa", "0.3"), r"\(did you mean --alpha\?\)"),
        (("plan", "a", "b", "--measure", "joint"), r"--measure joint \(not of this command\)"),
        (("Qwen2-VL-7B", "b"), r"nor a command .* a model of the Hub is called org/name"),
        (("plan", "Qwen2-VL-7B", "b"), r"is called org/name, here org/Qwen2-VL-7B"),
        (
            ("plan", "https://huggingface.co/Qwen/Qwen2-VL-7B/tree/main", "b"),
            " as Qwen/Qwen2-VL-7B$",
        ),
        (
            ("plan", "hf.co/Qwen/Qwen2-VL-7B?x=y", "b"),
            " give a model of the Hub as Qwen/Qwen2-VL-7B$",
        ),
    ],
)
def test_a_slip_is_answered_with_a_hint(words: tuple[str, ...], hint: str, capsys: Capture) -> None:
    assert run(*words) == 2
    assert_one_error(*capsys.readouterr(), hint)


def test_settings_are_spelled_as_options(capsys: Capture) -> None:
    """Whatever the wings name as in Python."""
    console.print_note(
        "`force=True`, `drafts=False`, `live_quantize='nf4'`, `batch_size`, another `out`,"
        ' see `archs`, `push_to_hub`, `vram="8GB"`'
    )
    assert capsys.readouterr().err == (
        "note: --force, --no-drafts, --live-quantize nf4, --batch-size, another -o,"
        " see `archs`, --push-to-hub, --vram 8GB\n"
    )


def test_on_a_terminal_lines_break_between_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    console.print_note("some words " * 9 + "/a/path/that/is/longer/than-any-line/of-this/terminal")
    console.print_info("run:\n  python -m lowmem_adamms verify out --deep --base there\nor not")
    lines = terminal.getvalue().splitlines()
    assert lines[0] == "note: some words some words some words"
    assert max(map(len, lines[:3])) <= 40
    assert lines[3] == "/a/path/that/is/longer/than-any-line/of-this/terminal"
    assert lines[4:] == [
        "run:",
        "  python -m lowmem_adamms verify out --deep --base there",
        "or not",
    ]


def test_files_that_are_no_checkpoint_are_told_apart(tmp_path: Path, capsys: Capture) -> None:
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    assert run("plan", gguf, gguf) == 2
    assert_one_error(*capsys.readouterr(), "a GGUF file; take the safetensors files")
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    assert run("plan", snapshot.parents[1], gguf) == 2
    assert_one_error(*capsys.readouterr(), "give its org/name, or the folder snapshots/0123 in it$")


# Bad input: all of these end in one line on stderr, exit code 2 and nothing written


def first_shard(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def truncated(base: Path, donor: Path) -> None:
    path = first_shard(donor)
    path.write_bytes(path.read_bytes()[:-100])


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(path.read_bytes())
    change(document)
    path.write_text(json.dumps(document))


def index_leaves_the_folder(base: Path, donor: Path) -> None:
    edit(base / INDEX, lambda d: d["weight_map"].update(ghost="../donor/model.safetensors"))


def shorter(base: Path, donor: Path) -> None:
    """A layer fewer."""
    respell(donor, lambda name: None if "model.layers.2." in name else name)


def respell(folder: Path, rename: tiny.Rename) -> None:
    tiny.respell(folder, rename, folder.parent / "new")
    shutil.rmtree(folder)
    (folder.parent / "new").rename(folder)


def odd_shape(base: Path, donor: Path) -> None:
    cut(donor, lambda name, t: t[:5].clone() if "1.self_attn.k_proj.weight" in name else t)


def unrelated(base: Path, donor: Path) -> None:
    random = torch.Generator().manual_seed(9)
    cut(donor, lambda _, t: torch.randn(t.shape, generator=random).to(t.dtype))


def cut(folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    for shard in folder.glob("*.safetensors"):
        tensors = {name: change(name, tensor) for name, tensor in load_file(shard).items()}
        save_file(tensors, shard, {"format": "pt"})


def no_decoder(base: Path, donor: Path) -> None:
    respell(donor, lambda name: name if "vision" in name else None)


def gptq(base: Path, donor: Path) -> None:
    extra(donor, "language_model.model.layers.0.mlp.up_proj.qweight", torch.int32)


def extra(folder: Path, name: str, dtype: torch.dtype) -> None:
    shard = max(folder.glob("*.safetensors"))
    save_file(load_file(shard) | {name: torch.ones(4, dtype=dtype)}, shard, {"format": "pt"})
    if (folder / INDEX).exists():
        edit(folder / INDEX, lambda d: d["weight_map"].update({name: shard.name}))


def hostile_pickle(base: Path, donor: Path) -> None:
    for path in (*donor.glob("*.safetensors"), donor / INDEX):
        path.unlink()
    torch.save({"x": Hostile()}, donor / "pytorch_model.bin")


class Hostile:
    """Would run code when unpickled without care."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("hostile"),)


def nothing_there(base: Path, donor: Path) -> None:
    shutil.rmtree(donor)


BAD: dict[Callable[[Path, Path], None], str] = {
    truncated: "truncated",
    index_leaves_the_folder: "outside the folder",
    shorter: "config.json says 3; get the files that lack",
    odd_shape: r"shapes differ for layers\.1\.attn\.k\.weight",
    unrelated: "look unrelated",
    no_decoder: "no decoder found",
    gptq: "quantized",
    hostile_pickle: "holds not only tensors but .*which may run code",
    nothing_there: "no such folder or file",
}


@pytest.mark.parametrize("spoil", BAD, ids=lambda spoil: spoil.__name__)
def test_a_bad_checkpoint_is_one_line_and_nothing_written(
    spoil: Callable[[Path, Path], None],
    copies: Pair,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spoil(*copies)
    monkeypatch.chdir(tmp_path)
    before = seen(tmp_path)
    assert run(*copies, "-o", tmp_path / "out", "--alpha", "0.3") == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if not line.startswith("note: ")]
    assert_one_error(captured.out, "\n".join(lines), BAD[spoil])
    assert str(tmp_path) in captured.err  # it says which of the two
    assert seen(tmp_path) == before


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "give either --alpha, .*, or --prompts"),
        (("--alpha", "nan"), "alpha is nan"),
        (("--alpha", "-0.1"), "alpha is -0.1"),
        (("--alpha", "1.1"), "alpha is 1.1"),
        (("--alpha", "inf"), "alpha is inf"),
        (("--alpha", "much"), "--alpha"),
        (("--alpha", "0.3", "--dtype", "int8"), "expected bf16, fp16 or fp32"),
        (("--alpha", "0.3", "--embeddings", "no"), "--embeddings"),
        (
            ("--alpha", "0.3", "--max-shard-size", "big"),
            "--max-shard-size: .*: expected a size such as",
        ),
        (
            ("--alpha", "0.3", "--max-shard-size", "0"),
            "--max-shard-size: .*: expected a size such as",
        ),
        (("--alpha", "0.3", "--wat"), "--wat"),
    ],
    ids=str,
)
def test_a_bad_option_is_one_line_and_nothing_written(
    words: tuple[str, ...], says: str, pair: Pair, tmp_path: Path, capsys: Capture
) -> None:
    assert run(*pair, "-o", tmp_path / "out", *words) == 2
    assert_one_error(*capsys.readouterr(), says)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words",
    [("merge",), ("one",), ("plan", "one"), ("verify",), ("--wat",), ("demo", "x")],
    ids=str,
)
def test_an_incomplete_command_is_one_line(words: tuple[str, ...], capsys: Capture) -> None:
    assert run(*words) == 2
    assert_one_error(*capsys.readouterr(), "see python -m lowmem_adamms")


def test_without_a_word_the_help_is_shown(capsys: Capture) -> None:
    for words in ((), ("--help",)):
        with contextlib.suppress(SystemExit):  # argparse ends so after its help
            run(*words)
        assert capsys.readouterr().out.startswith("usage: python -m lowmem_adamms")


@pytest.mark.parametrize("where", ["base", "donor", "base/in", "full", "file", "file/below"])
def test_a_bad_place_is_one_line_and_nothing_written(
    where: str, copies: Pair, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = seen(tmp_path)
    assert run(*copies, "-o", tmp_path / where, "--alpha", "0.3") == 2
    assert_one_error(*capsys.readouterr(), re.escape(where))
    assert seen(tmp_path) == before


def test_a_name_too_long_for_the_disk_is_one_line(
    pair: Pair, tmp_path: Path, capsys: Capture
) -> None:
    for words in ((*pair, "-o", tmp_path / ("x" * 300)), (pair[0], tmp_path / ("y" * 300))):
        assert run(*words, "--alpha", "0.3", *(() if "-o" in words else ("-o", tmp_path))) == 2
        assert_one_error(*capsys.readouterr(), "xxx|yyy")
    assert not list(tmp_path.iterdir())


def test_a_home_that_the_shell_left_alone_is_found(
    copies: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """As in `--out=~/merged`, or in quotes."""
    (here := tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(tmp_path))
    base, donor = (f"~/{side.name}" for side in copies)
    assert run(base, donor, "--out=~/out", "--alpha", "0.3") == 0
    assert (tmp_path / "out" / "adamms.json").is_file()
    assert not list(here.iterdir())
    words = ["search", "--answers", "~/b", "c~/d", "--report=~/e", "--arch", "~/f"]
    _, found = parse(words)
    assert found.answers == (tmp_path / "b", Path("c~/d"))
    assert (found.report, found.arch) == (tmp_path / "e", (str(tmp_path / "f"),))


def test_what_is_for_hub_ids_is_said_to_do_nothing_for_folders(
    pair: Pair, tmp_path: Path, capsys: Capture
) -> None:
    assert run(*pair, "-o", tmp_path / "out", "--alpha", "0.3", "--no-cache") == 0
    assert capsys.readouterr().err.startswith(
        "note: --no-cache is for Hub ids; all checkpoints lie here and are read in place\n"
    )


class Encoded(io.TextIOWrapper):
    """A stdout of some encoding; `shown` tells what it got."""

    def __init__(self, encoding: str) -> None:
        super().__init__(io.BytesIO(), encoding)

    def shown(self) -> str:
        self.flush()
        assert isinstance(self.buffer, io.BytesIO)
        return self.buffer.getvalue().decode(self.encoding)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_name_and_any_help_can_be_printed_to_any_terminal(
    encoding: str, copies: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also JSON, which must stay JSON, and a name that is not UTF-8."""
    base = copies[0].rename(copies[0].with_name("b\xe4se \u2192 \udcff"))
    for words in (["--help"], ["plan", base, copies[1]], ["archs"], ["merge", "--help"]):
        monkeypatch.setattr(sys, "stdout", stdout := Encoded(encoding))
        assert run(*words) == 0
        assert stdout.shown()
    monkeypatch.setattr(sys, "stdout", stdout := Encoded(encoding))
    assert run("plan", base, copies[1], "--json") == 0
    assert json.loads(stdout.shown())["base"] == str(base)


def test_a_closed_stdout_is_no_bug(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert run("plan", *pair) == 0


def test_a_small_disk_is_one_line(
    pair: Pair, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert run(*pair, "-o", tmp_path / "out", "--alpha", "0.3") == 2
    assert_one_error(*capsys.readouterr(), "the output needs")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["out", "in"])
def test_what_may_not_be_read_or_written_is_one_line(
    place: str, pair: Pair, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As root nothing is forbidden: the refusal is played."""
    real = Path.open

    def refuse(path: Path, *args: Any, **options: Any) -> Any:
        if (place == "out") == ("journal" in path.name):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **options)

    monkeypatch.setattr(Path, "open", refuse)
    assert run(*pair, "-o", tmp_path / "out", "--alpha", "0.3") == 2
    assert_one_error(*capsys.readouterr(), "Permission denied")


# What is not the user's to mend, and interruption


def test_a_bug_keeps_its_traceback(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("lowmem_adamms.merging.writer.write", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        run(*pair, "-o", tmp_path / "out", "--alpha", "0.3")


def test_an_os_error_that_is_no_ones_fault_keeps_its_traceback(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise OSError(errno.EDOM, "Numerical argument out of domain")

    monkeypatch.setattr("lowmem_adamms.merging.writer.write", broken)
    with pytest.raises(OSError, match="out of domain"):
        run(*pair, "-o", tmp_path / "out", "--alpha", "0.3")


def test_interrupted_is_130(
    pair: Pair, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lowmem_adamms.merging.writer.write", interrupted)
    assert run(*pair, "-o", tmp_path / "out", "--alpha", "0.3") == 130
    assert capsys.readouterr().err == "interrupted: run the same command again to resume\n"


# Progress


def test_progress_is_drawn_on_a_terminal_only(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    run(*pair, "-o", tmp_path / "a", "--alpha", "0.3")
    assert "\x1b" not in capsys.readouterr().err
    terminal = Terminal()
    with monkeypatch.context() as patch:
        patch.setenv("TERM", "xterm")
        patch.setattr(sys, "stderr", terminal)
        assert run(*pair, "-o", tmp_path / "b", "--alpha", "0.3") == 0
        assert run("verify", tmp_path / "b", "--deep", "--base", pair[0], "--donor", pair[1]) == 0
    assert "merging" in terminal.getvalue()
    assert "rows of lm_head.weight" in terminal.getvalue()
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 2
    assert "\x1b" not in captured.out


def test_output_cut_short_by_a_pipe_is_no_bug(pair: Pair) -> None:
    """As in `plan … --json | head -c 100`."""
    command = [sys.executable, "-m", "lowmem_adamms", "plan", *map(str, pair), "--json"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()
