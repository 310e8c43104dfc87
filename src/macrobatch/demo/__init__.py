"""`macrobatch demo`: one real training, three ways, with a table, pictures and a page that show the difference."""

from macrobatch.demo.job import run
from macrobatch.demo.options import DemoOptions
from macrobatch.demo.report import DemoReport

__all__ = ["DemoOptions", "DemoReport", "run"]
