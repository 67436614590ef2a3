"""Python imports this at its start where PYTHONPATH names this folder: a decoder that some JPEGs are fatal to.

They say so in their comment. It stands for the faults of real decoders, of which no known one is left to be had.
"""

import signal
import time

from PIL import JpegImagePlugin

_load = JpegImagePlugin.JpegImageFile.load


def _load_or_die(self, *arguments, **settings):
    match self.info.get("comment"):
        case b"kills":
            signal.raise_signal(signal.SIGSEGV)
        case b"hangs":
            time.sleep(3_600)
    return _load(self, *arguments, **settings)


JpegImagePlugin.JpegImageFile.load = _load_or_die
