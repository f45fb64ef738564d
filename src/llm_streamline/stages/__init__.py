"""The stages of a run, one a file: what each does. When a stage is skipped is told in `runs/resume.py`."""
