"""`kd chat` is a chat with a student, on a terminal or through a pipe."""

from __future__ import annotations

import sys

import click

from kdcache import quiet
from kdcache.commands.console import note, note_device
from kdcache.commands.options import NAME_OR_PATH, trust_option
from kdcache.printable import printable


@click.command("chat")
@click.argument("student", type=NAME_OR_PATH)
@click.option("--system", help="System prompt.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="Temperature of sampling; 0 is greedy.")
@click.option(
    "--max-new-tokens", type=click.IntRange(1), default=256, show_default=True, help="Most tokens of an answer."
)
@click.option(
    "--bos",
    type=click.Choice(["auto", "add", "never"]),
    help="What a prompt begins with, as in kd cache-teacher [default: as the student was trained].",
)
@trust_option
def chat(student: str, system: str | None, temperature: float, max_new_tokens: int, bos: str | None) -> None:
    """Chat with a student.

    Each line gets an answer; an empty line or Ctrl-D ends the chat.

    \b
    kd chat data/kd
    echo "What is 3 + 4?" | kd chat data/kd
    """
    quiet.libraries()
    from trainer.student import chat as chatting

    conversation = chatting.Conversation(student, system, temperature, max_new_tokens, bos)
    note_device()
    if conversation.prompts.lacks_bos:
        note(f"warning: {student} {conversation.prompts.without_bos}")
    while True:
        if sys.stdin.isatty():
            click.secho("> ", nl=False, err=True, bold=True)
        line = sys.stdin.readline().strip()
        if not line:
            return
        for piece in conversation.answer(line):
            click.echo(printable(piece, keep="\n\t") if sys.stdout.isatty() else piece, nl=False)
        click.echo()
