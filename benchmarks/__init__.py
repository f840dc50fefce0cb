"""Side by side: what takes how long here, and with what a user would take instead."""
import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler would write to the terminal of the table
