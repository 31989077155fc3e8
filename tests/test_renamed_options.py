"""Former names of options: they work, are not in --help, and print one line on stderr."""

import pytest

from aropd_mcore.cli.entry import UsageError, parse

COMMANDS = {
    "prepare": ["prepare", "in.jsonl", "--output", "rows.jsonl"],
    "generate": ["generate", "--checkpoint=runs/mine", "--prompts=p.jsonl", "--output=out.jsonl"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_parse_former_option_names_are_replaced_with_one_line_each(command, capsys):
    words = COMMANDS[command]
    current = [w.replace("--output", "--out").replace("--checkpoint", "--model") for w in words]
    former_args = parse(words)
    lines = capsys.readouterr().err.splitlines()
    assert former_args.argv == current  # ranks do not print the lines again
    assert vars(former_args) == vars(parse(current))
    assert lines == [
        f"aropd: {option} is deprecated: use {name}"
        for option, name in (("--checkpoint", "--model"), ("--output", "--out"))
        if any(word.startswith(option) for word in words)
    ]
    assert not capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse([command, "--help"])
    help_text = capsys.readouterr().out
    assert "--output" not in help_text and "--checkpoint" not in help_text


def test_parse_former_option_name_on_another_rank_prints_nothing(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert str(parse(COMMANDS["prepare"]).out) == "rows.jsonl"
    assert not capsys.readouterr().err


def test_parse_former_option_name_of_another_command_is_refused():
    with pytest.raises(UsageError):
        parse(["report", "run", "--output", "page.html"])
