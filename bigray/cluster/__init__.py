"""Where it runs: connecting to Ray, what the cluster holds, what a job would start."""
