"""Behind run.py: the set-up, a real ComfyUI, and a client for it. Standard library only (picture.py aside)."""
