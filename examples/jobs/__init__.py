"""Programs for `ray job submit`: docs/operating.md, Jobs, has the commands."""
