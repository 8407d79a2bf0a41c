"""The benchmark: `study` is the experiment ``bench``; `peers` asks `torch_work`, a process of its own, for the same."""
