"""A follower of stage 2 in several processes: `python -m bitdistill.stages.replica JOB.json RANK MEETING`.

Started by `train.replicas.led`; trains its copy of the student beside the leader's, and writes nothing.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

from bitdistill.config import Recipe
from bitdistill.errors import BitDistillError
from bitdistill.stages.common import Run, choose_device
from bitdistill.stages.pretrain import follow
from bitdistill.stages.redo import Redo
from bitdistill.train import replicas


def main(job_file: str, rank: str, meeting: str) -> int:
    """Follow the leader to its end; returns the exit status."""
    replicas.end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the leader decides
    job = json.loads(Path(job_file).read_text("utf-8"))
    recipe = Recipe.model_validate(job["recipe"])
    device = choose_device(job["device"])
    run_dir = Path(job["run_dir"])
    run = Run(recipe, run_dir, device, "", Redo.open(run_dir, {}), quiet=True)
    run.keys["pretrain"] = job["key"]
    try:
        follow(run, Path(job["before"]), int(rank), int(job["processes"]), Path(meeting))
    except BitDistillError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
