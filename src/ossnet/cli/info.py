"""`ossnet info`."""

from typing import Annotated

import typer
from rich.markdown import Markdown

from ossnet.cli.common import print_json, stdout
from ossnet.cli.options import AsJson


def command(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Model or run folder, or the name of a shipped model. Not given: the shipped ones are listed.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a model is and how it was trained.

    **Example:** `ossnet info runs/hippocampus`
    """
    from ossnet.field.model import Model, shipped_models

    if model is None:
        shipped = {name: list(Model.load(name).label_names.values()) for name in shipped_models()}
        if as_json:
            print_json(shipped)
        else:
            for name, structures in shipped.items():
                stdout().print(f"{name}: {', '.join(structures)}")
        return
    loaded = Model.load(model)
    if as_json:
        print_json(loaded.description() | {"fingerprint": loaded.fingerprint()})
    else:
        stdout().print(
            Markdown(f"{loaded.card()}\nFingerprint, as reports name it: `{loaded.fingerprint()}`")
        )
