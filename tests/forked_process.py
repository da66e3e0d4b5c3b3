"""Starts a Python program in the fork of a process that has already imported jax and shardtrain.

A fresh interpreter takes seconds to import them, and the tests of several processes start many. The fork has a
process id, signals, streams and an exit status of its own, like any other process.
"""

import atexit
import os
import runpy
import signal
import subprocess
import sys
from unittest import mock

from recipe_process import _FORKS, IN_HASTE, environment


def _run(program, arguments, streams):
    """What the fork does: runs a file as a script, with its output in two files."""
    for number, stream in enumerate(streams, 1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT, 0o644), number)
    os.environ["XLA_FLAGS"] = IN_HASTE
    sys.argv = [program, *arguments]
    try:
        runpy.run_path(program, run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # as at the end of an interpreter; multiprocessing ends its processes without


class ForkedProcess:
    """A Python file that runs as a script in a process of its own.

    Args:
        program: path of the file.
        arguments: its arguments.
        stdout, stderr: paths of files or named pipes, which take its output.
    """

    def __init__(self, program, arguments, stdout, stderr):
        job = str(program), [*map(str, arguments)], (str(stdout), str(stderr))
        self._process = _FORKS.Process(target=_run, args=job)
        with mock.patch.dict(os.environ, environment(), clear=True):  # that of the first start counts
            self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self):
        """The exit status, or minus the signal that ended it; None while it runs."""
        return self._process.exitcode

    def poll(self):
        return self.returncode

    def wait(self, timeout=None):
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout)
        return self.returncode

    def send_signal(self, number):
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)
