"""Worker groups: live DDP workers under Ray Train that train one trial after another."""
