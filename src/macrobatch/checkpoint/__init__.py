"""Files that survive a kill: written beside the old ones and renamed, read without running anything."""

from macrobatch.checkpoint.io import load_file, replaced_folder, save_file

__all__ = ["load_file", "replaced_folder", "save_file"]
