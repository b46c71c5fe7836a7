"""Run a Python program where what Windows lacks does not exist: `python without_posix.py program.py arguments…`,
`python without_posix.py -m module arguments…`. As near to Windows as another system comes."""

import multiprocessing
import os
import runpy
import shutil
import signal
import sys
import tempfile  # noqa: F401 (and what else of the standard library looks for these once)
from pathlib import Path

for name in ("fcntl", "pwd", "grp", "resource"):
    sys.modules[name] = None
for name in ("SIGHUP", "SIGKILL", "SIGUSR1", "SIGUSR2", "SIGALRM", "pthread_sigmask"):
    delattr(signal, name)
for name in ("getuid", "geteuid", "setpgrp", "sched_getaffinity", "O_DIRECTORY", "O_NOFOLLOW"):
    delattr(os, name)
shutil._use_fd_functions = False  # rmtree goes by names there

_open = os.open


def open_no_folder(path, flags, *arguments, **options):
    """`os.open`, which opens no folder on Windows."""
    if Path(path).is_dir():
        raise PermissionError(13, "Permission denied", path)
    return _open(path, flags, *arguments, **options)


os.open = open_no_folder

if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    del sys.argv[0]
    if sys.argv[0] == "-m":
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(sys.argv[0]).parent)
        runpy.run_path(sys.argv[0], run_name="__main__")
