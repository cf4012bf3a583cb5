"""`ossnet demo`: everything once, on a real MRI."""

from pathlib import Path
from typing import Annotated

import typer

from ossnet.cli.common import say


def command(
    out: Annotated[Path, typer.Option(help="Folder for the page and everything it is made from.")] = Path(
        "demo"
    ),
    minutes: Annotated[float, typer.Option(help="Training time.", min=0.05)] = 1.0,
) -> None:
    """Train, segment and evaluate on a real MRI in a few minutes.

    Trains a small network on the back of a brain (the MNI152 template that nilearn ships), segments the
    front, which it has not seen, and writes one page with pictures and figures. Nothing is downloaded.

    **Example:** `ossnet demo --out demo`, then open `demo/index.html`
    """
    from ossnet.cli.train import Watcher
    from ossnet.experiments.demo import run_demo
    from ossnet.experiments.demo_page import demo_page
    from ossnet.reports.page import write_page

    with Watcher() as watcher:
        result = run_demo(out, minutes, listener=watcher, say=say)
    page = out / "index.html"
    write_page(page, demo_page(result))
    for label, scores in result.scores.items():
        say(f"{result.prediction.names[label]}: Dice {scores.dice or 0:.3f} on the part that was held out")
    say(f"open {page.resolve().as_uri()}")
