"""The command as such: exit codes, help, and what it does not import."""

import subprocess
import sys

import pytest

from cruxy_triton import __version__, cli


def test_version_and_help(command) -> None:
    done = command("--version")
    assert (done.returncode, done.stdout.strip()) == (0, f"cruxy-triton {__version__}")
    done = command("--help")
    assert done.returncode == 0
    assert all(name in done.stdout for name in cli.COMMANDS)


def test_nothing_and_nonsense(capsys) -> None:
    assert cli.main([]) == 2
    out, error = capsys.readouterr()
    assert all(name in out for name in cli.COMMANDS)
    assert "which command?" in error
    for words, said in [
        (["fintune"], f"'fintune'; expected one of {', '.join(cli.COMMANDS)}; did you mean finetune?"),
        (["doctor", "--jsn"], "unrecognized arguments: --jsn; did you mean --json?"),
        (["kernels", "--processes", "two"], "invalid int value: 'two'"),
        (["bench"], "KIND"),
        (["bench", "stp"], "invalid choice: 'stp'"),
    ]:
        assert cli.main(words) == 2
        error = capsys.readouterr().err
        assert said in error
        assert len(error.splitlines()) == 1


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_every_command_has_help_without_importing_torch(name: str) -> None:
    code = (
        "import sys; from cruxy_triton import cli\n"
        f"try: cli.main([{name!r}, '--help'])\n"
        "except SystemExit as stop: code = stop.code\n"
        "sys.exit(code or ('torch' in sys.modules and 'help imported torch'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert f"usage: cruxy-triton {name}" in done.stdout


def test_a_failure_that_nobody_foresaw_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    import cruxy_triton.doctor

    def broken() -> None:
        raise OSError("the disk is on fire\nand more")

    monkeypatch.setattr(cruxy_triton.doctor, "examine", broken)
    assert cli.main(["doctor"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("cruxy-triton doctor: error: OSError: the disk is on fire (")
    assert "and more" not in error
    with pytest.raises(OSError, match="on fire"):
        cli.main(["doctor", "--debug"])


def test_interruption_is_130(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    import cruxy_triton.doctor

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cruxy_triton.doctor, "examine", interrupted)
    assert cli.main(["doctor"]) == 130
    assert "interrupted" in capsys.readouterr().err
