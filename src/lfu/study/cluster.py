"""On a cluster: workers as jobs of its own scheduler, by submitit. They share the study's folder, and take the runs
one by one, as several processes on one machine do."""

import subprocess
from collections.abc import Mapping, Sequence

from lfu.study.processes import in_rounds, worker
from lfu.study.study import Study
from lfu.support.errors import UserError, one_line


def work_on_cluster(study: Study, jobs: int, command: Sequence[str], options: Mapping[str, str]) -> None:
    """Submits up to `jobs` workers and waits for them; again, as long as jobs die and fewer runs are left.

    `options`: `cluster` (slurm or local; default: slurm where it is found), and what submitit's `update_parameters`
    takes, as text: `timeout_min=240`, `gpus_per_node=1`, `slurm_partition=gpu`. Raises UserError: one that it doesn't
    know, or a job's own; KeyboardInterrupt: the jobs are cancelled, finished runs are kept.
    """
    import submitit

    given, logs = dict(options), study.folder / "jobs"
    try:
        executor = submitit.AutoExecutor(folder=logs, cluster=given.pop("cluster", None))
        executor.update_parameters(**{name: int(v) if v.isdecimal() else v for name, v in given.items()})
    except (NameError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"--submitit: {one_line(error)}") from error

    def start() -> list[int]:
        with executor.batch():
            found = [executor.submit(subprocess.call, worker(study, command)) for _ in range(study.useful(jobs))]
        study.say(f"jobs {', '.join(job.job_id for job in found)}; their logs are in {logs}")
        try:
            return [1 if job.exception() else job.result() for job in found]  # waits
        except KeyboardInterrupt:
            for job in found:
                job.cancel()
            raise

    in_rounds(study, start, f"a job stopped with an error: see {logs}")
    if left := len(study.todo()):
        study.say(f"{left} runs are not finished, as their jobs ended early: see {logs}; the same command continues")
