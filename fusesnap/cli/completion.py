"""``fusesnap completion``."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print a completion script for SHELL.

    \b
    bash:  fusesnap completion bash > /etc/bash_completion.d/fusesnap
    zsh:   fusesnap completion zsh > "${fpath[1]}/_fusesnap"
    fish:  fusesnap completion fish > ~/.config/fish/completions/fusesnap.fish
    """
    kind = get_completion_class(shell)
    if kind is None:  # pragma: no cover - click knows the three that the choice offers
        raise click.UsageError(f"no completion for {shell}")
    click.echo(kind(context.find_root().command, {}, "fusesnap", "_FUSESNAP_COMPLETE").source())
