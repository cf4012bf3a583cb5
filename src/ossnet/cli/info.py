"""`ossnet info`."""

from typing import Annotated

import typer
from rich.markdown import Markdown

from ossnet.cli.common import print_json, stdout
from ossnet.cli.options import AsJson


def command(
    model: Annotated[str, typer.Argument(help="Model or run folder, or the name of a shipped model.")],
    as_json: AsJson = False,
) -> None:
    """Show what a model is and how it was trained.

    **Example:** `ossnet info runs/hippocampus`
    """
    from ossnet.field.model import Model

    loaded = Model.load(model)
    if as_json:
        print_json(loaded.description() | {"fingerprint": loaded.fingerprint()})
    else:
        stdout().print(
            Markdown(f"{loaded.card()}\nFingerprint, as reports name it: `{loaded.fingerprint()}`")
        )
