"""A stand-in for Modal's control plane, on loopback: the real `modal` command and the real container entry point
run the project's scripts on it, unchanged.

`ModalCloud` is the whole of it; the fixture `modal_cloud` in tests/conftest.py makes one a test.
"""

from .cloud import Finished, ModalCloud
from .faults import Fault

__all__ = ["Fault", "Finished", "ModalCloud"]
