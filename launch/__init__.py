"""People: the `transfuse` command, the demo and its report.

cli.py      every command, one function each
exits.py    exit codes and what each stands for
demo.py     the main job on one machine
trainer.py  the demo's policy-gradient trainer
report.py   the demo's report, one HTML file
"""
