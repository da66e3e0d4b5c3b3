"""`shardtrain doctor`: shows in a table what would keep a job from starting."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from shardtrain.errors import UserError
from shardtrain.files import expanded
from shardtrain.launch import detect
from shardtrain.launch.cluster import surrounding
from shardtrain.launch.doctor import Finding, examine
from shardtrain.launch.rendezvous import refuse_endless


@dataclass(frozen=True)
class Doctor:
    """Looks at devices, names, ports, versions, disks and clocks, and says how to mend what it finds.

    Alone before a job, or as the job: `srun shardtrain doctor`, `shardtrain launch local -n 2 -- shardtrain
    doctor`. The exit status is 1 if there is something to mend, and 0 otherwise.
    """

    out: Path = Path("runs")
    """Folder that runs are to be written to."""
    coordinator: str | None = None
    """HOST:PORT of process 0. This and the next two are known by themselves, as in recipes."""
    processes: int | None = None
    """Processes of the job."""
    process_id: int | None = None
    """Number of this process, from 0."""
    start_limit: float = 60.0
    """Seconds to wait for other processes."""

    def run(self, rest: Sequence[str]) -> None:
        """Prints the table, and exits with the status."""
        if rest:
            raise UserError(f"-- {' '.join(rest)}: doctor runs no other command; leave it out")
        refuse_endless("--start-limit", self.start_limit)
        given = (self.coordinator, self.processes, self.process_id)
        # A coordinator without the other two is that of a job that has not started yet.
        alone = given[1:] == (None, None) and surrounding(os.environ) is None
        cluster = None if alone else detect(os.environ, *given)
        findings = examine(expanded(self.out).absolute(), cluster, self.coordinator, self.start_limit)
        bad = [finding for finding in findings if not finding.good]
        if findings[0].process == (
            cluster.process_id if cluster else 0
        ):  # process 0 speaks for all it has met
            Console(width=100, markup=False).print(table(findings))
            for finding in bad:
                print(f"process {finding.process}: {finding.check}: {finding.found}\n    {finding.fix}")
        sys.exit(1 if bad else 0)


def table(findings: Sequence[Finding]) -> Table:
    """Returns the findings as a table; equal findings of several processes share a row."""
    shown = Table(title="doctor")
    for column in ("check", "process", "", "found"):
        shown.add_column(column)
    rows: dict[tuple[str, bool, str], list[int]] = {}
    for finding in findings:
        rows.setdefault((finding.check, finding.good, finding.found), []).append(finding.process)
    for (check, good, found), who in rows.items():
        numbers = f"{who[0]}-{who[-1]}" if len(who) > 2 else ", ".join(map(str, who))
        shown.add_row(check, numbers, "ok" if good else "mend", found)
    return shown
