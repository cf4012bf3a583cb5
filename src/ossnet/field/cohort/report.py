"""`report.json`: what was made of each scan, kept up to date while several processes work."""

import json
import math
import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ossnet.errors import InputError, OssnetError, SettingsError
from ossnet.field.cohort.jobs import Job, Options, Origins
from ossnet.field.model import Model, versions
from ossnet.field.provenance import made_by
from ossnet.files.atomic import write_json
from ossnet.files.containers import stem
from ossnet.files.reading import origin_of, read_labels
from ossnet.volume import LabelMap

_REPORT_SECONDS = 10.0

_ATTEMPTS = 3
"""To enter what was done into a report that others write as well."""


class Report:
    """`report.json`; entries of scans that were finished earlier are kept.

    Nothing is written as long as nothing was segmented: a refused scan leaves no files.
    """

    def __init__(
        self,
        file: Path | None,
        model: Model,
        options: Options,
        origins: Origins,
    ) -> None:
        self.file, self.model, self.options, self.origins = file, model, options, origins
        self.scans: dict[str, Any] = {}
        """Entries of this process."""
        # The first result at once: whoever lists the folder meanwhile shall see what it holds.
        self._written = -math.inf
        self._known()

    def _known(self) -> dict[str, Any]:
        """Entries in the file: of earlier runs, and of processes that work on the same folder."""
        if self.file is None or not self.file.is_file():
            return {}
        try:
            return dict(json.loads(self.file.read_text(encoding="utf-8"))["scans"])
        except (ValueError, TypeError, KeyError):
            raise SettingsError(
                self.file, "it is there and is not a report of ossnet", "Move it away, or name another output"
            ) from None

    def complete(self, finished: Sequence[Job]) -> None:
        """Enter what is finished and was not entered, as after a kill: what its label map says."""
        known = self._known()
        for job in finished:
            if known.get(job.name, {}).get("origin") != origin_of(job.target):
                labels = read_labels(job.target)
                self.scans[job.name] = {
                    "files": [str(f) for f in job.files],
                    "model": self.origins.fingerprint,
                    **said_by(job, labels),
                }

    def collect(self, item: tuple[Job, dict[str, Any], Future[None]]) -> None:
        """Wait until a label map is on the disk, then enter it.

        Raises:
            InputError: It could not be written.
            ResourceError: The disk is full.
        """
        job, entry, future = item
        future.result()
        self.scans[job.name] = entry
        if time.monotonic() - self._written > _REPORT_SECONDS:
            # A report that cannot be written is no matter of this scan: it is told at the end, if it lasts.
            with suppress(InputError):
                self.write()

    def refuse(self, job: Job, error: OssnetError) -> None:
        """Enter why a scan was not segmented."""
        self.scans[job.name] = {"error": str(error)}

    def content(self) -> dict[str, Any]:
        """What the file holds, or will hold.

        Of the last model that worked on the folder; entries have the fingerprints of theirs.
        """
        return {
            "model": {
                "variant": self.model.variant,
                "data": self.model.metadata.get("data", {}).get("name"),
                "labels": {self.model.label_values[k]: name for k, name in self.model.label_names.items()},
                "mirror": list(self.model.mirror),
                "others": len(self.model.others),
                "fingerprint": self.origins.fingerprint,
            },
            "options": {k: v for k, v in asdict(self.options).items() if v is not None},
            "versions": versions(),
            "scans": self._all(),
        }

    def _all(self) -> dict[str, Any]:
        """Entries of all; what failed here may have been done by others."""
        known = self._known()

        def done(name: str) -> bool:
            entry = known.get(name, {})
            return made_by(entry.get("origin", "")) in self.origins[name] and Path(entry["result"]).is_file()

        return known | {k: v for k, v in self.scans.items() if "error" not in v or not done(k)}

    def write(self) -> None:
        """Bring the file up to date."""
        self._written = time.monotonic()
        if self.file is None or all("error" in entry for entry in self.scans.values()):
            return
        # Another process may write at the same time: then what it read was without these entries.
        for _ in range(_ATTEMPTS):
            write_json(self.file, self.content())
            if self._all() == self._known():
                return


def report_file(jobs: Sequence[Job], rank: int, world: int) -> Path | None:
    if not jobs:
        return None
    target = jobs[0].target
    if jobs[0].alone:
        return target.with_name(f"{stem(target)}_report.json")
    return target.with_name("report.json" if world == 1 else f"report.{rank}.json")


def said_by(job: Job, labels: LabelMap) -> dict[str, Any]:
    """Of a scan's entry, what its label map says."""
    return {
        "result": str(job.target),
        "origin": labels.origin,
        "shape": list(labels.shape),
        "spacing_mm": [round(s, 4) for s in labels.spacing],
        "volumes_ml": {
            labels.names.get(k, str(k)): round(v, 3)
            for k, v in ({k: 0.0 for k in sorted(labels.names) if k} | labels.volumes_ml()).items()
        },
    }
