"""Command lines that are printed: what a shell reads back are the words."""

from __future__ import annotations

import shlex

from hypothesis import given, strategies as st

from fewstep.runs.command_line import command_line


def test_expressions_are_readable() -> None:
    words = ["fewstep", "--domain", "Prompts('a b.txt')", "--lora", "LoRA(4)", "it's $5"]
    expected = """fewstep --domain "Prompts('a b.txt')" --lora 'LoRA(4)' 'it'"'"'s $5'"""
    assert command_line(words) == expected


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))))
def test_a_shell_reads_the_words(words: list[str]) -> None:
    assert shlex.split(command_line(words)) == words
