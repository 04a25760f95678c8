"""People: the `transfuse` command, the demo and its report.

cli.py         the table of commands; running.py, admin.py and others have them, one function each
conformance.py what other libraries wrote, against our rows; cases_*.py say what is compared, fixtures.py reads it
exits.py       exit codes and what each stands for
demo.py        the main job on one machine
trainer.py     the demo's policy-gradient trainer
report.py      the demo's report, one HTML file
serve.py       a service in the foreground
interrupts.py  Ctrl-C and SIGTERM
rpc.py         one call to a running service
tables.py      what the service says, as text
progress.py    bars on stderr
planning.py    what a push would send and take: plan, simulate
scenario.py    a trainer and a service that need not exist; scenarios/*.toml come with the release
picture.py     who sends what to whom
*_page.py      pages of docs that are written from tables
"""
