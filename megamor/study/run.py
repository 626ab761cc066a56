"""Run all jobs of a study on this machine, some at a time, and show how far the whole study is."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from megamor.corpus.corpora import CORPORA
from megamor.corpus.text import find_files
from megamor.data.check import find_problems
from megamor.devices import usable_device
from megamor.errors import EXIT_INTERRUPTED, ConfigError, DataError, MegamorError, TrainingError
from megamor.files import parse_json, replace_file
from megamor.model import build_model
from megamor.parallel import init_world
from megamor.progress import ProgressDisplay
from megamor.study.data import STDLIB, prepare
from megamor.study.jobs import (
    SETUP_FILE,
    Interrupted,
    Job,
    check_version,
    executed_so_far,
    expected_flops,
    fingerprint,
    jobs_of,
    needs,
    read_result,
    run_job,
)
from megamor.study.spec import Arm, Study, load_study

_PROBE_STEPS = 3


def set_up(study: Study, root: Path) -> None:
    """Prepare data and choose the precision, once. All jobs read both from `setup.json`.

    Raises:
        DataError, ConfigError: the data are missing or don't fit, or what `check_version` raises.
    """
    path, wanted = root / SETUP_FILE, fingerprint(study)
    if path.exists():
        check_version(study, root)
        setup = parse_json(path.read_text(encoding="utf-8"))
        replace_file(path, json.dumps({**setup, "study": wanted}, indent=1) + "\n")
        return
    root.mkdir(parents=True, exist_ok=True)
    config = study.arms[0].config
    check_data(study)
    data = prepare(study.data, root / "data", config.model.vocab_size) if study.data else None
    precision = study.precision
    if precision == "auto":
        largest = max(study.arms, key=lambda arm: arm.parameters[0])
        precision = faster_precision(largest)
    replace_file(path, json.dumps({"data": data, "precision": precision, "study": wanted}, indent=1) + "\n")


def check_data(study: Study) -> None:
    """Raises DataError or ConfigError if the data that the study names aren't there."""
    config, data = study.arms[0].config, study.data
    if "text" in data:
        find_files(data["text"], option="data.text")
    if data.get("corpus", STDLIB) not in (STDLIB, *CORPORA):
        raise ConfigError(f"{study.file}: data.corpus = {data['corpus']}: give one of {', '.join((STDLIB, *CORPORA))}")
    if (kind := data.get("tokenizer", "bpe")) not in ("bpe", "char") and not Path(kind).is_file():
        raise DataError(f"{study.file}: data.tokenizer: there is no file {kind}; give bpe, char or a tokenizer.json")
    if not data and not config.data.validation:
        raise ConfigError(f"{study.file}: there is no validation set: give `data`, or a base with data.validation")
    if not data and (problems := find_problems(config.data, seed=0, vocab_size=config.model.vocab_size)):
        raise ConfigError("\n  ".join([f"{study.file}: the base's data aren't usable:", *problems]))


def faster_precision(arm: Arm) -> str:
    """bf16 or fp32, whichever trains `arm` faster on this machine, by a short measurement."""
    if usable_device(arm.config.run.device).type == "cuda":
        return "bf16"
    model, config = build_model(arm.config), arm.config
    shape = (config.train.micro_batch_size, config.data.seq_len)
    ids = torch.randint(config.model.vocab_size, shape)
    seconds: dict[str, float] = {}
    for precision in ("fp32", "bf16"):
        for step in range(_PROBE_STEPS):
            started = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                loss = model(ids, ids).loss_sum
            loss.backward()
            if step:  # the first one warms up
                seconds[precision] = min(seconds.get(precision, 1e9), time.perf_counter() - started)
    chosen = min(seconds, key=lambda precision: seconds[precision])
    took = ", ".join(f"{precision} {duration:.2f} s" for precision, duration in seconds.items())
    print(f"precision: {chosen} for all arms (forward and backward pass of {arm.name}: {took})", flush=True)
    return chosen


_current: list[str] = []
"""The job that this worker is doing, if any."""


class StudyRunner:
    """Runs the jobs of `study` below `root`, `at_once` at a time with `threads` each."""

    def __init__(self, study: Study, root: Path, at_once: int, threads: int) -> None:
        self.study, self.root, self.at_once, self.threads = study, root, at_once, threads
        self.jobs = jobs_of(study)
        self.expected = {job.name: expected_flops(study, job) for job in self.jobs}
        self.asked_to_stop = False

    def run(self) -> bool:
        """Run what isn't finished. Returns False if a signal ended it; runs have saved then.

        Raises:
            TrainingError: some jobs failed; all others are finished.
        """
        waiting = [job for job in self.jobs if read_result(self.root, job.name) is None]
        finished = {job.name for job in self.jobs} - {job.name for job in waiting}
        failed: dict[str, BaseException] = {}
        running: dict[Future[None], Job] = {}
        total = sum(self.expected.values())
        pool = ProcessPoolExecutor(
            self.at_once, multiprocessing.get_context("spawn"), _start_worker, (os.getpid(), self.threads)
        )
        with (
            pool,
            self._signals(pool),
            ProgressDisplay(self.study.name, total, unit="FLOPs", log_first=True) as display,
        ):
            while (waiting or running) and not (self.asked_to_stop and not running):
                for job in [job for job in waiting if self._is_ready(job, finished)]:
                    if len(running) == self.at_once or self.asked_to_stop:
                        break
                    waiting.remove(job)
                    running[pool.submit(_work, self.study.file, self.root, self.study.seeds, job.name)] = job
                if not running:
                    break  # the rest needs results of jobs that failed
                done, _ = wait(running, timeout=1, return_when=FIRST_COMPLETED)
                for future in done:
                    job = running.pop(future)
                    try:
                        future.result()
                        finished.add(job.name)
                    except Interrupted:
                        self.asked_to_stop = True
                    except (MegamorError, BrokenProcessPool) as error:
                        failed[job.name] = error
                        display.message(f"{job.name} failed: {error}")
                        self.asked_to_stop = self.asked_to_stop or isinstance(error, BrokenProcessPool)
                self._show(display, finished, running)
        if failed:
            logs = ", ".join(str(self.root / "logs" / f"{name}.log") for name in failed)
            raise TrainingError(f"{len(failed)} of {len(self.jobs)} jobs failed ({', '.join(failed)}); see {logs}")
        return not self.asked_to_stop

    def _is_ready(self, job: Job, finished: set[str]) -> bool:
        return all(name in finished for name in needs(self.study, job))

    def _show(self, display: ProgressDisplay, finished: set[str], running: dict[Future[None], Job]) -> None:
        done = sum(self.expected[name] for name in finished)
        done += sum(min(self.expected[job.name], executed_so_far(self.root, job)) for job in running.values())
        names = ", ".join(job.name for job in running.values())
        display.update(done, {"jobs": f"{len(finished)}/{len(self.jobs)}", "running": names or "none"})

    @contextmanager
    def _signals(self, pool: ProcessPoolExecutor) -> Iterator[None]:
        """While active, a stop signal is passed on to the workers, which save."""

        def stop(number: int, frame: object) -> None:
            self.asked_to_stop = True
            for process in [*(pool._processes or {}).values()]:
                if process.pid is not None:  # a terminal's Ctrl-C has reached them already; saving twice does no harm
                    os.kill(process.pid, signal.SIGTERM)

        previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _start_worker(parent: int, threads: int) -> None:
    """Runs once in each worker."""
    torch.set_num_threads(threads)
    if torch.cuda.is_available():
        position = int(multiprocessing.current_process().name.rpartition("-")[2]) - 1
        os.environ["LOCAL_RANK"] = str(position % torch.cuda.device_count())  # chooses the worker's GPU
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _between_steps)

    def watch() -> None:
        # A parent that was killed would leave its workers training, and holding the locks of their runs.
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)
        while _current:
            time.sleep(0.1)
        os._exit(EXIT_INTERRUPTED)

    threading.Thread(target=watch, daemon=True).start()


def _between_steps(number: int, frame: object) -> None:
    """A signal while no trainer listens, such as during an evaluation: nothing is lost if that is done again."""
    if _current:
        raise Interrupted(_current[0])


def _work(file: Path, root: Path, seeds: int, name: str) -> None:
    """Do the job `name` in this process, with its output in a file of its own."""
    _current.append(name)
    try:
        study = load_study(file, seeds=seeds)
        job = next(job for job in jobs_of(study) if job.name == name)
        log = root / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as out:
            for stream in (1, 2):
                os.dup2(out.fileno(), stream)
        config = job.arm.config
        run_job(study, job, root, init_world(replace(config.parallel, backend="single"), config.run.device))
    finally:
        _current.clear()
