"""The worker process's side: its loop, how it loads one task, and its beacon."""
