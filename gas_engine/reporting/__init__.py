"""Runs on one self-contained page: read from their directories, drawn by the page's own script."""

from .page import write_page
from .pictures import MOST, SAMPLES, save_samples
from .run import read_run

__all__ = ["MOST", "SAMPLES", "read_run", "save_samples", "write_page"]
