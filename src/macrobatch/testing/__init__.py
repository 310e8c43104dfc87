"""What macrobatch is tested with, for those who extend it."""
